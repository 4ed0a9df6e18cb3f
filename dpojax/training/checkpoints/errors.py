"""Errors of checkpoints, each in one paragraph that a user can act on."""

from __future__ import annotations

import contextlib
import logging
import os
import re
from collections.abc import Iterator

# What TensorStore adds to its messages about itself.
_DETAILS = re.compile(r"\s*\[(source locations|tensorstore_spec|os_error_code)=.*", re.DOTALL)
_FULL = re.compile(r"No space left on device|quota exceeded", re.IGNORECASE)


class CheckpointError(RuntimeError):
    """A checkpoint could not be written or read; the message names it and says what to do."""


class Damaged(Exception):
    """A checkpoint's files are not those that were written; the message says which."""


def _only_warnings_of_orbax(record: logging.LogRecord) -> bool:
    return record.levelno == logging.WARNING or f"{os.sep}orbax{os.sep}" not in record.pathname


# Orbax shares absl's one logger with the user's program and writes dozens of INFO lines per save.
# Its errors have the tracebacks of its threads, hundreds of lines; each of them is raised as well.
logging.getLogger("absl").addFilter(_only_warnings_of_orbax)


@contextlib.contextmanager
def explained(what: str) -> Iterator[None]:
    """Turn any error of Orbax or of the disk into a CheckpointError that says what failed."""
    try:
        yield
    except CheckpointError:
        raise
    except Exception as error:
        cause = cause_of(error)
        if _FULL.search(cause):
            cause += "; free some space, and start the same command again: it resumes"
        raise CheckpointError(f"{what}: {cause}") from error


def cause_of(error: BaseException) -> str:
    """The first cause of an error in one line: Orbax wraps it, and TensorStore adds its spec."""
    while error.__cause__ is not None:
        error = error.__cause__
    text = " ".join(_DETAILS.sub("", str(error)).split())
    return f"{type(error).__name__}: {text}"
