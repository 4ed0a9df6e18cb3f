"""The folder of a plan: the file that describes it, and carrying out its jobs there."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from dpojax import storage
from dpojax.config.contents import Content
from dpojax.config.errors import ConfigError
from dpojax.config.saved import config_differences, require_same_contents
from dpojax.jobs import in_process, local_workers
from dpojax.jobs.job import Job
from dpojax.training.compilation_cache import shared_programs

PLAN = "plan.json"
COMPILED = "compiled"  # programs that the jobs share


class Plan(NamedTuple):
    """Jobs in order, and the JSON files that their commands read, by path."""

    jobs: list[Job]
    files: dict[str, Any]


def read_plan_file(path: storage.Path, what: str, fields: Mapping[str, type]) -> dict[str, Any]:
    """What a plan's file holds.

    Args:
      what: the plan is of: "sweep".
      fields: that the file has to have, each with its type.

    Raises:
      StorageError: it is damaged.
    """
    return storage.read_json(path, deleting_hint(what), fields=dict(fields))


def write_plan(folder: storage.Path, plan: Plan, content: Mapping[str, Any]) -> None:
    """Write the files that the jobs read and, last, what plan.json holds."""
    for file, values in plan.files.items():
        storage.write_json(storage.as_path(file), values)
    storage.write_json(folder / PLAN, content)


def deleting_hint(what: str) -> str:
    """What to do about a plan's file that is damaged."""
    return f"delete it: the command that began the {what} writes it again"


def require_same_plan(
    folder: storage.Path, what: str, before: Mapping[str, Any], now: Mapping[str, Any]
) -> None:
    """Compare the fields `config` and `contents` of two plans.

    Raises:
      ConfigError: the folder's plan is of another config, or of files with another content.
    """
    if changed := config_differences(before["config"], now["config"]):
        raise ConfigError(
            f"{folder} holds a {what} of another config; give this one its own --workdir, or "
            "take back these changes:\n" + "\n".join(changed)
        )
    contents = {key: Content(*pair) for key, pair in now["contents"].items()}
    require_same_contents(folder, before.get("contents", {}), contents)


def check_workers(workers: int, what: str, *, distributed: bool) -> None:
    """Raise ConfigError where no process of this machine could carry out the plan."""
    if distributed:
        raise ConfigError(
            f"config.distributed: a {what} runs in one process; its jobs may be run by several, "
            f"each with the command that stands in {PLAN}"
        )
    if workers > 1 and not local_workers.on_cpu():
        raise ConfigError(f"{workers} runs at once: only on a CPU, and in one process; take 1")


def carry_out(
    jobs: Sequence[Job], folder: storage.Path, what: str, *, workers: int, compilation_cache: str
) -> None:
    """Do every job that is not done, in this process or in `workers` of them.

    Args:
      compilation_cache: a folder of compiled programs; "" is in the plan's own folder.

    Raises:
      what the jobs raise, and `Preempted`: the same call goes on.
    """
    cache = compilation_cache or str(folder / COMPILED)
    if workers > 1:
        local_workers.run_jobs(jobs, folder, what, workers=workers, compilation_cache=cache)
    else:
        with shared_programs(cache):
            in_process.run_jobs(jobs, folder, what)
