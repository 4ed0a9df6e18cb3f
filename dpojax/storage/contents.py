"""What files hold: their hashes, and local copies of a bucket's files."""

from __future__ import annotations

import contextlib
import fcntl
import fnmatch
import hashlib
import os
import pathlib
from collections.abc import Iterator, Sequence
from typing import Any

from dpojax.storage.files import download, replacing, replacing_folder
from dpojax.storage.paths import (
    Path,
    PathLike,
    as_path,
    filesystem,
    is_local,
    objects_below,
    version_of,
)
from dpojax.watchdog import beat, unwatched

CHUNK = 2**20  # bytes

_hashes: dict[tuple[str, str], str] = {}  # (path, version): sha256
_recorders: list[dict[str, str]] = []  # of `recorded_hashes`


def content_hash(path: PathLike) -> str:
    """Return the sha256 of a file, or of a folder's files by relative name and bytes.

    Hidden files and folders, and those named `*.unfinished`, are skipped. A file is read again only
    if its version differs: size, inode and time of change of a local file, size and generation or
    ETag of an object.

    Raises:
      FileNotFoundError: nothing is there.
    """
    versions = _versions(path)
    if "" in versions:
        return _hash_file(os.fspath(path), versions[""])
    digest = hashlib.sha256()
    for name in sorted(versions):
        if not any(p.startswith(".") or p.endswith(".unfinished") for p in name.split("/")):
            file_hash = _hash_file(f"{os.fspath(path)}/{name}", versions[name])
            digest.update(f"{name}\0{file_hash}\n".encode())
    return digest.hexdigest()


def local_copy(path: PathLike, patterns: Sequence[str] = ("*",)) -> pathlib.Path:
    """Return a local path with the same content: `path` itself, or a mirror of a bucket's.

    The mirror is in the folder that the environment variable `DPOJAX_MIRROR` names, by default
    `~/.cache/dpojax/mirror`. Each version of a file or folder is downloaded once. Old versions
    stay; the folder may be deleted while no run is active.

    Args:
      patterns: of a folder on a bucket, only the files whose relative names match one of these.

    Raises:
      FileNotFoundError: nothing is there.
    """
    if is_local(path):
        return pathlib.Path(path)
    versions = _versions(path)
    if "" not in versions:
        versions = {
            name: version
            for name, version in versions.items()
            if any(fnmatch.fnmatch(name, pattern) for pattern in patterns)
        }
    version = "\n".join(f"{name} {versions[name]}" for name in sorted(versions))
    folder = _mirror_folder() / _digest(os.fspath(path)) / _digest(version)
    copy = folder / Path(path).name
    folder.mkdir(parents=True, exist_ok=True)
    with unwatched(), _one_at_a_time(folder / ".lock"):
        if copy.exists():
            return copy
        if "" in versions:
            with replacing(copy) as unfinished:
                filesystem(path).get_file(os.fspath(path), str(unfinished))
        else:
            with replacing_folder(copy) as unfinished:
                download(path, unfinished, versions)
    return copy


def _mirror_folder() -> pathlib.Path:
    return pathlib.Path(as_path(os.environ.get("DPOJAX_MIRROR") or "~/.cache/dpojax/mirror"))


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:16]


@contextlib.contextmanager
def _one_at_a_time(lock: pathlib.Path):
    """Let the processes of this host fetch one after the other: the first one downloads."""
    with open(lock, "a") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _versions(path: PathLike) -> dict[str, str]:
    """Versions of the files below a folder by relative name; of a single file by ""."""
    if is_local(path):
        local = pathlib.Path(path)
        if local.is_dir():
            files = [file for file in local.rglob("*") if file.is_file()]
            return {file.relative_to(local).as_posix(): _local_version(file) for file in files}
        return {"": _local_version(local)}
    info: dict[str, Any] = filesystem(path).info(os.fspath(path))
    if info["type"] == "file":
        return {"": version_of(info)}
    return {name: version_of(info) for name, info in objects_below(path).items()}


def _local_version(path: pathlib.Path) -> str:
    status = path.stat()
    return f"{status.st_mtime_ns} {status.st_size} {status.st_ino}"


@contextlib.contextmanager
def recorded_hashes() -> Iterator[dict[str, str]]:
    """Yield a dict that gets path and sha256 of each file that the body asks the hash of."""
    recorded: dict[str, str] = {}
    _recorders.append(recorded)
    try:
        yield recorded
    finally:
        _recorders.remove(recorded)


def _hash_file(path: str, version: str) -> str:
    key = (os.path.abspath(path) if is_local(path) else path, version)
    if key not in _hashes:
        digest = hashlib.sha256()
        with Path(path).open("rb") as file:
            while chunk := file.read(CHUNK):
                digest.update(chunk)
                beat()
        _hashes[key] = digest.hexdigest()
    for recorded in _recorders:
        recorded[key[0]] = _hashes[key]
    return _hashes[key]
