"""The reward-KL frontier of Rafailov et al. 2023, figure 2 (left), from one config.

`make_frontier` carries out a plan of jobs (`frontier.plan`). A job that is done is skipped when the
same command is called again. plan.json holds the config, the runs and the jobs, and each job can be
run by hand with the command that stands there.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from ml_collections import ConfigDict

from dpojax import storage
from dpojax.config.contents import (
    Content,
    NamedPath,
    contents_of,
    data_paths,
    prompts_hash,
    reward_hash,
    shared_paths,
)
from dpojax.config.errors import ConfigError
from dpojax.config.resolved import as_json, workdir_path
from dpojax.config.saved import config_differences
from dpojax.frontier.configs import RunConfigs
from dpojax.frontier.plan import plan_frontier
from dpojax.frontier.runs import Run
from dpojax.jobs.job import plan_as_json
from dpojax.plans.folder import (
    PLAN,
    Plan,
    carry_out,
    check_workers,
    deleting_hint,
    read_plan_file,
    require_same_plan,
    write_plan,
)
from dpojax.runs.workdirs import require_writable, workdir_lock
from dpojax.stages.registry import resolve

WHAT = "frontier"
SAMPLES_FOR_BEST = 4  # of each prompt, times the largest n of best-of-n, are the fewest


def make_frontier(
    config: ConfigDict,
    runs: Sequence[Run],
    workdir: str | storage.Path,
    *,
    workers: int = 1,
    vectorise: bool = False,
) -> storage.Path:
    """Do every job that is not done; return the workdir, ready for `frontier.results`.

    A run whose loss is not finite ends there; the others go on.

    Args:
      workers: jobs that are done at a time, each in a process of its own; 1 stays in this one.
      vectorise: runs that differ in traced numbers alone are one job, see `sweeps.group`.

    Raises:
      ConfigError: a run that could not start, before anything is made; or the workdir holds the
        plan of another config.
      what the jobs raise, and `Preempted`: the same command goes on.
    """
    folder = workdir_path(workdir)
    check_frontier(config, runs, folder, workers)
    require_writable(folder)
    with workdir_lock(folder):
        plan = plan_frontier(config, runs, folder, parts=workers, vectorise=vectorise)
        write_or_compare_plan(config, runs, plan, folder)
        cache = config.compilation_cache
        carry_out(plan.jobs, folder, WHAT, workers=workers, compilation_cache=cache)
    return folder


def check_frontier(
    config: ConfigDict, runs: Sequence[Run], folder: storage.Path, workers: int
) -> None:
    """Raise ConfigError for a run that could not start."""
    configs = RunConfigs(config, folder)
    for run in runs:
        configs.resolve(run)
    if config.frontier.reward == "classifier":
        resolve(configs.stage_config("classifier"), folder)
    check_workers(workers, WHAT, distributed=config.distributed)
    frontier = config.frontier
    largest = max(frontier.best_of_n, default=0)
    if (least := SAMPLES_FOR_BEST * largest) > frontier.reference_samples:
        raise ConfigError(
            f"config.frontier.reference_samples = {frontier.reference_samples}: best of {largest} "
            f"is estimated from at least {least} of each prompt; raise it, or lower "
            "config.frontier.best_of_n"
        )


def write_or_compare_plan(
    config: ConfigDict, runs: Sequence[Run], plan: Plan, folder: storage.Path
) -> None:
    """Write plan.json and the files that its jobs read, or compare it with the one there first.

    Raises:
      ConfigError: plan.json is of another config, or lacks a run, or has one with other settings;
        it names the keys.
    """
    content = {
        "config": as_json(config),
        "contents": _contents(config),
        "runs": [run._asdict() | {"name": run.name, "changes": dict(run.changes)} for run in runs],
        "jobs": plan_as_json(plan.jobs),
    }
    if (folder / PLAN).exists():
        _require_same(read_plan(folder), content, folder)
    write_plan(folder, plan, content)  # runs may be added


def read_plan(folder: storage.Path) -> dict[str, Any]:
    """What plan.json holds.

    Raises:
      StorageError: it is damaged.
    """
    path = folder / PLAN
    fields = {"config": dict, "contents": dict, "runs": list, "jobs": list}
    plan = read_plan_file(path, WHAT, fields)
    with storage.damage_named(path, deleting_hint(WHAT)):
        for run in plan["runs"]:
            if not {"name", "changes", "method", "setting", "stage"} <= set(run):
                raise ValueError("a run lacks its name or settings")
    return plan


def _contents(config: ConfigDict) -> dict[str, Content]:
    """The files that are not made by the frontier itself: what its first jobs read."""
    frontier = config.frontier
    prompts = NamedPath("frontier.prompts", frontier.prompts, prompts_hash)
    reward, paths = frontier.reward, [prompts, *shared_paths(config), *data_paths(config, "sft")]
    if reward == "classifier":
        paths += data_paths(config, "classifier")
    else:
        paths.append(NamedPath("frontier.reward", reward, reward_hash))
    return contents_of(paths)


def _require_same(before: dict, now: dict, folder: storage.Path) -> None:
    require_same_plan(folder, WHAT, before, now)
    runs_now = {run["name"]: run for run in now["runs"]}
    if missing := [run["name"] for run in before["runs"] if run["name"] not in runs_now]:
        raise ConfigError(f"{folder} holds runs that this plan has not: {', '.join(missing)}")
    for run in before["runs"]:
        if changed := config_differences(run["changes"], runs_now[run["name"]]["changes"]):
            raise ConfigError(
                f"{folder} holds {run['name']} with other settings:\n" + "\n".join(changed)
            )
