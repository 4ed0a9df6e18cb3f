"""Lines of local text files, compressed or not, read with limits: no file fills the memory.

A file is read block by block. What comes out of a compressed block is read block by block as well,
so that a small file that expands to many gigabytes costs time alone.
"""

from __future__ import annotations

import bz2
import contextlib
import gzip
import lzma
import os
import zlib
from collections.abc import Callable, Iterator
from typing import IO

from dpojax import storage
from dpojax.data.records import DataError
from dpojax.watchdog import beat

BLOCK = 2**20  # bytes that are read at once
LINE_LIMIT = 64 * 2**20  # bytes of one line, or of one record of a JSON array
UTF8_MARK, UTF16_MARKS = b"\xef\xbb\xbf", (b"\xff\xfe", b"\xfe\xff")
DAMAGED = (OSError, EOFError, zlib.error, lzma.LZMAError)


def _open_zstd(path: str) -> IO[bytes]:
    import pyarrow as pa

    return pa.CompressedInputStream(pa.OSFile(path), "zstd")


OPENERS: dict[str, Callable[[str], IO[bytes]]] = {
    ".gz": gzip.open,
    ".bz2": bz2.open,
    ".xz": lzma.open,
    ".zst": _open_zstd,
}


@contextlib.contextmanager
def opened(file: storage.Path) -> Iterator[IO[bytes]]:
    """Open a regular file to read its bytes, decompressed as its name says.

    Raises:
      DataError: it is no regular file, or cannot be opened.
    """
    require_regular(file)
    opener = OPENERS.get(file.suffix)
    try:
        local = str(storage.local_copy(file))
        stream = opener(local) if opener else open(local, "rb")  # noqa: SIM115 (closed below)
    except DAMAGED as error:
        raise DataError(f"{file}: cannot be read: {_reason(error)}") from error
    with stream:
        yield stream


def require_regular(file: storage.Path) -> None:
    """Raise DataError for pipes, devices and sockets, which may have no end or block for ever."""
    regular = os.path.isfile(file) if storage.is_local(file) else file.is_file()
    if not regular:
        raise DataError(
            f"{file}: is no regular file; data are read more than once, so copy them into a file"
        )


def blocks(file: storage.Path) -> Iterator[bytes]:
    """Yield the bytes of a file in blocks, decompressed and without a byte order mark.

    Raises:
      DataError: the file cannot be read, is damaged or cut short, or is UTF-16; with the line.
    """
    line = 1
    with opened(file) as stream:
        # read1 gives what comes before the damage; read would keep it.
        read = getattr(stream, "read1", stream.read)
        while True:
            try:
                block = read(BLOCK)
            except DAMAGED as error:
                reason = _reason(error)
                raise DataError(f"{file}:{line}: cannot be read from here on: {reason}") from error
            beat("data are read")
            if not block:
                return
            if line == 1 and block.startswith(UTF16_MARKS):
                raise DataError(f"{file}:1: is UTF-16 or UTF-32 text; convert the file to UTF-8")
            yield block.removeprefix(UTF8_MARK) if line == 1 else block
            line += block.count(b"\n")


def lines(file: storage.Path, *, blank: bool = False) -> Iterator[tuple[int, bytes]]:
    """Yield (number, line) for every line, numbered from 1, without the newline at its end.

    The bytes are split, not the text: str.splitlines also splits at U+2028 inside a JSON string.

    Args:
      blank: yield lines without text as well.

    Raises:
      DataError: see `blocks`; also for a line of more than LINE_LIMIT bytes.
    """
    number, begun, length = 1, [], 0  # pieces of a line that has not ended, and their bytes
    for block in blocks(file):
        if b"\n" not in block:
            begun.append(block)
            length += len(block)
        elif not (blank or begun or block.strip()):  # a small file may expand to billions of them
            number += block.count(b"\n")
        else:
            *whole, last = b"".join([*begun, block]).split(b"\n")
            for line in whole:
                if blank or line.strip():
                    yield number, line
                number += 1
            begun, length = [last], len(last)
        if length > LINE_LIMIT:
            raise too_long(file, number)
    if line := b"".join(begun):
        yield number, line


def too_long(file: storage.Path, line: int) -> DataError:
    """The error about a record without an end."""
    return DataError(
        f"{file}:{line}: a record of more than {LINE_LIMIT // 2**20} MiB; is every record on a "
        "line of its own, and is this the right file?"
    )


def decoded(file: storage.Path, number: int, line: bytes) -> str:
    """The text of bytes that begin at line `number` of a file.

    Raises:
      DataError: they are not UTF-8, or hold NUL bytes; with the line.
    """
    if b"\0" in line:
        number += line[: line.index(b"\0")].count(b"\n")
        raise DataError(
            f"{file}:{number}: holds NUL bytes: the file is damaged, or it is UTF-16; repair it, "
            "or convert it to UTF-8"
        )
    try:
        return line.decode("utf-8")
    except UnicodeDecodeError as error:
        number += line[: error.start].count(b"\n")
        raise DataError(f"{file}:{number}: not UTF-8 ({error.reason}); convert the file") from error


def _reason(error: Exception) -> str:
    """What went wrong, without the path, which stands in the message already."""
    return error.strerror if isinstance(error, OSError) and error.strerror else str(error)
