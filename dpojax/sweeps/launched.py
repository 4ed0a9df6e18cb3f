"""A sweep as jobs for a cluster, where its groups train at the same time.

One job trains the stages that several groups begin with, one job trains each group, and a last one
makes the table and the figure. They share the caches of tokens, reference log-probs and compiled
programs below the sweep's folder.

    python -m dpojax.sweeps.launched --workdir=runs/sweep --member=beta-0.1

trains the stages before a member's last one, in a folder that all members read who begin so.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from ml_collections import ConfigDict

from dpojax import storage
from dpojax.config.command_line import ArgumentParser
from dpojax.config.errors import ConfigError
from dpojax.config.resolved import ResolvedRun, editable, workdir_path
from dpojax.config.saved import FINISHED, config_from_json
from dpojax.jobs.job import Job, command, pending
from dpojax.plans.folder import COMPILED
from dpojax.runs.command import run_command
from dpojax.runs.run import run_resolved
from dpojax.runs.workdirs import workdir_lock
from dpojax.stages.registry import resolve
from dpojax.sweeps.members import Changes, member_config, member_run
from dpojax.sweeps.plan import (
    PLAN,
    beginning_folder,
    compared_plan,
    group_job,
    read_plan,
    resolve_sweep,
    write_plan,
)
from dpojax.sweeps.table import FIGURE, TABLE

LAST = "table"  # the name of the last job
REFERENCE = "reference_logprobs"  # folder of the sweep's workdir


def begin_sweep(
    config: ConfigDict,
    members: Sequence[Changes],
    workdir: str | storage.Path,
    *,
    best: str = "",
) -> list[Job]:
    """Write sweep.json, and return the jobs that are still to be done; none if all are.

    The same call with a sweep that is half done returns the other half.

    Args:
      best: a metric, by which the last job names the best member; "" names none.

    Raises:
      ConfigError: a member that could not start, or a workdir that holds another sweep.
    """
    folder = workdir_path(workdir)
    config, changes, runs = resolve_sweep(_with_caches(config, folder), members, folder)
    with workdir_lock(folder):
        plan = compared_plan(config, changes, runs, folder)
        beginnings = _beginnings(plan["groups"], runs, folder)
        groups = [
            group_job(group, folder)._replace(needs=_needs(beginnings, runs[group[0]], folder))
            for group in plan["groups"]
        ]
        to_do = pending([*beginnings.values(), *groups])
        # A beginning that no group waits for any more is left out.
        wanted = {name for job in to_do for name in job.needs}
        to_do = [job for job in to_do if job in groups or job.name in wanted]
        names = {job.name for job in to_do}
        to_do = [job._replace(needs=tuple(filter(names.__contains__, job.needs))) for job in to_do]
        trained = [job.name for job in to_do if job.name not in wanted]
        jobs = [*to_do, _table_job(trained, folder, best)] if to_do else []
        write_plan(folder, plan, jobs)
    return jobs


def _with_caches(config: ConfigDict, folder: storage.Path) -> ConfigDict:
    """The config with caches that all groups share, where it names none itself."""
    config = editable(config)
    config.compilation_cache = config.compilation_cache or str(folder / COMPILED)
    for name in config.stages:
        if "reference" in config[name]:
            reference = config[name].reference
            reference.cache = reference.cache or str(folder / REFERENCE)
    return config


def _beginnings(
    groups: Sequence[Sequence[str]], runs: Mapping[str, ResolvedRun], folder: storage.Path
) -> dict[storage.Path, Job]:
    """Jobs for the stages that several groups begin with, by the folder of each."""
    names: dict[storage.Path, list[str]] = {}
    for first, *_ in groups:
        if len(runs[first].config.stages) > 1:
            names.setdefault(beginning_folder(runs[first], folder), []).append(first)
    shared = {path: firsts for path, firsts in names.items() if len(firsts) > 1}
    return {path: _beginning_job(path, firsts[0], runs) for path, firsts in shared.items()}


def _beginning_job(path: storage.Path, member: str, runs: Mapping[str, ResolvedRun]) -> Job:
    stages = runs[member].config.stages[:-1]
    return Job(
        name=f"{'-and-'.join(stages)}-{path.name[:6]}",
        command=command("dpojax.sweeps.launched", workdir=path.parent.parent, member=member),
        outputs=(str(path / FINISHED),),
    )


def _needs(
    beginnings: Mapping[storage.Path, Job], run: ResolvedRun, folder: storage.Path
) -> tuple[str, ...]:
    beginning = beginnings.get(beginning_folder(run, folder))
    return () if beginning is None else (beginning.name,)


def _table_job(trained: Sequence[str], folder: storage.Path, best: str) -> Job:
    return Job(
        name=LAST,
        command=command("dpojax.sweeps.table", workdir=folder, best=best),
        needs=tuple(trained),
        outputs=(str(folder / TABLE), str(folder / FIGURE)),
        needs_devices=False,
    )


def train_beginning(folder: storage.Path, member: str) -> None:
    """Train all stages of a member but its last one.

    Raises:
      ConfigError: no such sweep or member; what `run` raises.
    """
    plan = read_plan(folder)
    if member not in plan["members"]:
        raise ConfigError(f"{folder}: a sweep without a member {member!r}")
    config = config_from_json(plan["config"], where=str(folder / PLAN))
    changes = plan["members"][member]
    run = member_run(config, changes, folder / member)
    first_stages = member_config(config, changes)
    first_stages.stages = run.config.stages[:-1]
    run_resolved(resolve(first_stages, beginning_folder(run, folder)))


def main(arguments: Sequence[str] | None = None) -> None:
    """The command of a job: see above."""
    parser = ArgumentParser(
        prog="python -m dpojax.sweeps.launched",
        description="Train the stages before the last one, for all members that begin so.",
    )
    parser.add_argument("--workdir", required=True, help="of the sweep")
    parser.add_argument("--member", required=True, help="one of those that begin so")
    options = parser.parse_args(arguments)
    train_beginning(workdir_path(options.workdir), options.member)


if __name__ == "__main__":
    run_command(main)
