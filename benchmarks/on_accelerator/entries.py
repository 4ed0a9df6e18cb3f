"""How a section of `benchmarks/accelerator.py` tells its results: one line of JSON for each.

An entry has a `kind`, by which the table is chosen, `what` it is of, and numbers. Where there is no
number, `left_out` says why.
"""

from __future__ import annotations

import argparse
import json
import time
from typing import Any

MARK = "entry: "


def tell(kind: str, what: str, **numbers: Any) -> None:
    """Print one result."""
    print(MARK + json.dumps({"kind": kind, "what": what, **numbers}), flush=True)


def leave_out(kind: str, what: str, reason: str, **more: Any) -> None:
    """Print why there is no result."""
    tell(kind, what, left_out=reason, **more)


def first_line(error: Exception) -> str:
    """The kind of an error and the first line of its message."""
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0][:300]}" if lines else type(error).__name__


class Section:
    """The arguments of a section, and its clock."""

    def __init__(self, description: str, *positional: str):
        parser = argparse.ArgumentParser(description=description.splitlines()[0])
        for name in positional:
            parser.add_argument(name)
        parser.add_argument("--seconds", type=float, default=60.0, help="that it may take")
        parser.add_argument("--small", action="store_true", help="tiny sizes, for CPUs")
        self.args = parser.parse_args()
        self.ends = time.monotonic() + self.args.seconds

    @property
    def small(self) -> bool:
        return self.args.small

    @property
    def left(self) -> float:
        """Seconds until the section has to end."""
        return self.ends - time.monotonic()
