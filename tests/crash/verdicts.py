"""What came of a run that was disturbed, in one word."""

from __future__ import annotations

import re
import signal
from typing import NamedTuple

from tests.crash.harness import Ended, Snapshot

TERMINAL_LINES = 15  # that an error may print
# Good: the same result, and where a file was damaged also: it is named, or it is the only one that
# differs, since nothing reads it any more.
GOOD = ("same", "noticed", "unread")
BAD = ("refused", "different", "leftovers", "traceback", "noisy", "hung")


class Verdict(NamedTuple):
    """What came of a trial. kind: one of GOOD or BAD. detail: a line for a person."""

    kind: str
    detail: str = ""

    @property
    def is_good(self) -> bool:
        return self.kind in GOOD


SAME = Verdict("same")


def complaint(ended: Ended) -> Verdict | None:
    """What is wrong with a call that nobody killed, whether it failed or not; None: nothing."""
    if ended.survivors:
        return Verdict("hung", f"{len(ended.survivors)} processes outlived the run")
    if ended.hung:
        return Verdict("hung", f"after {ended.seconds:.0f} s: {_end(ended.errors, 60)}")
    died = ended.status < 0 and ended.status != -signal.SIGKILL
    if died or "Traceback (most recent call last)" in ended.errors:
        return Verdict("traceback", f"status {ended.status}: {_end(ended.errors, 6)}")
    lines = [line for line in ended.errors.splitlines() if line.strip()]
    if len(lines) > TERMINAL_LINES:
        return Verdict("noisy", f"{len(lines)} lines: {' | '.join(lines[:3])} ... {lines[-1]}")
    return None


def judge(ended: Ended, left: Snapshot, expected: Snapshot) -> Verdict:
    """What came of a call that is to end as if nothing had ever disturbed the run."""
    if bad := complaint(ended):
        return bad
    if ended.status != 0:
        return Verdict("refused", f"status {ended.status}: {_end(ended.errors)}")
    return compare(left, expected)


def judge_damaged(ended: Ended, left: Snapshot, expected: Snapshot, damaged: str) -> Verdict:
    """What came of a call that found a damaged file.

    Args:
      damaged: its name below the folder of the snapshots.
    """
    if bad := complaint(ended):
        return bad
    said = ended.errors + ended.printed
    names = [damaged, *re.findall(r".*/(?:checkpoints|reference)/\d+(?=/)", damaged)]
    is_named = any(name.removeprefix("run/") in said for name in names)
    if ended.status != 0:
        return Verdict("noticed" if is_named else "refused", _end(ended.errors))
    # A run that fell back to an earlier checkpoint may keep fewer of the older ones.
    last = {name: what for name, what in expected.items() if name in left or not _is_older(name)}
    found = compare(left, last)
    if found.kind == "same":
        return Verdict("noticed", _end(ended.errors)) if is_named and ended.errors else SAME
    differ = {name for name in {*left, *last} if left.get(name, ...) != last.get(name, ...)}
    if all(f"{damaged}/".startswith(f"{name}/") for name in differ):
        return Verdict("unread")
    return found


def compare(left: Snapshot, expected: Snapshot) -> Verdict:
    """Whether two runs have left the same."""
    differ = [name for name in expected if name in left and left[name] != expected[name]]
    if differ:
        return Verdict("different", f"{_difference(left, expected, differ[0])}; of {differ}")
    if missing := sorted(expected.keys() - left.keys()):
        return Verdict("different", f"missing: {missing}")
    if extra := sorted(left.keys() - expected.keys()):
        return Verdict("leftovers", f"{extra}")
    return SAME


def _is_older(name: str) -> bool:
    """Whether a name is of a checkpoint that is not the last of the small run's stages."""
    return (
        re.search(r"(sft/checkpoints/[123]|preference/checkpoints/[12345])(/|$)", name) is not None
    )


def _difference(left: Snapshot, expected: Snapshot, name: str) -> str:
    """The first difference of a file, for a person."""
    ours, theirs = left[name], expected[name]
    if isinstance(ours, list) and isinstance(theirs, list):
        if len(ours) != len(theirs):
            return f"{name}: {len(ours)} lines for {len(theirs)}"
        for number, (one, other) in enumerate(zip(ours, theirs), start=1):
            if one != other and isinstance(one, dict) and isinstance(other, dict):
                keys = [key for key in one.keys() | other.keys() if one.get(key) != other.get(key)]
                return f"{name}, line {number}: {sorted(keys)}"
    return name


def _end(text: str, count: int = 3) -> str:
    """The last lines that a process said, for a person."""
    return " | ".join(text.strip().splitlines()[-count:])[-3_000:]
