"""Ends a run that makes no progress: prints the stacks of all threads, and frees the devices."""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Iterator

from dpojax import stopping

MINUTES = 30.0  # without progress, after which a command ends by default
HUNG = 1  # the status of a run that was ended for making no progress
MOST_TICKS = 20  # how often a limit is looked at while it passes


class _Progress:
    """What the run of this process does, and how often it has got on."""

    beats = 0
    doing = "the run began"
    since = time.monotonic()  # when that began
    unwatched = 0  # how many `unwatched` blocks are entered
    ends: dict[object, float] = {}  # noqa: RUF012 (of the blocks of `taking_up_to`, monotonic)


def beat(doing: str = "") -> None:
    """Say that the run has got on.

    Args:
      doing: names what it does next, for the message; "" goes on with the same.
    """
    _Progress.beats += 1
    if doing and doing != _Progress.doing:
        _Progress.doing, _Progress.since = doing, time.monotonic()


def doing() -> tuple[str, float]:
    """What the run does, as `beat` has named it, and when that began (monotonic)."""
    return _Progress.doing, _Progress.since


@contextlib.contextmanager
def unwatched() -> Iterator[None]:
    """Let the block take any time: of a download, nothing tells how far it is."""
    _Progress.unwatched += 1
    try:
        yield
    finally:
        _Progress.unwatched -= 1
        beat()


@contextlib.contextmanager
def taking_up_to(seconds: float) -> Iterator[None]:
    """Let the block take so long: it ends by itself then, as a request with a timeout does.

    Threads may enter such blocks side by side.
    """
    block = object()
    _Progress.ends[block] = time.monotonic() + seconds
    try:
        yield
    finally:
        del _Progress.ends[block]


@contextlib.contextmanager
def watching(minutes: float) -> Iterator[None]:
    """End the process if no `beat` comes for `minutes` while the block runs; 0 never does.

    Time in which the process was suspended (Ctrl-Z) does not count.
    """
    ended = threading.Event()
    if minutes > 0:
        beat()
        watch = threading.Thread(
            target=_watch, args=(minutes * 60, ended), daemon=True, name="watchdog"
        )
        watch.start()
    try:
        yield
    finally:
        ended.set()


def _watch(limit: float, ended: threading.Event) -> None:
    tick = limit / MOST_TICKS
    beats, idle, before = _Progress.beats, 0.0, time.monotonic()
    while not ended.wait(tick):
        now = time.monotonic()
        idle += min(now - before, 2 * tick)
        before = now
        if beats != _Progress.beats:
            beats, idle = _Progress.beats, 0.0
        elif _Progress.unwatched or any(now < end for end in list(_Progress.ends.values())):
            idle = 0.0
        elif idle >= limit:
            stopping.end_now(
                HUNG,
                f"No progress for {limit / 60:.3g} minutes (hang_minutes) while: "
                f"{_Progress.doing}. The process ends, so that its devices are free; what it has "
                f"saved is complete, and {stopping.GO_ON}. The stacks of its threads:",
                why=f"has made no progress for {limit / 60:.3g} minutes",
                stacks=True,
            )
