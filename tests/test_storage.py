"""Laws of storage, on a disk and on a bucket: whole or nothing, one holder, the same content."""

import ast
import contextlib
import json
import logging
import os
import pathlib
import signal
import subprocess
import sys
import threading
import time

import pytest

from dpojax import storage
from dpojax.storage import contents, files, lines, locks, paths
from tests.gcs import bucket, gcs_emulator  # noqa: F401 (fixtures)

ROOT = pathlib.Path(__file__).resolve().parents[1]


@pytest.fixture(params=["disk", "bucket"])
def folder(request, tmp_path, monkeypatch):
    """An empty folder, once on a disk and once on a bucket."""
    monkeypatch.setenv("DPOJAX_MIRROR", str(tmp_path / "mirror"))
    if request.param == "disk":
        return storage.as_path(tmp_path / "folder")
    return storage.as_path(request.getfixturevalue("bucket")) / "folder"


@pytest.fixture
def mirror(tmp_path, monkeypatch):
    monkeypatch.setenv("DPOJAX_MIRROR", str(tmp_path / "mirror"))
    return tmp_path / "mirror"


def names(folder):
    """The names in a folder, hidden ones too, sorted."""
    return sorted(path.name for path in folder.iterdir()) if folder.exists() else []


def content(folder):
    """The text of every file below a folder, by relative name."""
    local = storage.local_copy(folder)
    files = sorted(path for path in local.rglob("*") if path.is_file())
    return {path.relative_to(local).as_posix(): path.read_text() for path in files}


def fill(folder, **texts):
    for name, text in texts.items():
        storage.write_text(folder / name, text)


def write_and_fail(path):
    path.write_text("new")
    raise KeyError("in the body")


@pytest.fixture
def failing_write(folder, monkeypatch):
    """A function that makes the last step of every write fail."""

    def fail(*_, **__):
        raise OSError("no space left")

    def start():
        if storage.is_local(folder):
            monkeypatch.setattr(os, "replace", fail)
        else:
            for method in ("pipe_file", "put_file", "cp_file"):
                monkeypatch.setattr(paths.filesystem(folder), method, fail)

    return start


# Paths.


def test_a_local_path_is_absolute_with_the_home_folder_expanded(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    assert str(storage.as_path("~/run")) == str(tmp_path / "run")
    assert str(storage.as_path("a/../run")) == str(tmp_path / "run")
    assert str(storage.as_path(pathlib.Path("run"))) == str(tmp_path / "run")
    assert storage.is_local(storage.as_path("run"))


def test_a_bucket_stays_as_it_is():
    pytest.importorskip("gcsfs", reason="needs gcsfs")
    path = storage.as_path("gs://bucket/run/")
    assert str(path) == "gs://bucket/run"
    assert str(path / "a") == "gs://bucket/run/a"
    assert not storage.is_local(path)


@pytest.mark.parametrize(
    ("name", "complaint"),
    [
        ("", "--workdir is empty: name a folder"),
        ("  ", "--workdir is empty"),
        ("gs:/bucket/run", "a bucket begins with gs://"),
        ("gs://", "no bucket is named"),
        ("ftp://host/run", "ftp:// is not supported"),
    ],
)
def test_a_name_that_is_no_path_is_refused_with_its_option(name, complaint):
    with pytest.raises(ValueError, match="--workdir") as error:
        storage.as_path(name, "--workdir")
    assert complaint in str(error.value)


def test_a_bucket_without_its_package_names_the_extra(monkeypatch):
    monkeypatch.setattr(paths.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r"needs gcsfs; pip install 'dpojax\[gcs\]'"):
        storage.as_path("gs://bucket/run")


def test_patterns_match_on_a_disk_and_on_a_bucket_alike(folder):
    fill(folder, **{"a.json": "1", "b.json": "2", "c/d.json": "3", "e.txt": "4"})
    assert storage.matches(folder / "*.json") == [folder / "a.json", folder / "b.json"]
    assert folder / "c/d.json" in storage.matches(folder / "**/*.json")


# Whole files and folders.


def test_a_file_is_written_with_its_folders_and_replaced_as_a_whole(folder):
    for text in ("first", "second, which is longer"):
        storage.write_text(folder / "a" / "b.txt", text)
        assert (folder / "a" / "b.txt").read_text() == text
    assert names(folder / "a") == ["b.txt"]
    storage.write_bytes(folder / "bytes", b"\r\n\xff")
    assert (folder / "bytes").read_bytes() == b"\r\n\xff"


def test_a_write_that_fails_leaves_the_old_file_and_nothing_else(folder, failing_write):
    storage.write_text(folder / "a.txt", "old")
    failing_write()
    with pytest.raises(OSError, match="no space left"):
        storage.write_text(folder / "a.txt", "new")
    with pytest.raises(OSError, match="no space left"), storage.replacing(folder / "a.txt") as file:
        file.write_text("new")
    with pytest.raises(KeyError), storage.replacing(folder / "a.txt") as file:
        write_and_fail(file)
    assert (folder / "a.txt").read_text() == "old"
    assert names(folder) == ["a.txt"]


def test_a_body_that_writes_nothing_is_an_error(folder):
    with (
        pytest.raises(storage.StorageError, match=r"a\.txt: nothing was written"),
        storage.replacing(folder / "a.txt"),
    ):
        pass
    assert names(folder) == []


def test_json_comes_back_and_a_damaged_file_says_what_to_do(folder):
    storage.write_json(folder / "a.json", {"é": [1, 2.5, None]})
    assert (folder / "a.json").read_text().endswith("\n}\n")
    assert storage.read_json(folder / "a.json") == {"é": [1, 2.5, None]}
    for damage in (b'{"a": ', b"\xff\xfe"):
        storage.write_bytes(folder / "a.json", damage)
        with pytest.raises(storage.StorageError, match=r"a\.json: not JSON .*; delete it"):
            storage.read_json(folder / "a.json", "delete it")
    with pytest.raises(FileNotFoundError):
        storage.read_json(folder / "nothing.json")


def test_a_folder_takes_the_place_of_the_old_one_as_a_whole(folder):
    for number in (1, 2):
        with storage.replacing_folder(folder / "model") as unfinished:
            (unfinished / "sub").mkdir()
            (unfinished / "sub" / "weights").write_text(f"weights {number}")
            (unfinished / f"only in {number}").write_text("")
    assert content(folder / "model") == {"only in 2": "", "sub/weights": "weights 2"}
    assert names(folder) == ["model"]


def test_a_folder_whose_body_fails_leaves_the_old_one(folder):
    fill(folder / "model", weights="old")
    for target in ("model", "new"):
        with pytest.raises(KeyError), storage.replacing_folder(folder / target) as unfinished:
            write_and_fail(unfinished / "weights")
    assert content(folder / "model") == {"weights": "old"}
    assert names(folder) == ["model"]


def test_a_folder_whose_last_step_fails_leaves_nothing_new(folder, failing_write):
    fill(folder, other="")
    failing_write()
    with (
        pytest.raises(OSError, match="no space left"),
        storage.replacing_folder(folder / "new") as x,
    ):
        (x / "weights").write_text("new")
    assert names(folder) == ["other"]


def test_a_bucket_gets_a_folders_files_in_the_order_in_which_they_were_written(
    bucket,  # noqa: F811
):
    target = storage.as_path(bucket) / "model"
    with storage.replacing_folder(target) as unfinished:
        for number, name in enumerate(("z", "a", "m")):
            (unfinished / name).write_text("")
            os.utime(unfinished / name, ns=(0, number))
    objects = paths.objects_below(target)
    assert sorted(objects, key=lambda name: paths.modified(objects[name])) == ["z", "a", "m"]


@pytest.mark.parametrize("start", ["disk", "bucket"])
def test_a_shared_folder_is_whole_and_outlives_either_name(folder, start, tmp_path, request):
    source = tmp_path / "source" if start == "disk" else None
    source = source or storage.as_path(request.getfixturevalue("bucket")) / "source"
    fill(source, **{"a": "1", "sub/b": "2", "sub/c.lock": "3"})
    storage.share_folder(source, folder / "target", ignore=("*.lock",))
    storage.share_folder(source, folder / "second")
    storage.remove_folder(folder / "second")
    storage.remove_folder(source)
    assert content(folder / "target") == {"a": "1", "sub/b": "2"}
    assert names(folder) == ["target"]


def test_sharing_does_nothing_where_there_is_no_source_or_already_a_target(folder):
    storage.share_folder(folder / "nothing", folder / "target")
    assert not (folder / "target").exists()
    fill(folder / "source", a="new")
    fill(folder / "target", a="old")
    storage.share_folder(folder / "source", folder / "target")
    assert content(folder / "target") == {"a": "old"}


def test_sharing_that_fails_leaves_nothing(folder, failing_write):
    fill(folder / "source", a="1", b="2")
    failing_write()
    with pytest.raises(OSError, match="no space left"):
        storage.share_folder(folder / "source", folder / "target")
    assert names(folder) == ["source"]


def test_shared_files_are_hard_links_or_copies_where_the_disk_has_none(tmp_path, monkeypatch):
    fill(tmp_path / "source", a="1")
    storage.share_folder(tmp_path / "source", tmp_path / "linked")
    assert (tmp_path / "source/a").samefile(tmp_path / "linked/a")

    def no_links(*_):
        raise OSError("not supported")

    monkeypatch.setattr(os, "link", no_links)
    storage.share_folder(tmp_path / "source", tmp_path / "copied")
    assert not (tmp_path / "source/a").samefile(tmp_path / "copied/a")
    assert content(tmp_path / "copied") == {"a": "1"}


def test_a_removed_folder_is_gone_and_a_missing_one_is_no_error(folder):
    fill(folder, **{"a/b": "", "a/c/d": "", "ab": ""})
    for _ in range(2):
        storage.remove_folder(folder / "a")
    assert names(folder) == ["ab"]


def test_free_space_is_known_of_disks_only(folder):
    free = storage.free_bytes(folder / "not" / "yet")
    assert (free is None) != storage.is_local(folder)


# Locks.

HOLD = """
import sys, time
from dpojax.storage import Locked, lock, locks
locks.REFRESH_SECONDS, locks.STALE_SECONDS, locks.POLL_SECONDS = 0.1, 1e9, 0.1
try:
    with lock(sys.argv[1], "a sweep"):
        print("held", flush=True)
        sys.stdin.readline()
except Locked as error:
    print(error, flush=True)
"""


@pytest.fixture
def quick_locks(monkeypatch):
    """Times for tests; they are seconds."""
    for name, seconds in (("REFRESH", 0.1), ("STALE", 4.0), ("POLL", 0.1)):
        monkeypatch.setattr(locks, f"{name}_SECONDS", seconds)


@contextlib.contextmanager
def other_process(folder):
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    command = [sys.executable, "-c", HOLD, str(folder)]
    process = subprocess.Popen(command, cwd=ROOT, text=True, **pipes)
    try:
        yield process
    finally:
        process.kill()
        process.communicate()


def killed_holder(folder):
    """The id of a process that was killed while it held the lock of a folder."""
    with other_process(folder) as other:
        assert other.stdout.readline() == "held\n"
    return other.pid


def test_one_process_holds_a_lock_and_the_other_is_told_who(folder, quick_locks):
    with other_process(folder) as other:
        assert other.stdout.readline() == "held\n"
        with (
            pytest.raises(storage.Locked, match=rf"a sweep \(process {other.pid} on \w+"),
            storage.lock(folder),
        ):
            pass
        other.communicate("end\n")
    with storage.lock(folder), other_process(folder) as other:
        assert f"in use by process {os.getpid()} on" in other.stdout.readline()
    with storage.lock(folder):  # it was given back
        pass


def test_a_local_lock_ends_with_its_process(tmp_path):
    killed_holder(tmp_path)
    with storage.lock(tmp_path):
        pass


def test_a_buckets_lock_is_waited_for_until_its_holder_is_stale(
    bucket,  # noqa: F811
    quick_locks,
    caplog,
):
    folder = storage.as_path(bucket)
    pid, began = killed_holder(folder), time.monotonic()
    with storage.lock(folder):
        assert time.monotonic() - began > 1.0
        with pytest.raises(storage.Locked), storage.lock(folder):
            pass
    assert names(folder) == []
    ours = [record for record in caplog.records if record.name == locks.logger.name]
    warnings = [record.message for record in ours if str(pid) in record.message]
    assert {record.levelno for record in ours} == {logging.WARNING}
    assert f"in use by a sweep (process {pid} on" in warnings[0]
    assert "s to see whether it is alive" in warnings[0]
    assert "is taken for dead; taking over its lock" in warnings[1]
    assert len(warnings) == 2


def test_a_buckets_lock_that_was_stale_before_is_taken_over_at_once(
    bucket,  # noqa: F811
    quick_locks,
    monkeypatch,
):
    killed_holder(bucket)
    monkeypatch.setattr(locks, "STALE_SECONDS", 0.5)
    time.sleep(0.6)
    monkeypatch.setattr(time, "sleep", None)
    with storage.lock(bucket):
        pass


def test_of_two_that_wait_for_a_dead_holder_one_takes_over_and_the_other_is_told(
    bucket,  # noqa: F811
    quick_locks,
):
    killed_holder(bucket)
    ends, both_tried = [], threading.Barrier(2)

    def hold(name):
        try:
            with storage.lock(bucket, name):
                ends.append(name)
                both_tried.wait(20)
        except storage.Locked as error:
            ends.append(str(error))
            both_tried.wait(20)

    threads = [threading.Thread(target=hold, args=(name,)) for name in ("first", "second")]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    holder, complaint = sorted(ends, key=len)
    assert f"in use by {holder} (process" in complaint


def test_a_lock_that_is_given_back_goes_to_who_waits_for_it(
    bucket,  # noqa: F811
    quick_locks,
    monkeypatch,
):
    monkeypatch.setattr(locks, "REFRESH_SECONDS", 1e9)
    monkeypatch.setattr(locks, "STALE_SECONDS", 1e9)
    held, end = threading.Event(), threading.Event()

    def hold():
        with storage.lock(bucket):
            held.set()
            end.wait(20)

    holder = threading.Thread(target=hold)
    holder.start()
    held.wait(20)
    threading.Timer(0.5, end.set).start()
    with storage.lock(bucket):
        assert end.is_set()
    holder.join()


def test_a_living_holder_keeps_its_lock_fresh(bucket, quick_locks):  # noqa: F811
    with other_process(bucket) as other:
        assert other.stdout.readline() == "held\n"
        time.sleep(4.5)
        with pytest.raises(storage.Locked), storage.lock(bucket):
            pass


def test_no_two_writes_of_a_holder_have_the_same_bytes(bucket, quick_locks):  # noqa: F811
    """The version of an object on S3 is a hash of its bytes."""
    path = storage.as_path(bucket) / ".lock"
    with storage.lock(bucket):
        first = path.read_bytes()
        time.sleep(0.5)
        assert path.read_bytes() != first


def test_a_refresh_whose_reply_is_lost_keeps_the_lock(
    bucket,  # noqa: F811
    quick_locks,
    monkeypatch,
):
    write, left = locks._write_if, ["reply lost", "no network"]

    def failing(*arguments):
        if not left:
            return write(*arguments)
        if left.pop() == "reply lost":
            write(*arguments)
        raise OSError("no network")

    with storage.lock(bucket):
        monkeypatch.setattr(locks, "_write_if", failing)
        time.sleep(1)
        assert storage.lost_locks() == left == []
    assert names(storage.as_path(bucket)) == []


THEIRS = json.dumps({"holder": "another", "id": ""})


@pytest.mark.parametrize("body_error", [None, KeyError("in the body")])
def test_a_holder_that_lost_its_lock_gets_a_sigterm_and_leaves_the_new_one(
    bucket,  # noqa: F811
    quick_locks,
    body_error,
):
    path, stopped = storage.as_path(bucket) / ".lock", threading.Event()

    def lose():
        with storage.lock(bucket):
            storage.write_text(path, THEIRS)
            assert stopped.wait(20)
            assert storage.lost_locks() == [bucket]
            if body_error:
                raise body_error

    before = signal.signal(signal.SIGTERM, lambda *_: stopped.set())
    try:
        with pytest.raises(storage.Locked, match="another process took over") as error:
            lose()
    finally:
        signal.signal(signal.SIGTERM, before)
    assert error.value.__context__ is body_error
    assert storage.lost_locks() == []
    assert path.read_text() == THEIRS


def test_a_process_that_handles_no_sigterm_ends_with_its_lock(bucket):  # noqa: F811
    with other_process(bucket) as other:
        assert other.stdout.readline() == "held\n"
        storage.write_text(storage.as_path(bucket) / ".lock", THEIRS)
        assert other.wait(20) == -signal.SIGTERM


# Content.


def test_a_hash_is_of_names_and_bytes_only(folder, tmp_path):
    fill(folder / "a", **{"x": "1", "sub/y": "2"})
    fill(tmp_path / "b", **{"x": "1", "sub/y": "2"})
    fill(folder / "c", **{"x": "1", "sub/z": "2"})
    same = storage.content_hash(tmp_path / "b")
    assert storage.content_hash(folder / "a") == same
    assert storage.content_hash(folder / "c") != same
    fill(folder / "a", **{".hidden": "", "x.unfinished": "", ".git/x": ""})
    assert storage.content_hash(folder / "a") == same
    fill(folder / "a", x="2")
    assert storage.content_hash(folder / "a") != same
    assert storage.content_hash(folder / "a" / "x") == storage.content_hash(tmp_path / "b/sub/y")
    with pytest.raises(FileNotFoundError):
        storage.content_hash(folder / "nothing")


def test_an_unchanged_file_is_hashed_once(folder, monkeypatch):
    fill(folder, x="1")
    first = storage.content_hash(folder / "x")
    monkeypatch.setattr(contents.hashlib, "sha256", None)
    assert storage.content_hash(folder / "x") == first


def test_a_local_file_is_its_own_copy(tmp_path):
    assert storage.local_copy(tmp_path / "x") == tmp_path / "x"


def test_a_mirror_is_fetched_once_for_each_version(bucket, mirror, monkeypatch):  # noqa: F811
    folder = storage.as_path(bucket) / "data"
    fill(folder, **{"a.npy": "1", "sub/b": "2"})
    fetched = []
    get_file = paths.filesystem(folder).get_file
    monkeypatch.setattr(
        paths.filesystem(folder), "get_file", lambda a, b: (fetched.append(a), get_file(a, b))
    )
    for _ in range(2):
        copy = storage.local_copy(folder / "a.npy")
        assert (copy.name, copy.read_text(), mirror in copy.parents) == ("a.npy", "1", True)
        assert content(folder) == {"a.npy": "1", "sub/b": "2"}
    assert len(fetched) == 3
    fill(folder, **{"a.npy": "3"})
    assert storage.local_copy(folder / "a.npy").read_text() == "3"
    assert copy.read_text() == "1"  # a process may still have the old one mapped
    assert names(storage.local_copy(folder, ["sub/*"])) == ["sub"]
    with pytest.raises(FileNotFoundError):
        storage.local_copy(folder / "nothing")


def test_the_mirror_is_in_the_users_cache_where_nothing_else_is_said(
    bucket,  # noqa: F811
    monkeypatch,
    tmp_path,
):
    monkeypatch.delenv("DPOJAX_MIRROR", raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    fill(storage.as_path(bucket), x="1")
    assert tmp_path / ".cache" / "dpojax" in storage.local_copy(f"{bucket}/x").parents


def test_a_folder_that_another_process_writes_to_is_seen_as_it_is_now(bucket):  # noqa: F811
    folder = storage.as_path(bucket) / "shared"
    assert not folder.exists()
    script = f"from dpojax import storage; storage.write_text({str(folder / 'x')!r}, '1')"
    subprocess.run([sys.executable, "-c", script], cwd=ROOT, check=True)
    assert (names(folder), (folder / "x").read_text()) == (["x"], "1")


# Lines.


def test_lines_are_appended_and_a_torn_one_at_the_end_is_dropped(folder):
    path = folder / "log" / "lines.txt"
    assert storage.read_lines(path) == []
    with storage.LineWriter(path) as writer:
        writer.write("first")
        writer.write("zweité")
    storage.write_bytes(path, path.read_bytes() + b'{"torn')
    assert storage.read_lines(path) == ["first", "zweité"]
    with storage.LineWriter(path) as writer:
        writer.write("third")
        writer.flush()
        assert storage.read_lines(path) == ["first", "zweité", "third"]
    assert path.read_bytes().endswith(b"\nthird\n")
    storage.rewrite_lines(path, lambda line: line != "first")
    assert storage.read_lines(path) == ["zweité", "third"]
    storage.rewrite_lines(folder / "nothing", lambda line: True)
    assert names(folder) == ["log"]


def test_a_line_with_an_end_in_it_and_one_after_the_close_are_refused(folder):
    writer = storage.LineWriter(folder / "x")
    with pytest.raises(ValueError, match="must not hold an end of line"):
        writer.write("a\nb")
    writer.close()
    writer.close()
    with pytest.raises(ValueError, match="is closed"):
        writer.write("a")


def test_a_local_line_is_there_at_once_and_a_buckets_after_a_while(folder, monkeypatch):
    uploads = []
    monkeypatch.setattr(lines, "write_text", lambda *text: uploads.append(files.write_text(*text)))
    with storage.LineWriter(folder / "x") as writer:
        for number in range(100):
            writer.write(str(number))
        if storage.is_local(folder):
            assert len(storage.read_lines(folder / "x")) == 100
        else:
            assert len(uploads) == 1
    assert len(storage.read_lines(folder / "x")) == 100
    assert len(uploads) == (0 if storage.is_local(folder) else 2)


def test_rewriting_that_fails_leaves_all_lines(folder, failing_write):
    storage.write_text(folder / "x", "1\n2\n")
    failing_write()
    with pytest.raises(OSError, match="no space left"):
        storage.rewrite_lines(folder / "x", lambda line: False)
    assert storage.read_lines(folder / "x") == ["1", "2"]


# The one door.

# File: the calls that are right there, and why.
ALLOWED = {
    "frontier/reference_samples.py": {"open", "np.savez"},  # to the file of `storage.replacing`
    "data/examples.py": {"open"},  # in the file that `storage.replacing` gives it
    "models/safetensors_io.py": {"open"},  # reads a header; writes below an unfinished folder
    "training/reference.py": {"np.save"},  # to the file that `storage.replacing` gives it
}
CALLS = {"os.replace", "os.rename", "os.link", "np.save", "np.savez", "numpy.save"}
ANY_METHOD = {"open", "write_text", "write_bytes"}
MODULES = {"shutil", "tempfile"}


def is_text(node):
    return isinstance(node, ast.Constant) and isinstance(node.value, str)


def direct_calls(path):
    """The calls of a file that write, open or move files past storage."""
    for node in ast.walk(ast.parse(path.read_text())):
        if not isinstance(node, ast.Call):
            continue
        called = ast.unparse(node.func)
        module, _, name = called.rpartition(".")
        through_storage = module == "storage" or module.endswith("ipc")  # of pyarrow
        if called in CALLS or module in MODULES:
            yield called
        elif name == "open" and module and node.args and not is_text(node.args[0]):
            continue  # a stage or a reward is opened, and no file
        elif name in ANY_METHOD and not through_storage:
            yield name


def test_files_are_opened_and_written_through_storage_only():
    wrong = {}
    for path in sorted((ROOT / "dpojax").rglob("*.py")):
        relative = path.relative_to(ROOT / "dpojax")
        if relative.parts[0] == "storage":
            continue
        if calls := set(direct_calls(path)) - ALLOWED.get(relative.as_posix(), set()):
            wrong[relative.as_posix()] = sorted(calls)
    assert not wrong


def test_scripts_name_paths_through_storage_only():
    for path in sorted((ROOT / "scripts").glob("*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Import):
                assert {alias.name for alias in node.names}.isdisjoint({"glob", "pathlib"}), path


def test_every_exception_is_still_needed():
    for name, calls in ALLOWED.items():
        assert calls <= set(direct_calls(ROOT / "dpojax" / name)), name


def test_storage_imports_nothing_else_of_dpojax():
    for path in (ROOT / "dpojax" / "storage").glob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("dpojax"):
                assert node.module.startswith("dpojax.storage"), path
