"""Jobs one after another in this process."""

from __future__ import annotations

from collections.abc import Sequence

from dpojax import sharding, storage
from dpojax.jobs.job import Job, execute, execute_logged, pending, stoppable
from dpojax.jobs.progress import shown, ticking


def run_jobs(jobs: Sequence[Job], folder: storage.Path, what: str) -> None:
    """Does the jobs that have not ended, in order.

    What they print goes to folder/logs, and how long each took to folder/seconds.json, also where
    it was interrupted.

    Args:
      what: names the plan in the line that shows how far it is.

    Raises:
      Preempted: after a SIGTERM; what was done is kept.
      what a job raises, unless it has a failure file: then the others go on.
    """
    with shown(jobs, folder, what) as clock, stoppable(what):
        while to_do := pending(jobs):
            job = to_do[0]
            clock.start(job.name)
            with ticking(clock.show):
                execute_logged(job, folder)
            clock.stop(job.name)


def run_jobs_aloud(jobs: Sequence[Job]) -> None:
    """Does the jobs that have not ended, in order; what they print stays on the terminal.

    In a run of several processes every process makes this call, and the first one says which jobs
    have ended.

    Raises:
      what a job raises, unless it has a failure file: then the others go on.
    """
    ended = {job.name for job in jobs} - {job.name for job in pending(jobs)}
    for job in jobs:
        if sharding.agreed(job.name in ended):
            continue
        try:
            execute(job)
        except Exception:
            if not sharding.agreed(job.has_failed):
                raise
