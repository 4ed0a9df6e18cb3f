"""Jobs one after another in this process."""

from __future__ import annotations

from collections.abc import Sequence

import jax

from dpojax import sharding, storage
from dpojax.jobs.job import Job, execute, execute_logged, pending
from dpojax.jobs.progress import shown
from dpojax.stopping import listening

NONE_LEFT = -1


def run_jobs(jobs: Sequence[Job], folder: storage.Path, what: str) -> None:
    """Do the jobs that have not ended, in order.

    What they print goes to folder/logs, and how long each took to folder/seconds.json, also where
    it was interrupted.

    Args:
      what: names the plan in the line that shows how far it is.

    Raises:
      Preempted: asked to stop; what was done is kept.
      what a job raises, unless it has failed by itself: then the others go on.
    """
    with shown(jobs, folder, what) as clock, listening(what):
        while to_do := pending(jobs):
            job = to_do[0]
            clock.start(job.name)
            execute_logged(job, folder)
            clock.stop(job.name)


def run_jobs_in_terminal(jobs: Sequence[Job]) -> None:
    """Do the jobs that have not ended, in order; what they print stays on the terminal.

    In a run of several processes every process makes this call, and the first one says which job is
    next.

    Raises:
      what a job raises. In one process the others go on where it has failed by itself. Of several
        processes, one that has raised could not agree with the others on going on.
      RuntimeError: a job has returned and neither its outputs nor its failure files are there.
    """
    last = NONE_LEFT
    while (index := sharding.agreed(_next(jobs))) != NONE_LEFT:
        if index == last:
            raise RuntimeError(f"job {jobs[index].name}: its command ended without its outputs")
        try:
            execute(jobs[index])
        except Exception:
            if jax.process_count() > 1 or not jobs[index].has_failed:
                raise
        last = index


def _next(jobs: Sequence[Job]) -> int:
    """The index of the first job that has not ended."""
    to_do = pending(jobs)
    return list(jobs).index(to_do[0]) if to_do else NONE_LEFT
