"""Rows of JSON files: lines, one array, or one object that holds lists.

Lines and arrays are read record by record. Errors name the file and the line.
"""

from __future__ import annotations

import codecs
import json
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from dpojax import storage
from dpojax.data import records, text_files
from dpojax.data.records import DataError

WHOLE_LIMIT = 256 * 2**20  # bytes of an object of lists, which is read as a whole
BLANK = " \t\r\n"


class _Repeated(ValueError):
    """An object names one key twice."""


def _object_of(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    made = dict(pairs)
    if len(made) < len(pairs):
        names = [name for name, _ in pairs]
        repeated = next(name for name in names if names.count(name) > 1)
        raise _Repeated(f"an object has two values of the key {repeated[:60]!r}; keep one of them")
    return made


_decoder = json.JSONDecoder(object_pairs_hook=_object_of)


def line_rows(file: storage.Path) -> Iterator[tuple[dict, int]]:
    """Yield (row, line number) of JSON lines; blank lines are passed over."""
    for number, line in text_files.lines(file):
        yield _object(_parsed(file, line, number), f"{file}:{number}"), number


def rows(file: storage.Path, split: str | None) -> Iterator[tuple[dict, int]]:
    """Yield (row, number) of a .json file: an array, JSON lines, or an object with a list.

    Args:
      split: which list of an object with several.

    Raises:
      DataError: naming file and line.
    """
    first = _first_byte(file)
    if first == b"[":
        refuse_split(file, split)
        listed = _array(file)
    elif first == b"{" and _is_lines(file):
        refuse_split(file, split)
        yield from line_rows(file)
        return
    else:
        listed = _listed(file, _parsed(file, _whole(file), 1), split) if first else []
    for number, row in enumerate(listed, start=1):
        yield _object(row, f"{file}: record {number}"), number


def refuse_split(file: storage.Path, split: str | None) -> None:
    """Raise DataError where a split is asked of a file that has none."""
    if split:
        raise DataError(f"{file}: has no splits, but split {split!r} was asked for; leave it out")


def choose(splits: Sequence[str] | Mapping[str, Any], split: str | None, name: str) -> str:
    """The name of the split to read: `split`, or without one the only split that there is."""
    if not split and len(splits) == 1:
        return next(iter(splits))
    if not split:
        raise DataError(f"{name}: has the splits {', '.join(splits)}; choose one with split=...")
    if split not in splits:
        raise DataError(f"{name}: has no split {split!r}, only {', '.join(splits)}")
    return split


def _first_byte(file: storage.Path) -> bytes:
    """The first byte that is not blank; b"" if there is none."""
    return next((s[:1] for block in text_files.blocks(file) if (s := block.lstrip())), b"")


def _is_lines(file: storage.Path) -> bool:
    """Whether the first line is an object, and not the only line if it contains lists of rows."""
    filled = text_files.lines(file)
    try:
        number, line = next(filled)
        row = _parsed(file, line, number)
        return isinstance(row, dict) and (not _is_container(row) or next(filled, None) is not None)
    except DataError:
        return False


def _is_container(value: dict) -> bool:
    """Whether an object contains lists of rows, and is not a row itself."""
    try:
        records.detect(value)
    except DataError:
        return bool(_row_lists(value))
    return False


def _whole(file: storage.Path) -> bytes:
    """The bytes of a file that is neither an array nor lines."""
    content = bytearray()
    for block in text_files.blocks(file):
        content += block
        if len(content) > WHOLE_LIMIT:
            raise DataError(
                f"{file}: its first line is no record, and one JSON value of more than "
                f"{WHOLE_LIMIT // 2**20} MiB is not read; write it as JSON lines, a record in each"
            )
    return bytes(content)


def _listed(file: storage.Path, value: Any, split: str | None) -> list:
    """The list of rows in an object such as {"data": [...]} or {"train": [...], "test": [...]}."""
    lists = _row_lists(value) if isinstance(value, dict) else {}
    if not lists:
        keys = sorted(value) if isinstance(value, dict) else type(value).__name__
        raise DataError(f"{file}: expected an array of records or an object with one, got {keys}")
    return lists[choose(lists, split, str(file))]


def _row_lists(value: dict) -> dict[str, list]:
    return {
        name: rows
        for name, rows in value.items()
        if isinstance(rows, list) and all(isinstance(row, dict) for row in rows)
    }


def _object(row: Any, where: str) -> dict:
    if not isinstance(row, dict):
        raise DataError(f"{where}: expected an object with named fields, got {str(row)[:60]!r}")
    return row


def _parsed(file: storage.Path, content: bytes, first_line: int) -> Any:
    """Parse JSON that begins at a line of a file; errors name the line."""
    text = text_files.decoded(file, first_line, content)
    try:
        return _decoder.decode(text.rstrip())
    except (ValueError, RecursionError) as error:
        raise _refused(file, first_line, error) from error


def _refused(file: storage.Path, first_line: int, error: Exception) -> DataError:
    """The error about JSON that begins at `first_line`."""
    if isinstance(error, json.JSONDecodeError):
        line = first_line + error.lineno - 1
        return DataError(f"{file}:{line}: not valid JSON ({error.msg}, column {error.colno})")
    if isinstance(error, RecursionError):
        return DataError(f"{file}:{first_line}: not usable JSON (lists or objects nested too deep)")
    reason = str(error).split(";")[0] if not isinstance(error, _Repeated) else str(error)
    return DataError(f"{file}:{first_line}: not usable JSON ({reason})")


def _array(file: storage.Path) -> Iterator[Any]:
    """Yield the values of one array, which is not held in memory as a whole."""
    text = _Text(file)
    text.next_mark()  # the opening bracket
    if text.peek() == "]":
        text.next_mark()
    else:
        while True:
            yield text.value()
            mark = text.next_mark()
            if mark == "]":
                break
            if mark != ",":
                raise text.error("expected ',' or ']' after a record" if mark else "cut short")
    if text.peek():
        raise text.error("something follows the array")


class _Text:
    """The text of a file, of which a window is in memory."""

    def __init__(self, file: storage.Path) -> None:
        self.file = file
        self.blocks = text_files.blocks(file)
        self.decoder = codecs.getincrementaldecoder("utf-8")()
        self.window, self.place = "", 0
        self.line = 1  # of the window's start
        self.ended = False

    def peek(self) -> str:
        """The next character that is not blank; "" at the end."""
        while True:
            while self.place < len(self.window):
                if self.window[self.place] not in BLANK:
                    return self.window[self.place]
                self.place += 1
            if not self._more():
                return ""

    def next_mark(self) -> str:
        """Pass the next character that is not blank."""
        mark = self.peek()
        self.place += 1
        return mark

    def value(self) -> Any:
        """Pass the next JSON value."""
        self.peek()
        while True:
            try:
                value, self.place = _decoder.raw_decode(self.window, self.place)
                return value
            except json.JSONDecodeError as error:
                refused = _refused(self.file, self.line, error)
                at_end = error.pos > len(self.window) - 16 or error.msg.startswith("Unterminated")
                if not (at_end and self._more()):
                    raise refused from error
            except (ValueError, RecursionError) as error:
                raise _refused(self.file, self._line_here(), error) from error
            if len(self.window) - self.place > text_files.LINE_LIMIT:
                raise text_files.too_long(self.file, self._line_here())

    def error(self, reason: str) -> DataError:
        return DataError(f"{self.file}:{self._line_here()}: not valid JSON ({reason})")

    def _line_here(self) -> int:
        return self.line + self.window.count("\n", 0, self.place)

    def _more(self) -> bool:
        """Drop what was passed, and read on: as much again as there is. False at the end."""
        self.line, self.window = self._line_here(), self.window[self.place :]
        self.place, length = 0, len(self.window)
        added = []
        while not self.ended and sum(map(len, added)) <= length:
            block = next(self.blocks, b"")
            self.ended = not block
            added.append(self._decode(block))
        self.window += "".join(added)
        return len(self.window) > length

    def _decode(self, block: bytes) -> str:
        try:
            return self.decoder.decode(block, final=not block)
        except UnicodeDecodeError as error:
            line = self.line + self.window.count("\n") + block[: error.start].count(b"\n")
            message = f"{self.file}:{line}: not UTF-8 ({error.reason}); convert the file"
            raise DataError(message) from error
