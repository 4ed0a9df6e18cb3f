"""Checksums of files: CRC-32C, which finds every flipped bit and every burst of up to 32 bits.

It is the checksum that Google Cloud Storage keeps of each object, so that nothing has to be
downloaded there. On a disk it costs less than reading the file.
"""

from __future__ import annotations

import base64
import os
import pathlib
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

import google_crc32c

from dpojax.storage.paths import Path, PathLike, StorageError, is_local, objects_below
from dpojax.watchdog import beat

CHUNK = 2**23  # bytes
THREADS = 8  # a network file system answers several faster than one
BYTES = 4  # of a CRC-32C

_checksums: dict[tuple[str, str], Checksum] = {}  # (path, size and time of change): checksum


class Checksum(NamedTuple):
    """The size of a file in bytes, and its CRC-32C in base64, as Google Cloud Storage writes it."""

    size: int
    crc32c: str


def crc32c(data: bytes) -> str:
    """Return the CRC-32C of bytes, in base64."""
    return base64.b64encode(google_crc32c.Checksum(data).digest()).decode()


def file_sizes(folder: PathLike) -> dict[str, int]:
    """Return the size in bytes of each file below a folder, by relative name.

    Files that vanish meanwhile are left out. A folder that is not there has none.
    """
    if not is_local(folder):
        return {name: info["size"] for name, info in objects_below(folder).items()}
    sizes = {}
    for where, _, names in os.walk(folder):
        for name in names:
            path = pathlib.Path(where) / name
            if path.is_file():
                sizes[path.relative_to(folder).as_posix()] = path.stat().st_size
    return sizes


def checksums_of(folder: PathLike, names: Iterable[str]) -> dict[str, Checksum]:
    """Return the checksums of files below a folder, given by relative name.

    Local files are read, unless this process has read them since they last changed.

    Raises:
      FileNotFoundError: one of them is not there.
    """
    names = list(names)
    if is_local(folder):
        with ThreadPoolExecutor(THREADS) as threads:
            paths = [f"{os.fspath(folder)}/{name}" for name in names]
            return dict(zip(names, threads.map(_of_file, paths)))
    objects = objects_below(folder)
    return {name: _of_object(f"{os.fspath(folder)}/{name}", objects.get(name)) for name in names}


def append_checksum(path: PathLike) -> None:
    """Add the CRC-32C of a local file's bytes at its end."""
    digest = _crc32c_of(path, os.path.getsize(path)).digest()
    with open(path, "ab") as file:
        file.write(digest)


def require_checksum(path: PathLike) -> None:
    """Read a local file that `append_checksum` has ended.

    Raises:
      StorageError: its bytes are not those that were written.
    """
    size = os.path.getsize(path) - BYTES
    if size < 0:
        raise StorageError(f"{path}: it is cut short")
    with open(path, "rb") as file:
        file.seek(size)
        if file.read() != _crc32c_of(path, size).digest():
            raise StorageError(f"{path}: its bytes are not those that were written")


def _of_file(path: str) -> Checksum:
    status = os.stat(path)
    key = (path, f"{status.st_mtime_ns} {status.st_size} {status.st_ino}")
    if key not in _checksums:
        total = _crc32c_of(path, status.st_size)
        _checksums[key] = Checksum(status.st_size, base64.b64encode(total.digest()).decode())
    return _checksums[key]


def _crc32c_of(path: PathLike, size: int) -> google_crc32c.Checksum:
    """The CRC-32C of the first `size` bytes of a local file."""
    total = google_crc32c.Checksum()
    with open(path, "rb") as file:
        while chunk := file.read(min(CHUNK, size)):
            total.update(chunk)
            size -= len(chunk)
            beat()
    return total


def _of_object(path: str, info: dict | None) -> Checksum:
    if info is None:
        raise FileNotFoundError(path)
    return Checksum(info["size"], info.get("crc32c") or crc32c(Path(path).read_bytes()))
