"""A sweep: one config with some keys changed, again and again, as a plan of jobs.

sweep.json holds the config, the members, the groups that train together, and a job for each group.

    python -m dpojax.sweeps.sweep --workdir=runs/sweep --members=beta-0.1,beta-1

trains members of a sweep that has been begun: the command of such a job.
"""

from __future__ import annotations

import contextlib
import csv
import itertools
import os
from collections.abc import Mapping, Sequence
from typing import Any

import jax
from ml_collections import ConfigDict

from dpojax import display, sharding, storage
from dpojax.config.command_line import ArgumentParser
from dpojax.config.errors import ConfigError
from dpojax.config.resolved import ResolvedRun, workdir_path
from dpojax.config.saved import config_from_json
from dpojax.jobs.in_process import run_jobs_in_terminal
from dpojax.runs.certificate import require_certified
from dpojax.runs.command import run_command
from dpojax.runs.run import run_resolved
from dpojax.runs.workdirs import (
    FAILED,
    failure_of,
    has_ended,
    share_stages,
    workdir_lock,
    write_failure,
)
from dpojax.sweeps.group import train_group
from dpojax.sweeps.members import Changes, member_run, same_beginning
from dpojax.sweeps.plan import (
    GROUPS,
    PLAN,
    beginning_folder,
    compared_plan,
    group_job,
    read_plan,
    resolve_sweep,
    write_plan,
)
from dpojax.sweeps.table import files_text, write_table
from dpojax.training.compilation_cache import shared_programs
from dpojax.training.loop import NonFiniteLoss


def run_sweep(
    config: ConfigDict,
    members: Sequence[Changes],
    workdir: str | storage.Path,
    *,
    best: str = "",
) -> dict[str, str]:
    """Train every member that is not finished, in workdir/NAME, and write the table and figure.

    Members that differ in traced numbers alone train together, the others one after another.
    Stages that several members begin with are trained once. The same call goes on where it was
    stopped.

    Args:
      best: a metric, by which the best member is named in the end.

    Returns:
      why members failed, by name.

    Raises:
      ConfigError: a member that could not start, before anything is made, or a workdir that holds
        another sweep.
      what `run` raises, and `Preempted`: the same call goes on.
    """
    folder = workdir_path(workdir)
    config, changes, runs = resolve_sweep(config, members, folder)
    if config.distributed:
        sharding.start_distributed()
    for name, run in runs.items():
        if not has_ended(folder / name):
            require_certified(run, folder)
    devices = jax.local_device_count() if jax.default_backend() == "cpu" else None
    with workdir_lock(folder), shared_programs(config.compilation_cache):
        sharding.on_first_process(_begin, config, changes, runs, folder, devices)
        plan = read_plan(folder)
        run_jobs_in_terminal([group_job(group, folder, devices) for group in plan["groups"]])
        sharding.agreed(True)  # whatever failures the first process wrote are there
        if jax.process_index() == 0:
            display.say(f"\n{write_table(folder, plan, best)}\n{files_text(folder)}")
    return {name: why for name in runs if (why := failure_of(folder / name))}


def train_members(folder: storage.Path, names: Sequence[str]) -> dict[str, str]:
    """Train some members of the sweep that sweep.json in `folder` describes.

    Returns:
      why members failed, by name.

    Raises:
      ConfigError: no such sweep or member; what `run` raises.
    """
    path = folder / PLAN
    if not path.exists():
        raise ConfigError(f"{path} is not there: {folder} is not the workdir of a sweep")
    plan = read_plan(folder)
    if missing := [name for name in names if name not in plan["members"]]:
        raise ConfigError(f"{folder}: a sweep without a member {missing[0]!r}")
    config = config_from_json(plan["config"], where=str(path))
    if config.distributed:
        sharding.start_distributed()
    runs = [member_run(config, plan["members"][name], folder / name) for name in names]
    for run in runs:
        require_certified(run, folder)
    with shared_programs(config.compilation_cache):
        return _train(runs, config, plan, folder)


def _train(
    runs: Sequence[ResolvedRun], config: ConfigDict, plan: Mapping[str, Any], folder: storage.Path
) -> dict[str, str]:
    """Train members whose first stages may be there already; why some failed, by name."""
    beginning = beginning_folder(runs[0], folder)
    if has_ended(beginning):
        share_stages(beginning, runs[0].workdir)
    names = [run.workdir.name for run in runs]
    for name in itertools.chain(*plan["groups"]):
        if name not in names and has_ended(folder / name):
            other = member_run(config, plan["members"][name], folder / name)
            if same_beginning(other, runs[0]):
                last = runs[0].config.stages[-1]
                share_stages(other.workdir, runs[0].workdir, ignore=(last,))
                break
    if len(runs) > 1:
        return train_group(runs, folder / GROUPS)
    return _train_alone(runs[0])


def _train_alone(member: ResolvedRun) -> dict[str, str]:
    """A run of its own; why it failed, by its name."""
    name = member.workdir.name
    if not failure_of(member.workdir):
        try:
            run_resolved(member)
        except NonFiniteLoss as error:
            write_failure(member.workdir / FAILED, str(error))
            return {name: str(error)}
    why = failure_of(member.workdir)
    return {name: why} if why else {}


def _begin(
    config: ConfigDict,
    members: Mapping[str, Changes],
    runs: Mapping[str, ResolvedRun],
    folder: storage.Path,
    cpu_devices: int | None,
) -> None:
    """Write sweep.json, with a job for each group."""
    plan = compared_plan(config, members, runs, folder)
    write_plan(folder, plan, [group_job(group, folder, cpu_devices) for group in plan["groups"]])


def use_cpu_devices(count: int) -> None:
    """Split the CPU into `count` JAX devices, unless XLA_FLAGS or this process has done so."""
    if "xla_force_host_platform_device_count" in os.environ.get("XLA_FLAGS", ""):
        return
    with contextlib.suppress(RuntimeError):  # JAX has its devices by now
        jax.config.update("jax_num_cpu_devices", count)


def main(arguments: Sequence[str] | None = None) -> None:
    """The command of a job: see above."""
    parser = ArgumentParser(
        prog="python -m dpojax.sweeps.sweep", description="Train members of a begun sweep."
    )
    parser.add_argument("--workdir", required=True, help="of the sweep")
    parser.add_argument("--members", required=True, help="their names, with commas between")
    parser.add_argument(
        "--cpu_devices", type=int, help="devices without an accelerator, as when the sweep began"
    )
    options = parser.parse_args(arguments)
    if options.cpu_devices:
        use_cpu_devices(options.cpu_devices)
    names = next(csv.reader([options.members]))
    failed = train_members(workdir_path(options.workdir), names)
    for name, why in failed.items():
        print(f"{name} failed: {why}")


if __name__ == "__main__":
    run_command(main)
