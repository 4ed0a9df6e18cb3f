"""How far a plan is: one line on the terminal, and the seconds that its jobs took."""

from __future__ import annotations

import contextlib
import logging
import time
from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple

from dpojax import display, storage
from dpojax.jobs.job import Job, pending

SECONDS = "seconds.json"

logger = logging.getLogger(__name__)


class Seconds(NamedTuple):
    """How long a plan took, over all calls of its command."""

    passed: float  # on the wall
    jobs: dict[str, float]  # of each job, by name


class Clock:
    """Measures the jobs of a plan, and shows how far the plan is.

    Args:
      workers: jobs that are done at a time.
      what: names the plan in the line that shows how far it is.
    """

    def __init__(
        self,
        jobs: Sequence[Job],
        folder: storage.Path,
        workers: int,
        what: str,
    ):
        self.jobs, self.folder, self.workers, self.what = jobs, folder, workers, what
        self.before, self.seconds = read_seconds(folder)
        self.started: dict[str, float] = {}  # jobs under way, and when each began
        self.began = time.perf_counter()
        self.to_do = pending(jobs)

    def start(self, name: str) -> None:
        self.started[name] = time.perf_counter()
        self.to_do = pending(self.jobs)  # asked here and in `stop`, since a bucket answers slowly
        self.show()

    def stop(self, name: str) -> None:
        spent = time.perf_counter() - self.started.pop(name)
        self.seconds[name] = self.seconds.get(name, 0.0) + spent
        self.to_do = pending(self.jobs)
        storage.write_json(self.folder / SECONDS, Seconds(self.passed, self.seconds)._asdict())

    @property
    def passed(self) -> float:
        return self.before + time.perf_counter() - self.began

    def now(self) -> dict[str, float]:
        """The seconds of each job so far, those under way included."""
        seconds = dict(self.seconds)
        for name, began in dict(self.started).items():
            seconds[name] = seconds.get(name, 0.0) + time.perf_counter() - began
        return seconds

    def line(self) -> str:
        """How far the plan is."""
        seconds, running = Seconds(self.passed, self.now()), [*self.started]
        line = progress_line(self.jobs, seconds, self.to_do, running=running, workers=self.workers)
        return f"{self.what} {line}"

    def show(self) -> None:
        """Print the line where no terminal draws it."""
        if not display.draws():
            display.complain(self.line())


@contextlib.contextmanager
def shown(
    jobs: Sequence[Job], folder: storage.Path, what: str, workers: int = 1
) -> Iterator[Clock]:
    """A clock, whose line stands on the terminal as long as it is entered.

    At the end the clock stops for all jobs that are still under way.
    """
    clock = Clock(jobs, folder, workers, what)
    with display.line(clock.line):
        try:
            yield clock
        finally:
            for name in [*clock.started]:
                clock.stop(name)
    display.complain(clock.line())


def seconds_left(
    jobs: Sequence[Job],
    seconds: Mapping[str, float],
    to_do: Sequence[Job],
    *,
    workers: int,
) -> float | None:
    """How long the jobs that are not done may still take; None while nothing is known.

    A job is taken to last as long as the done jobs of its kind on average, or, where there are
    none, as long as all done jobs on average. What it has taken already is subtracted. With several
    workers, the estimate is at least the time of the longest job.

    Args:
      seconds: that each job has taken, by its name.
      to_do: the jobs that are not done, see `pending`.
    """
    names = {job.name for job in to_do}
    by_kind: dict[str, list[float]] = {}
    for job in jobs:
        if job.name in seconds and job.name not in names:
            by_kind.setdefault(job.kind_name, []).append(seconds[job.name])
    if not by_kind:
        return None
    mean_of_all = _mean([x for values in by_kind.values() for x in values])
    expected = {kind: _mean(values) for kind, values in by_kind.items()}
    left = [
        max(0.0, expected.get(job.kind_name, mean_of_all) - seconds.get(job.name, 0.0))
        for job in to_do
    ]
    return max(sum(left) / workers, max(left, default=0.0))


def progress_line(
    jobs: Sequence[Job],
    seconds: Seconds,
    to_do: Sequence[Job],
    *,
    running: Sequence[str],
    workers: int,
) -> str:
    """`7/30 jobs  ppo_gt-kl-6  4:31 passed, about 9 min left`."""
    ended = len(jobs) - len(to_do)
    left = seconds_left(jobs, seconds.jobs, to_do, workers=workers)
    forecast = f", about {_rounded(left)} left" if left else ""
    names = "".join(f"  {name}" for name in running)
    return f"{ended}/{len(jobs)} jobs{names}  {display.clock(seconds.passed)} passed{forecast}"


def read_seconds(folder: storage.Path) -> Seconds:
    """How long the plan in a folder took so far."""
    path = folder / SECONDS
    nothing = Seconds(0.0, {})
    if not path.exists():
        return nothing
    try:
        content = storage.read_json(path, fields={"passed": float, "jobs": dict})
        return Seconds(content["passed"], {name: float(x) for name, x in content["jobs"].items()})
    except (ValueError, TypeError) as error:  # only a record, which grows again
        logger.warning("%s; the time is counted anew", error)
        return nothing


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


def _rounded(seconds: float) -> str:
    """No more digits than an estimate has."""
    if seconds < 90:
        return f"{max(10, 10 * round(seconds / 10))} s"
    return f"{round(seconds / 60)} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"
