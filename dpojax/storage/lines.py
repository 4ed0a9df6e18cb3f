"""Text files that grow by whole lines, such as metrics."""

from __future__ import annotations

import json
import logging
import os
import time
from collections.abc import Callable
from typing import Any, TextIO

from dpojax.storage.files import write_text
from dpojax.storage.paths import Path, PathLike, StorageError, is_local

UPLOAD_SECONDS = 5.0  # between two uploads of a growing file
UPLOAD_SHARE = 0.05  # of a run's time that uploads may take

logger = logging.getLogger(__name__)


class LineWriter:
    """Appends lines to a text file. Only one writer may have a file open.

    A local file has every line as soon as it is written. A bucket cannot append: the lines are
    kept in memory and the whole object is written again, every few seconds and on `close`. A
    process that is killed there loses the lines of the last seconds.

    A line without an end, left by a process that was killed, is removed on opening. Lines survive a
    power failure after `sync` and after `close`.
    """

    def __init__(self, path: PathLike):
        self.path = Path(path)
        self._file: TextIO | None = None
        self._lines: list[str] = []
        self._changed = False
        self._next_upload = 0.0
        self._closed = False
        if is_local(path):
            self.path.parent.mkdir(parents=True, exist_ok=True)
            _remove_torn_line(self.path)
            self._file = open(path, "a", encoding="utf-8")  # noqa: SIM115 (closed by `close`)
        else:
            self._lines = read_lines(path)

    def __enter__(self) -> LineWriter:
        return self

    def __exit__(self, kind, error, traceback) -> None:
        self.close()

    def write(self, line: str) -> None:
        """Append one line, given without its end.

        Raises:
          ValueError: `line` holds an end of line, or the writer is closed.
        """
        if "\n" in line:
            raise ValueError(f"{self.path}: a line must not hold an end of line: {line[:80]!r}")
        if self._closed:
            raise ValueError(f"{self.path}: is closed")
        if self._file is not None:
            self._file.write(line + "\n")
            self._file.flush()
            return
        self._lines.append(line)
        self._changed = True
        if time.monotonic() >= self._next_upload:
            self.flush()

    def flush(self) -> None:
        """Make every line that was written visible to readers."""
        if self._file is not None:
            self._file.flush()
        elif self._changed:
            began = time.monotonic()
            write_text(self.path, "".join(line + "\n" for line in self._lines))
            self._changed = False
            ended = time.monotonic()
            self._next_upload = ended + max(UPLOAD_SECONDS, (ended - began) / UPLOAD_SHARE)

    def sync(self) -> None:
        """Make every line that was written survive a power failure.

        Raises:
          StorageError: the file was deleted since it was opened.
        """
        self.flush()
        if self._file is None:
            return
        if os.fstat(self._file.fileno()).st_nlink == 0:
            raise StorageError(f"{self.path}: was deleted while the run went on; it ends here")
        os.fsync(self._file.fileno())

    def close(self) -> None:
        """Write what is left and close the file; a second call does nothing."""
        if self._closed:
            return
        self._closed = True
        self.flush()
        if self._file is not None:
            os.fsync(self._file.fileno())
            self._file.close()


def read_lines(path: PathLike) -> list[str]:
    """Return the whole lines of a text file, without their ends; [] if there is no file.

    A last line without an end is left out: its writer was stopped in it, or is still writing.
    """
    try:
        data = Path(path).read_bytes()
    except FileNotFoundError:
        return []
    return data.decode(errors="replace").split("\n")[:-1]


def read_records(path: PathLike) -> list[dict[str, Any]]:
    """Return the JSON objects in a file of lines, one for each whole line; [] if there is no file.

    A line that is no JSON object is left out, with a warning that names it.
    """
    records = []
    for number, line in enumerate(read_lines(path), start=1):
        record = _parse(line)
        if record is None:
            logger.warning("%s:%d is damaged and left out: %.60r", path, number, line)
        else:
            records.append(record)
    return records


def rewrite_records(path: PathLike, keep: Callable[[dict[str, Any]], bool]) -> None:
    """Rewrite a file of JSON objects with those for which `keep(record)` is true.

    Damaged lines go, with a warning that names them. A file that would stay the same, or is not
    there, is not touched.
    """
    lines, kept_lines = read_lines(path), []
    for number, line in enumerate(lines, start=1):
        record = _parse(line)
        if record is None:
            logger.warning("%s:%d is damaged and removed: %.60r", path, number, line)
        elif keep(record):
            kept_lines.append(line)
    if len(kept_lines) < len(lines):
        write_text(path, "".join(line + "\n" for line in kept_lines))


def _parse(line: str) -> dict[str, Any] | None:
    """The JSON object in a line; None where there is none."""
    try:
        record = json.loads(line)
    except (ValueError, RecursionError):
        return None
    return record if isinstance(record, dict) else None


def _remove_torn_line(path: Path) -> None:
    """Cut a local file behind its last end of line."""
    if path.exists():
        content = path.read_bytes()
        if not content.endswith(b"\n"):
            os.truncate(path, content.rfind(b"\n") + 1)
