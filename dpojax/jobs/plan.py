"""A plan: jobs, each done once, with one line that says how far all of them are.

They are done one after another in this process, or several at a time in processes of their own
(`jobs.local_workers`).
"""

from __future__ import annotations

import contextlib
import json
import os
import pathlib
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from tqdm import tqdm

from dpojax.training.loop import Preempted

SECONDS = "seconds.json"


class Job(NamedTuple):
    """A step of a plan; it has ended once what it makes is there, or what says that it failed."""

    name: str
    made: pathlib.Path
    make: Callable[[], None]
    kind: str = ""  # jobs of a kind last equally long and compile the same; "": of its own kind
    needs: tuple[str, ...] = ()  # the names of those before it that have to be done
    part: bool = False  # of a job that was cut so that several can be done at once
    failed: pathlib.Path | None = None  # where the others go on without it; it is not tried again

    @property
    def ended(self) -> bool:
        return self.made.exists() or (self.failed is not None and self.failed.exists())


def carry_out(jobs: Sequence[Job], folder: pathlib.Path, what: str) -> None:
    """Do the jobs that have not ended, in order. What they print goes to folder/logs, and how long
    each took, also one that was interrupted, to folder/seconds.json.

    Raises:
      Preempted: after a SIGTERM; what was done is kept.
      what a job raises.
    """
    with shown(jobs, folder, what) as clock, stoppable(what):
        for job in jobs:
            if not job.ended:
                clock.start(job.name)
                with _ticking(clock.show):
                    do(job, folder)
                clock.stop(job.name)


def do(job: Job, folder: pathlib.Path) -> None:
    """What the job prints goes into its log; what it raises comes out, and goes there too."""
    log = folder / "logs" / f"{job.name}.txt"
    log.parent.mkdir(exist_ok=True)
    with open(log, "a") as file, contextlib.redirect_stdout(file), contextlib.redirect_stderr(file):
        try:
            job.make()
        except BaseException:
            traceback.print_exc()
            raise


class Seconds(NamedTuple):
    """How long a plan took, over all calls of its command."""

    passed: float  # on the wall
    jobs: dict[str, float]  # each of them


class Clock:
    """The seconds of a plan and the line that tells of them.

    Args:
      workers: jobs that are done at a time.
      show: gets the line.
    """

    def __init__(
        self,
        jobs: Sequence[Job],
        folder: pathlib.Path,
        workers: int,
        show: Callable[[str], None],
    ):
        self.jobs, self.folder, self.workers, self._show = jobs, folder, workers, show
        self.before, self.seconds = read_seconds(folder)
        self.doing: dict[str, float] = {}  # when it began
        self.began = time.perf_counter()

    def start(self, name: str) -> None:
        self.doing[name] = time.perf_counter()
        self.show()

    def stop(self, name: str) -> None:
        spent = time.perf_counter() - self.doing.pop(name)
        self.seconds[name] = self.seconds.get(name, 0.0) + spent
        write_json(self.folder / SECONDS, Seconds(self.passed, self.seconds)._asdict())

    @property
    def passed(self) -> float:
        return self.before + time.perf_counter() - self.began

    def now(self) -> dict[str, float]:
        """Those of the jobs under way up to now, too."""
        spent = {name: time.perf_counter() - began for name, began in self.doing.items()}
        return self.seconds | {name: self.seconds.get(name, 0) + x for name, x in spent.items()}

    def show(self) -> None:
        seconds = Seconds(self.passed, self.now())
        self._show(progress_line(self.jobs, seconds, doing=[*self.doing], workers=self.workers))


@contextlib.contextmanager
def shown(
    jobs: Sequence[Job], folder: pathlib.Path, what: str, workers: int = 1
) -> Iterator[Clock]:
    """A clock, and a line on the terminal as long as it is entered; at the end it stops for all
    jobs that are still under way."""
    with tqdm(total=len(jobs), bar_format="{desc}", dynamic_ncols=True) as bar:
        clock = Clock(jobs, folder, workers, lambda said: bar.set_description_str(f"{what} {said}"))
        try:
            yield clock
        finally:
            for name in [*clock.doing]:
                clock.stop(name)
        clock.show()


def seconds_left(
    jobs: Sequence[Job], seconds: Mapping[str, float], workers: int = 1
) -> float | None:
    """How long the jobs that are not done may still take; None while nothing is known.

    A job is taken to last as those of its kind that are done, on average, or, where there are
    none, as all that are done; what it has taken already is subtracted. Of several at a time the
    longest sets the least.

    Args:
      seconds: that each job has taken, by its name.
    """
    found: dict[str, list[float]] = {}
    for job in jobs:
        if job.name in seconds and job.ended:
            found.setdefault(kind_of(job), []).append(seconds[job.name])
    if not found:
        return None
    mean = lambda values: sum(values) / len(values)
    of_all = mean([x for own in found.values() for x in own])
    expected = {kind: mean(own) for kind, own in found.items()}
    each = [
        max(0.0, expected.get(kind_of(job), of_all) - seconds.get(job.name, 0.0))
        for job in jobs
        if not job.ended
    ]
    return max(sum(each) / workers, max(each, default=0.0))


def progress_line(
    jobs: Sequence[Job], seconds: Seconds, *, doing: Sequence[str], workers: int = 1
) -> str:
    """`7/30 jobs  ppo_gt-kl-6  4:31 passed, about 9 min left`."""
    done = sum(job.ended for job in jobs)
    left = seconds_left(jobs, seconds.jobs, workers)
    known = f", about {_rounded(left)} left" if left else ""
    names = "".join(f"  {name}" for name in doing)
    return f"{done}/{len(jobs)} jobs{names}  {_clock(seconds.passed)} passed{known}"


def read_seconds(folder: pathlib.Path) -> Seconds:
    """How long the plan in a folder took so far."""
    path = folder / SECONDS
    return Seconds(**json.loads(path.read_text())) if path.exists() else Seconds(0.0, {})


def write_json(path: pathlib.Path, content: Any) -> None:
    """All or nothing."""
    unfinished = path.with_name(f".{path.name}")
    unfinished.write_text(json.dumps(content, indent=2) + "\n")
    os.replace(unfinished, path)


def kind_of(job: Job) -> str:
    """The kind's name, also of a job that is alone in its kind."""
    return job.kind or job.name


def _clock(seconds: float) -> str:
    minutes, rest = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"


def _rounded(seconds: float) -> str:
    """No more digits than an estimate has."""
    if seconds < 90:
        return f"{max(10, 10 * round(seconds / 10))} s"
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
def stoppable(what: str) -> Iterator[None]:
    """A SIGTERM raises Preempted wherever no training is under way that would save first."""

    def stop(*_) -> None:
        raise Preempted(f"{what}: stopped, what is done is kept")

    before = signal.signal(signal.SIGTERM, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
