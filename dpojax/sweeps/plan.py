"""sweep.json: the config and members of a sweep, its groups that train together, and their jobs."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Mapping, Sequence
from typing import Any

from ml_collections import ConfigDict

from dpojax import storage
from dpojax.config.contents import Content
from dpojax.config.errors import ConfigError
from dpojax.config.resolved import ResolvedRun, as_json, editable
from dpojax.config.saved import FINISHED, config_differences, require_same_contents
from dpojax.jobs.job import Job, command, plan_as_json
from dpojax.plans.folder import deleting_hint, read_plan_file
from dpojax.runs.workdirs import FAILED, ended_here, require_writable, short_hash
from dpojax.stages import token_cache
from dpojax.stages.registry import check_order
from dpojax.sweeps.layout import group_folder, read_layout
from dpojax.sweeps.members import Changes, member_names, member_run, same_program, what_begins

PLAN, GROUPS, BEGINNINGS, WHAT = "sweep.json", "vectorised", "beginnings", "sweep"


def resolve_sweep(
    config: ConfigDict, members: Sequence[Changes], folder: storage.Path
) -> tuple[ConfigDict, dict[str, Changes], dict[str, ResolvedRun]]:
    """The config with the caches that members share, and each member's changes and run, by name.

    Raises:
      ConfigError: a member that could not start, or a folder that cannot be written.
    """
    config = editable(config)
    check_order(config.stages)
    config.token_cache = config.token_cache or str(folder / token_cache.FOLDER)
    changes = dict(zip(member_names(members, config.stages[-1]), members))
    runs = {name: member_run(config, x, folder / name) for name, x in changes.items()}
    require_writable(folder)
    return config, changes, runs


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


def beginning_folder(run: ResolvedRun, folder: storage.Path) -> storage.Path:
    """Where the stages before the last are trained, if a job of their own trains them.

    Runs have one folder where `same_beginning` says so.
    """
    values = json.dumps(what_begins(run.config), sort_keys=True)
    return folder / BEGINNINGS / short_hash([values])


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
                "into sweep() or --grid, or give these members their own --workdir"
            )
        begun_alone = len(group) == 1 and workdirs[0].exists()
        if under_way or any(map(ended_here, workdirs)) or begun_alone:
            groups.append([name for name in group if name in runs])
    new = [name for name in runs if not any(name in group for group in groups)]
    for indices in same_program([runs[name] for name in new]):
        groups.append([new[i] for i in indices])
    return [group for group in groups if group]


def group_job(group: Sequence[str], folder: storage.Path, cpu_devices: int | None = None) -> Job:
    """The job that trains a group; a member that fails alone leaves failed.txt in its workdir.

    Args:
      cpu_devices: for a machine without an accelerator; None leaves them as they are there.
    """
    return Job(
        name="-and-".join(group) if len(group) < 3 else f"{group[0]}-and-{len(group) - 1}-more",
        command=command(
            "dpojax.sweeps.sweep", workdir=folder, members=as_csv(group), cpu_devices=cpu_devices
        ),
        outputs=tuple(str(folder / name / FINISHED) for name in group),
        failure_files=tuple(str(folder / name / FAILED) for name in group),
    )


def as_csv(names: Sequence[str]) -> str:
    """Names with commas between, for --members; a name that holds a comma itself is quoted."""
    line = io.StringIO()
    csv.writer(line, lineterminator="").writerow(names)
    return line.getvalue()


def compared_plan(
    config: ConfigDict,
    members: Mapping[str, Changes],
    runs: Mapping[str, ResolvedRun],
    folder: storage.Path,
) -> dict:
    """What sweep.json is to hold but for its jobs, compared with the one there.

    Raises:
      ConfigError: see `_compared_plan` and `group_members`.
    """
    plan = _compared_plan(config, members, runs, folder)
    plan["groups"] = group_members(runs, plan["groups"], folder)
    return plan


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


def write_plan(folder: storage.Path, plan: Mapping[str, Any], jobs: Sequence[Job]) -> None:
    """Write sweep.json; the caller holds the lock of the folder."""
    storage.write_json(folder / PLAN, dict(plan) | {"jobs": plan_as_json(jobs)})
