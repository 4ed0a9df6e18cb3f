"""Laws of hashes and local copies, on a disk and on a bucket."""

import pathlib
import subprocess
import sys

import pytest

from dpojax import storage
from dpojax.storage import contents, paths

from .folders import content, fill, names

ROOT = pathlib.Path(__file__).resolve().parents[2]


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


def test_a_mirror_is_fetched_once_for_each_version(bucket, mirror, monkeypatch):
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
    bucket,
    monkeypatch,
    tmp_path,
):
    monkeypatch.delenv("DPOJAX_MIRROR", raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    fill(storage.as_path(bucket), x="1")
    assert tmp_path / ".cache" / "dpojax" in storage.local_copy(f"{bucket}/x").parents


def test_a_folder_that_another_process_writes_to_is_seen_as_it_is_now(bucket):
    folder = storage.as_path(bucket) / "shared"
    assert not folder.exists()
    script = f"from dpojax import storage; storage.write_text({str(folder / 'x')!r}, '1')"
    subprocess.run([sys.executable, "-c", script], cwd=ROOT, check=True)
    assert (names(folder), (folder / "x").read_text()) == (["x"], "1")
