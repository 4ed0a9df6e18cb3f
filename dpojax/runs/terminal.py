"""What a command shows on its terminal, and that it goes on without one."""

from __future__ import annotations

import errno
import logging
import os
import sys
import threading
from collections.abc import Iterable
from typing import Any

from absl import logging as absl_logging

from dpojax import display, stopping

# What asyncio says of a coroutine of a library that is left over when its loop has ended.
LOOP_CLOSED = "Event loop is closed"
GONE = (errno.EPIPE, errno.EIO)  # `train | head` has ended; a terminal was closed


class Lasting:
    """A stream of this process that is dropped, with a word, once its reader is gone."""

    def __init__(self, stream: Any, name: str):
        self._stream, self._name = stream, name

    def write(self, text: str) -> int:
        with display.making_way(text):
            self._try("write", text)
        return len(text)

    def write_below(self, text: str) -> None:
        """Draw the lines of `display`."""
        self._try("write", text)
        self._try("flush")

    def flush(self) -> None:
        self._try("flush")

    def _try(self, method: str, *arguments: str) -> None:
        try:
            getattr(self._stream, method)(*arguments)
        except OSError as error:
            if error.errno not in GONE:
                raise
            nowhere = os.open(os.devnull, os.O_WRONLY)
            os.dup2(nowhere, self._stream.fileno())  # libraries write there, too
            os.close(nowhere)
            stopping.say(f"nobody reads {self._name} any more; the command goes on")

    def writelines(self, lines: Iterable[str]) -> None:
        self.write("".join(lines))

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


class WithoutLibraries(logging.Filter):
    """Drops what libraries log about a failed save; the command tells it in one paragraph."""

    def filter(self, record: logging.LogRecord) -> bool:
        of_orbax = "orbax" in record.pathname
        return not of_orbax and "never retrieved" not in record.getMessage()


def look_after() -> None:
    """Let the command outlive the readers of what it prints, and keep libraries from printing.

    An error of the operating system in a thread of a library (a full disk) is not printed. Whoever
    waits for the thread gets it. A signal that came in a finaliser is not lost.
    """
    if isinstance(sys.stdout, Lasting):
        return  # done already
    sys.stdout = Lasting(sys.stdout or _nowhere(), "standard output")
    sys.stderr = Lasting(sys.stderr or _nowhere(), "standard error")
    for logger in (absl_logging.get_absl_logger(), logging.getLogger("asyncio")):
        logger.addFilter(WithoutLibraries())
    threading.excepthook = _unless_it_follows(threading.excepthook)
    sys.unraisablehook = _unless_it_follows(sys.unraisablehook)


def _nowhere() -> Any:
    """A stream in place of one that was closed before the process began (`2>&-`)."""
    return os.fdopen(os.open(os.devnull, os.O_WRONLY), "w")


def _unless_it_follows(hook: Any) -> Any:
    """A hook for errors that nobody catches, without those that follow from a failed write."""

    def hook_unless_it_follows(args: Any) -> None:
        if issubclass(args.exc_type, stopping.Preempted):
            stopping.dropped()
        elif not issubclass(args.exc_type, OSError) and str(args.exc_value) != LOOP_CLOSED:
            hook(args)

    return hook_unless_it_follows
