"""A plan: jobs in order, each done once, with one line that says how far all of them are."""

from __future__ import annotations

import contextlib
import json
import os
import pathlib
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from tqdm import tqdm

from dpojax.training.loop import Preempted

SECONDS = "seconds.json"


class Job(NamedTuple):
    """A step of a plan; it is done once what it makes is there."""

    name: str
    made: pathlib.Path
    make: Callable[[], None]
    kind: str = ""  # jobs of a kind last about as long as each other; "" is a kind of its own


def carry_out(jobs: Sequence[Job], folder: pathlib.Path, what: str) -> None:
    """Do the jobs that are not done. What they print goes to folder/logs, and how long each took,
    also one that was interrupted, to folder/seconds.json.

    Raises:
      Preempted: after a SIGTERM; what was done is kept.
      what a job raises.
    """
    seconds = read_seconds(folder)
    bar = tqdm(total=len(jobs), bar_format="{desc}", dynamic_ncols=True)
    with bar, _stoppable(what):
        for number, job in enumerate(jobs):
            if job.made.exists():
                continue
            began, spent = time.perf_counter(), seconds.get(job.name, 0.0)

            def update(number=number, job=job, began=began, spent=spent) -> None:
                seconds[job.name] = spent + time.perf_counter() - began
                said = progress_line(jobs, seconds, done=number, doing=job)
                bar.set_description_str(f"{what} {said}")

            try:
                with _ticking(update), _quiet(folder / "logs" / f"{job.name}.txt"):
                    job.make()
            finally:
                seconds[job.name] = spent + time.perf_counter() - began
                write_json(folder / SECONDS, seconds)
        bar.set_description_str(f"{what} {len(jobs)}/{len(jobs)} jobs  {_clock(seconds)} passed")


def seconds_left(jobs: Sequence[Job], seconds: Mapping[str, float]) -> float | None:
    """How long the jobs that are not done may still take; None while nothing is known.

    A job is taken to last as those of its kind that are done, on average, or, where there are
    none, as all that are done; what it has taken already is subtracted.

    Args:
      seconds: that each job has taken, by its name.
    """
    found: dict[str, list[float]] = {}
    for job in jobs:
        if job.name in seconds and job.made.exists():
            found.setdefault(_kind(job), []).append(seconds[job.name])
    if not found:
        return None
    mean = lambda values: sum(values) / len(values)
    of_all = mean([x for own in found.values() for x in own])
    expected = {kind: mean(own) for kind, own in found.items()}
    return sum(
        max(0.0, expected.get(_kind(job), of_all) - seconds.get(job.name, 0.0))
        for job in jobs
        if not job.made.exists()
    )


def progress_line(
    jobs: Sequence[Job], seconds: Mapping[str, float], *, done: int, doing: Job
) -> str:
    """`7/30 jobs  ppo_gt-kl-6  4:31 passed, about 9 min left`; of all calls of the plan."""
    left = seconds_left(jobs, seconds)
    known = "" if left is None else f", about {_rounded(left)} left"
    return f"{done}/{len(jobs)} jobs  {doing.name}  {_clock(seconds)} passed{known}"


def read_seconds(folder: pathlib.Path) -> dict[str, float]:
    """What each job of the plan in a folder took, by its name."""
    path = folder / SECONDS
    return json.loads(path.read_text()) if path.exists() else {}


def write_json(path: pathlib.Path, content: Any) -> None:
    """All or nothing."""
    unfinished = path.with_name(f".{path.name}")
    unfinished.write_text(json.dumps(content, indent=2) + "\n")
    os.replace(unfinished, path)


def _kind(job: Job) -> str:
    return job.kind or job.name


def _clock(seconds: Mapping[str, float]) -> str:
    minutes, rest = divmod(int(sum(seconds.values())), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"


def _rounded(seconds: float) -> str:
    """No more digits than an estimate has."""
    if seconds < 90:
        return f"{10 * round(seconds / 10)} s"
    return f"{round(seconds / 60)} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"


@contextlib.contextmanager
def _ticking(update: Callable[[], None]) -> Iterator[None]:
    """Calls `update` at once, and on a terminal every second from beside."""
    update()
    if not sys.stderr.isatty():
        yield
        return
    ended = threading.Event()

    def tick() -> None:
        while not ended.wait(1.0):
            update()

    thread = threading.Thread(target=tick, daemon=True)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()


@contextlib.contextmanager
def _stoppable(what: str) -> Iterator[None]:
    """A SIGTERM raises Preempted wherever no training is under way that would save first."""

    def stop(*_) -> None:
        raise Preempted(f"{what}: stopped, what is done is kept")

    before = signal.signal(signal.SIGTERM, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


@contextlib.contextmanager
def _quiet(log: pathlib.Path) -> Iterator[None]:
    """What a job prints goes into its log; what it raises comes out."""
    log.parent.mkdir(exist_ok=True)
    with open(log, "a") as file, contextlib.redirect_stdout(file), contextlib.redirect_stderr(file):
        yield
