"""A job that waits for those that it needs, where the engine that runs it knows no order of jobs.

    python -m dpojax.plans.after --plan=runs/sweep/sweep.json --job=table

waits until all that the job needs is done or has failed by itself, and then runs its command here.
"""

from __future__ import annotations

import time
from collections.abc import Sequence

from dpojax import storage
from dpojax.config.command_line import ArgumentParser
from dpojax.config.errors import ConfigError
from dpojax.jobs.job import Job, execute, job_from_json, pending
from dpojax.runs.command import run_command

SECONDS = 20.0  # between two looks at the outputs


def jobs_of(path: storage.Path) -> list[Job]:
    """The jobs of a plan's file, such as sweep.json.

    Raises:
      StorageError: it is damaged.
    """
    values = storage.read_json(path, fields={"jobs": list})["jobs"]
    with storage.damage_named(path):
        return [job_from_json(job) for job in values]


def wait_and_run(jobs: Sequence[Job], name: str, seconds: float = SECONDS) -> None:
    """Wait for what the job of a name needs, and run its command in this process.

    Raises:
      ConfigError: the plan has no such job, or needs a job that it does not have.
      what the job raises.
    """
    by_name = {job.name: job for job in jobs}
    needs = by_name[name].needs if name in by_name else ()
    for other in (name, *needs):
        if other not in by_name:
            raise ConfigError(f"the plan has no job {other!r}; it has {', '.join(by_name)}")
    needed = [by_name[need]._replace(needs=()) for need in needs]
    told: list[str] = []
    while waiting := [job.name for job in pending(needed)]:
        if waiting != told:
            print(f"{name}: waits for {', '.join(waiting)}", flush=True)
            told = waiting
        time.sleep(seconds)
    execute(by_name[name])


def main(arguments: Sequence[str] | None = None) -> None:
    """The command of a job: see above."""
    parser = ArgumentParser(
        prog="python -m dpojax.plans.after",
        description="Run a job of a plan once all that it needs is done.",
    )
    parser.add_argument("--plan", required=True, help="the plan's file: WORKDIR/sweep.json")
    parser.add_argument("--job", required=True, help="its name in the plan")
    parser.add_argument("--seconds", type=float, default=SECONDS, help="between two looks")
    options = parser.parse_args(arguments)
    jobs = jobs_of(storage.as_path(options.plan, "--plan"))
    wait_and_run(jobs, options.job, options.seconds)


if __name__ == "__main__":
    run_command(main)
