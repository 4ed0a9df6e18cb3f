"""The jobs of a plan in several processes at once, each on cores of its own.

A model that is small enough to be trained on a CPU keeps one core busy, and hardly two: its
products are too small to be shared. Runs that know nothing of each other can be.
"""

from __future__ import annotations

import concurrent.futures
import multiprocessing
import os
import pathlib
import signal
import sys
import threading
import time
from collections.abc import Callable, Collection, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager

import jax

from dpojax.jobs.plan import Clock, Job, kind_of, shown, stoppable


def default_workers() -> int:
    """One for each core where there are no accelerators, else 1."""
    return len(_cores()) if on_cpu() else 1


def on_cpu() -> bool:
    """Whether several processes can compute here at once."""
    return jax.default_backend() == "cpu" and jax.process_count() == 1


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
      ChildProcessError: a process was killed.
      what a job raises; the others are stopped first, as by a SIGTERM.
    """
    with shown(jobs, folder, what, workers) as clock, stoppable(what), _pool(workers) as pool:
        running: dict[Future, Job] = {}
        try:
            while True:
                while len(running) < workers and (job := _next(jobs, running.values())):
                    running[pool.submit(run, job.name)] = job
                    clock.start(job.name)
                if not running:
                    return
                _wait(running, clock)
        except BrokenProcessPool as broken:
            names = ", ".join(clock.doing)
            raise ChildProcessError(
                f"a process was killed, perhaps for want of memory, while {names} were under way "
                f"(see {folder / 'logs'}); the same command goes on, with --workers=1 it needs "
                "least"
            ) from broken


def _next(jobs: Sequence[Job], running: Collection[Job]) -> Job | None:
    """The next to begin: one that is not under way and needs none that is not done; None if there
    is none.

    The first job of a kind compiles what the others of the kind then find on disk, so beside it
    those of another kind go first. Otherwise they go in order.
    """
    missing = {job.name for job in jobs if not job.ended}
    done = {kind_of(job) for job in jobs if job.name not in missing}
    compiling = {kind_of(job) for job in running if not job.part} - done
    ready = [
        job
        for job in jobs
        if job.name in missing and job not in running and missing.isdisjoint(job.needs)
    ]
    return min(ready, key=lambda job: kind_of(job) in compiling, default=None)


def _wait(running: dict[Future, Job], clock: Clock) -> None:
    """A second, or until a job has ended, which is taken out of those that are running."""
    first = concurrent.futures.FIRST_COMPLETED
    ended, _ = concurrent.futures.wait(running, timeout=1.0, return_when=first)
    for future in ended:
        future.result()
        clock.stop(running.pop(future).name)
    if ended or sys.stderr.isatty():
        clock.show()


@contextmanager
def _pool(workers: int) -> Iterator[ProcessPoolExecutor]:
    """Processes that share the cores; at the end they are stopped as by a SIGTERM."""
    others = set(multiprocessing.active_children())
    context = multiprocessing.get_context("spawn")
    shares, own = context.SimpleQueue(), _cores()
    for number in range(workers):
        shares.put(own[number::workers] or [own[number % len(own)]])
    pool = ProcessPoolExecutor(workers, context, initializer=_settle, initargs=(shares,))
    try:
        yield pool
    finally:
        for process in set(multiprocessing.active_children()) - others:
            process.terminate()
        pool.shutdown(cancel_futures=True)


def _settle(shares) -> None:
    """Stay on its cores (JAX makes as many threads as it sees), and end with the parent.

    A SIGTERM between two jobs unwinds: a process that died at once would take the lock of the
    jobs' queue with it, and the others would wait for that forever.
    """
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent's to see, who ends us by a SIGTERM
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, shares.get())
    parent = multiprocessing.parent_process()

    def follow() -> None:
        parent.join()
        while True:  # the first ends a job, another the process
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(5)

    threading.Thread(target=follow, daemon=True).start()


def _cores() -> list[int]:
    if hasattr(os, "sched_getaffinity"):
        return sorted(os.sched_getaffinity(0))
    return list(range(os.cpu_count() or 1))
