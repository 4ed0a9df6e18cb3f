"""The jobs of a plan in several processes of this machine at once, each on cores of its own.

A model that is small enough to be trained on a CPU keeps one core busy, and hardly two: its
products are too small to be shared. Runs that know nothing of each other can be.
"""

from __future__ import annotations

import concurrent.futures
import contextlib
import multiprocessing
import os
import signal
import sys
import threading
import time
from collections.abc import Collection, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from typing import NoReturn

import jax
from absl import logging

from dpojax import storage
from dpojax.jobs.job import Job, execute_logged, pending
from dpojax.jobs.progress import Clock, shown
from dpojax.stopping import SIGNALS, STOPPED, listening
from dpojax.training.compilation_cache import shared_programs


def default_workers() -> int:
    """One for each core where there are no accelerators, else 1."""
    return len(_cores()) if on_cpu() else 1


def on_cpu() -> bool:
    """Whether several processes can compute here at once."""
    return jax.default_backend() == "cpu" and jax.process_count() == 1


def run_jobs(
    jobs: Sequence[Job],
    folder: storage.Path,
    what: str,
    *,
    workers: int,
    compilation_cache: str = "",
) -> None:
    """Do the jobs that have not ended, `workers` at a time and none before those that it needs.

    Args:
      what: names the plan in the line that shows how far it is.
      compilation_cache: a folder of compiled programs that the processes share.

    Raises:
      Preempted: asked to stop; what was done is kept.
      ChildProcessError: a process was killed.
      what a job raises, unless it has failed by itself; the others are stopped first, as by a
        SIGTERM.
    """
    with shown(jobs, folder, what, workers) as clock, listening(what), _pool(workers) as pool:
        running: dict[Future, Job] = {}
        try:
            while True:
                while len(running) < workers and (job := next_job(jobs, running.values())):
                    with _shielded():
                        future = pool.submit(_execute, job, str(folder), what, compilation_cache)
                    running[future] = job
                    clock.start(job.name)
                if not running:
                    return
                _wait(running, clock)
        except BrokenProcessPool as broken:
            names = ", ".join(clock.started)
            raise ChildProcessError(
                f"a process was killed, perhaps for want of memory, while {names} were under way "
                f"(see {folder / 'logs'}); the same command goes on, with --workers=1 it needs "
                "least"
            ) from broken


def next_job(jobs: Sequence[Job], running: Collection[Job]) -> Job | None:
    """The next job to start: not under way, and all that it needs is done; None if there is none.

    Jobs of a kind share compiled programs on disk. While the first one compiles, jobs of other
    kinds are preferred. Otherwise they go in order.
    """
    to_do = pending(jobs)
    # On a bucket the first files of an output are there before the job has ended.
    missing = {job.name for job in (*to_do, *running)}
    done_kinds = {job.kind_name for job in jobs if job.name not in missing}
    compiling = {job.kind_name for job in running if not job.is_part} - done_kinds
    ready = [job for job in to_do if job not in running and missing.isdisjoint(job.needs)]
    return min(ready, key=lambda job: job.kind_name in compiling, default=None)


def _execute(job: Job, folder: str, what: str, compilation_cache: str) -> None:
    """Do a job in a process of the pool."""
    logging.set_verbosity(logging.WARNING)
    with shared_programs(compilation_cache), listening(what):
        execute_logged(job, storage.as_path(folder))


def _wait(running: dict[Future, Job], clock: Clock) -> None:
    """Wait a second, or until a job has ended; then take it out of those that are running."""
    first = concurrent.futures.FIRST_COMPLETED
    ended, _ = concurrent.futures.wait(running, timeout=1.0, return_when=first)
    for future in ended:
        future.result()
        clock.stop(running.pop(future).name)
    if ended:
        clock.show()


@contextlib.contextmanager
def _pool(workers: int) -> Iterator[ProcessPoolExecutor]:
    """Processes that share the cores; at the end they are stopped as by a SIGTERM."""
    others = set(multiprocessing.active_children())
    context = multiprocessing.get_context("spawn")
    with _shielded():
        shares, cores = context.SimpleQueue(), _cores()
    for number in range(workers):
        shares.put(cores[number::workers] or [cores[number % len(cores)]])
    pool = ProcessPoolExecutor(workers, context, initializer=_settle, initargs=(shares,))
    try:
        yield pool
    finally:
        for process in set(multiprocessing.active_children()) - others:
            process.terminate()
        pool.shutdown(cancel_futures=True)


@contextlib.contextmanager
def _shielded() -> Iterator[None]:
    """Processes that start in the block get no signal of a terminal: the parent ends them.

    Among them is the tracker of `multiprocessing`, which a SIGHUP would kill before its time. A
    signal that comes meanwhile reaches the parent after the block.
    """
    before = signal.pthread_sigmask(signal.SIG_BLOCK, set(SIGNALS) - {signal.SIGTERM})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _settle(shares) -> None:
    """Pin this process to its cores, and end it when the parent process ends.

    JAX makes as many threads as it sees cores.

    A SIGTERM between two jobs unwinds: a process that died at once would take the lock of the
    jobs' queue with it, and the others would wait for that forever.
    """
    signal.signal(signal.SIGTERM, _unwind)
    for number in SIGNALS:
        if number != signal.SIGTERM:  # the parent sees the others, and ends us by a SIGTERM
            signal.signal(number, signal.SIG_IGN)
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, shares.get())
    parent = multiprocessing.parent_process()

    def follow() -> None:
        parent.join()
        while True:  # the first ends a job, another the process
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(5)

    threading.Thread(target=follow, daemon=True).start()


def _unwind(*_: object) -> NoReturn:
    sys.exit(STOPPED)


def _cores() -> list[int]:
    if hasattr(os, "sched_getaffinity"):
        return sorted(os.sched_getaffinity(0))
    return list(range(os.cpu_count() or 1))
