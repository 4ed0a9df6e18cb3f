"""The jobs of a plan in several processes at once, each on a core of its own.

A model that is small enough to be trained on a CPU keeps one core busy, and hardly two: its
products are too small to be shared. Runs that know nothing of each other can be.
"""

from __future__ import annotations

import concurrent.futures
import multiprocessing
import os
import pathlib
import sys
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager

import jax

from dpojax.launch.plan import Clock, Job, shown, stoppable


def default_workers() -> int:
    """One for each core where there are no accelerators, else 1."""
    return len(_cores()) if jax.default_backend() == "cpu" and jax.process_count() == 1 else 1


def carry_out(
    jobs: Sequence[Job],
    folder: pathlib.Path,
    what: str,
    *,
    run: Callable[[str], None],
    workers: int,
) -> None:
    """Do the jobs that are not done, `workers` at a time and none before those that it needs.

    Args:
      run: does the job of a name, in a process that knows nothing of this one; picklable.

    Raises:
      Preempted: after a SIGTERM; what was done is kept.
      ChildProcessError: a job's process was killed.
      what a job raises; the others are stopped first, as by a SIGTERM.
    """
    with shown(jobs, folder, what, workers) as clock, stoppable(what), _pool(workers) as pool:
        running: dict[Future, Job] = {}
        while True:
            for job in _ready(jobs):
                if len(running) < workers and job not in running.values():
                    running[pool.submit(run, job.name)] = job
                    clock.start(job)
            if not running:
                return
            _wait(running, clock, folder)


def _ready(jobs: Sequence[Job]) -> list[Job]:
    """Those that are not done, and need none that is not."""
    missing = {job.name for job in jobs if not job.made.exists()}
    return [job for job in jobs if job.name in missing and missing.isdisjoint(job.needs)]


def _wait(running: dict[Future, Job], clock: Clock, folder: pathlib.Path) -> None:
    """A second, or until a job has ended, which is taken out of those that are running."""
    first = concurrent.futures.FIRST_COMPLETED
    ended, _ = concurrent.futures.wait(running, timeout=1.0, return_when=first)
    for future in ended:
        job = running.pop(future)
        clock.stop(job)
        try:
            future.result()
        except BrokenProcessPool:
            raise ChildProcessError(
                f"{job.name}: a process was killed, perhaps for want of memory (see "
                f"{folder / 'logs'}); the same command goes on, with --workers=1 it needs least"
            ) from None
    if ended or sys.stderr.isatty():
        clock.show()


@contextmanager
def _pool(workers: int) -> Iterator[ProcessPoolExecutor]:
    """Processes on one core each; at the end they are stopped as by a SIGTERM."""
    context = multiprocessing.get_context("spawn")
    cores = context.SimpleQueue()
    for number in range(workers):
        cores.put(_cores()[number % len(_cores())])
    pool = ProcessPoolExecutor(workers, context, initializer=_settle, initargs=(cores,))
    try:
        yield pool
    finally:
        for process in multiprocessing.active_children():
            process.terminate()
        pool.shutdown(cancel_futures=True)


def _settle(cores) -> None:
    """Stay on a core; JAX makes as many threads as it sees."""
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, {cores.get()})


def _cores() -> list[int]:
    if hasattr(os, "sched_getaffinity"):
        return sorted(os.sched_getaffinity(0))
    return list(range(os.cpu_count() or 1))
