"""Laws of written files and folders, on a disk and on a bucket: whole or nothing."""

import errno
import fcntl
import os
import pathlib
import subprocess
import sys
import time

import pytest

from dpojax import storage
from dpojax.storage import paths

from .folders import content, fill, names, write_and_fail


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
    bucket,
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
    fill(source, **{"a": "1", "sub/b": "2"})
    storage.share_folder(source, folder / "target")
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


KILLED = """
import os, sys
from dpojax import storage
with storage.replacing(sys.argv[1]) as unfinished:
    unfinished.write_text("half")
    print(unfinished, flush=True)
    sys.stdin.read()  # until it is killed
"""


def test_what_a_killed_process_left_is_removed_and_what_a_living_one_writes_is_not(tmp_path):
    (tmp_path / "deep").mkdir()
    for name in ("mine.unfinished", ".4.unfinished", ".x.0123456.unfinished"):
        (tmp_path / name).mkdir()  # of others
    command = [sys.executable, "-c", KILLED, str(tmp_path / "deep" / "file")]
    process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    unfinished = pathlib.Path(process.stdout.readline().strip())
    with storage.replacing(tmp_path / "own") as own:
        own.write_text("whole")
        storage.remove_unfinished(tmp_path)
    assert unfinished.read_text() == "half"
    process.kill()
    process.communicate()
    storage.remove_unfinished(tmp_path)
    assert not list((tmp_path / "deep").iterdir())
    assert (tmp_path / "own").read_text() == "whole"
    assert len(list(tmp_path.iterdir())) == 5


def test_a_write_removes_what_killed_writes_of_the_same_path_left(tmp_path):
    for name in ("model", "other"):
        (tmp_path / f".{name}.01234567.unfinished" / name).mkdir(parents=True)
    with storage.replacing_folder(tmp_path / "model") as living:
        storage.write_text(tmp_path / "model", "whole")
        assert living.is_dir()
        os.unlink(tmp_path / "model")
    assert names(storage.as_path(tmp_path)) == [".other.01234567.unfinished", "model"]


def test_without_locks_only_what_is_a_day_old_is_removed(tmp_path, monkeypatch):
    def no_locks(*_):
        raise OSError(errno.ENOLCK, "no locks")

    monkeypatch.setattr(fcntl, "flock", no_locks)
    for name, age in (("new", 3600), ("old", 90_000)):
        folder = tmp_path / f".{name}.01234567.unfinished"
        folder.mkdir()
        os.utime(folder, (time.time() - age,) * 2)
    storage.write_text(tmp_path / "file", "written")
    storage.remove_unfinished(tmp_path)
    assert names(storage.as_path(tmp_path)) == [".new.01234567.unfinished", "file"]


@pytest.mark.parametrize(
    "content", [b"", b"{", b"null", b"[]", b"3", b"\x80\x00", b'{"a": 1}', b"[" * 100_000]
)
def test_json_of_another_form_is_one_line_that_names_the_file_and_says_what_to_do(
    tmp_path, content
):
    path = tmp_path / "a.json"
    path.write_bytes(content)
    with pytest.raises(storage.StorageError) as error:
        storage.read_json(path, "delete it", fields={"a": str})
    assert str(error.value).startswith(f"{path}: ")
    assert str(error.value).endswith("; delete it")
    assert "\n" not in str(error.value)


def test_a_folder_is_removed_on_a_disk_where_no_other_can_be_made(tmp_path, monkeypatch):
    def full(*_, **__):
        raise OSError(errno.ENOSPC, "No space left on device")

    (tmp_path / "old").mkdir()
    (tmp_path / "old" / "file").write_text("x")
    monkeypatch.setattr(os, "mkdir", full)
    storage.remove_folder(tmp_path / "old")
    assert not list(tmp_path.iterdir())


def test_a_disk_that_fails_once_leaves_nothing_of_a_removed_folder(tmp_path, monkeypatch):
    (tmp_path / "old" / "state").mkdir(parents=True)
    (tmp_path / "old" / "state" / "array").write_bytes(b"1")
    unlink, failures = os.unlink, [OSError(errno.EIO, "the disk")]

    def fails_once(*args, **kwargs):
        if failures:
            raise failures.pop()
        unlink(*args, **kwargs)

    monkeypatch.setattr(os, "unlink", fails_once)
    storage.remove_folder(tmp_path / "old")
    assert not failures
    assert not list(tmp_path.iterdir())
