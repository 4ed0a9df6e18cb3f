"""A sweep: one config with some keys changed, again and again, as a plan of jobs.

sweep.json holds the config, the members, the groups that train together, and a job for each group.

    python -m dpojax.sweeps.sweep --workdir=runs/sweep --members=beta-0.1,beta-1

trains members of a sweep that has been begun: the command of such a job.
"""

from __future__ import annotations

import contextlib
import csv
import io
import itertools
import os
from collections.abc import Mapping, Sequence
from typing import Any

import jax
from ml_collections import ConfigDict

from dpojax import sharding, storage
from dpojax.config.command_line import ArgumentParser
from dpojax.config.contents import Content
from dpojax.config.errors import ConfigError
from dpojax.config.resolved import ResolvedRun, as_json, editable, workdir_path
from dpojax.config.saved import (
    FINISHED,
    config_differences,
    config_from_json,
    require_same_contents,
)
from dpojax.jobs.in_process import run_jobs_in_terminal
from dpojax.jobs.job import Job, command, plan_as_json
from dpojax.plans.folder import deleting_hint, read_plan_file
from dpojax.runs.command import run_command
from dpojax.runs.run import run_resolved
from dpojax.runs.workdirs import (
    FAILED,
    ended_here,
    failure_of,
    has_ended,
    require_writable,
    share_stages,
    workdir_lock,
    write_failure,
)
from dpojax.stages import token_cache
from dpojax.stages.registry import check_order
from dpojax.sweeps.group import train_group
from dpojax.sweeps.layout import group_folder, read_layout
from dpojax.sweeps.members import Changes, member_names, member_run, same_beginning, same_program
from dpojax.sweeps.table import FIGURE, TABLE, write_table
from dpojax.training.compilation_cache import shared_programs
from dpojax.training.loop import NonFiniteLoss

PLAN, GROUPS, WHAT = "sweep.json", "vectorised", "sweep"


def run_sweep(
    config: ConfigDict, members: Sequence[Changes], workdir: str | storage.Path
) -> dict[str, str]:
    """Train every member that is not finished, in workdir/NAME, and write the table and figure.

    Members that differ in traced numbers alone train together, the others one after another.
    Stages that several members begin with are trained once. The same call goes on where it was
    stopped.

    Returns:
      why members failed, by name.

    Raises:
      ConfigError: a member that could not start, before anything is made, or a workdir that holds
        another sweep.
      what `run` raises, and `Preempted`: the same call goes on.
    """
    folder = workdir_path(workdir)
    config = editable(config)
    check_order(config.stages)
    config.token_cache = config.token_cache or str(folder / token_cache.FOLDER)
    changes = dict(zip(member_names(members, config.stages[-1]), members))
    runs = {name: member_run(config, x, folder / name) for name, x in changes.items()}
    if config.distributed:
        sharding.start_distributed()
    require_writable(folder)
    with workdir_lock(folder), shared_programs(config.compilation_cache):
        sharding.on_first_process(_write_plan, config, changes, runs, folder)
        plan = read_plan(folder)
        run_jobs_in_terminal([_job(group, folder) for group in plan["groups"]])
        sharding.agreed(True)  # whatever failures the first process wrote are there
        if jax.process_index() == 0:
            print(f"\n{write_table(folder, plan)}\n{folder}: {TABLE}, {FIGURE}")
    return {name: why for name in runs if (why := failure_of(folder / name))}


def read_plan(folder: storage.Path) -> dict[str, Any]:
    """What sweep.json holds.

    Raises:
      StorageError: it is damaged.
    """
    path = folder / PLAN
    fields = {"config": dict, "members": dict, "groups": list, "contents": dict}
    plan = read_plan_file(path, WHAT, fields)
    with storage.damage_named(path, deleting_hint(WHAT)):
        for name, changes in plan["members"].items():
            _require_type(name, changes, dict)
        for group in plan["groups"]:
            _require_type("groups", group, list)
        for name, content in plan["contents"].items():
            _require_type(name, content, list)
    return plan


def _require_type(name: str, content: Any, kind: type) -> None:
    if not isinstance(content, kind):
        raise TypeError(f"{name!r} is of another type")


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


def group_members(
    runs: Mapping[str, ResolvedRun], recorded: Sequence[Sequence[str]], folder: storage.Path
) -> list[list[str]]:
    """Members that train together: first those that have begun to, then the others.

    Members that have begun stay together, since their checkpoints are of all of them.

    Args:
      recorded: the groups of the calls before.

    Raises:
      ConfigError: a member is gone whose group has not ended.
    """
    groups = []
    for group in recorded:
        workdirs = [folder / name for name in group]
        gone = [name for name in group if name not in runs]
        under_way = len(group) > 1 and read_layout(group_folder(workdirs, folder / GROUPS))
        if gone and under_way:
            raise ConfigError(
                f"{folder} is training {', '.join(group)} together: put {', '.join(gone)} back "
                "into sweep(), or give these members their own --workdir"
            )
        begun_alone = len(group) == 1 and workdirs[0].exists()
        if under_way or any(map(ended_here, workdirs)) or begun_alone:
            groups.append([name for name in group if name in runs])
    new = [name for name in runs if not any(name in group for group in groups)]
    for indices in same_program([runs[name] for name in new]):
        groups.append([new[i] for i in indices])
    return [group for group in groups if group]


def _job(group: Sequence[str], folder: storage.Path) -> Job:
    """The job that trains a group; a member that fails alone is told in its own workdir."""
    devices = jax.local_device_count() if jax.default_backend() == "cpu" else None
    return Job(
        name="-and-".join(group) if len(group) < 3 else f"{group[0]}-and-{len(group) - 1}-more",
        command=command(
            "dpojax.sweeps.sweep", workdir=folder, members=_as_csv(group), cpu_devices=devices
        ),
        outputs=tuple(str(folder / name / FINISHED) for name in group),
        failure_files=tuple(str(folder / name / FAILED) for name in group),
    )


def _as_csv(names: Sequence[str]) -> str:
    """Names with commas between, for --members; a name that holds a comma itself is quoted."""
    line = io.StringIO()
    csv.writer(line, lineterminator="").writerow(names)
    return line.getvalue()


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


def _write_plan(
    config: ConfigDict,
    members: Mapping[str, Changes],
    runs: Mapping[str, ResolvedRun],
    folder: storage.Path,
) -> None:
    """Write sweep.json, which is compared with the one there first."""
    plan = _compared_plan(config, members, runs, folder)
    plan["groups"] = group_members(runs, plan["groups"], folder)
    jobs = plan_as_json([_job(group, folder) for group in plan["groups"]])
    storage.write_json(folder / PLAN, plan | {"jobs": jobs})


def _compared_plan(
    config: ConfigDict,
    members: Mapping[str, Changes],
    runs: Mapping[str, ResolvedRun],
    folder: storage.Path,
) -> dict:
    """What sweep.json is to hold; members may be added to those that it has.

    Raises:
      ConfigError: it is of another config, a member of that name had other changes, or a file that
        its members read has changed.
    """
    path = folder / PLAN
    contents: dict[str, Content] = {}
    for name, run in runs.items():
        for key, content in run.contents.items():
            same = contents.get(key, content).path == content.path
            contents[key if same else f"{key} of {name}"] = content
    now = {"config": as_json(config), "members": members, "groups": [], "contents": contents}
    if not path.exists():
        return now
    before = read_plan(folder)
    if changed := config_differences(before["config"], now["config"]):
        raise ConfigError(
            f"{folder} holds a sweep of another config; give this one its own --workdir, or "
            "take back these changes:\n" + "\n".join(changed)
        )
    for name, changes in members.items():
        earlier = before["members"].get(name, changes)
        if _as_lists(earlier) != _as_lists(changes):
            raise ConfigError(
                f"{folder} holds a member {name} with {earlier}, which is now {changes}; give this "
                "sweep its own --workdir"
            )
    require_same_contents(folder, before.get("contents", {}), contents)
    return now | {
        "members": before["members"] | dict(members),
        "groups": before["groups"],
        "contents": before.get("contents", {}) | contents,
    }


def _as_lists(changes: Changes) -> dict:
    """As JSON has them: tuples are lists."""
    return {key: list(x) if isinstance(x, tuple) else x for key, x in changes.items()}


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
