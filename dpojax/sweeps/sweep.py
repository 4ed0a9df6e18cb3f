"""A sweep: one config with some keys changed, again and again; a table and a figure of all."""

from __future__ import annotations

import csv
import importlib.util
import io
import itertools
import json
import math
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import jax
from ml_collections import ConfigDict

from dpojax import sharding
from dpojax.config.checks import STAGES, ConfigError, changes, check, fill_in, only_run
from dpojax.evaluation.sweep_figure import draw
from dpojax.jobs.plan import write_json
from dpojax.runs import run as runs
from dpojax.runs.workdirs import ended, failure_of, say_failed, share
from dpojax.stages import token_cache
from dpojax.stages.setup import compiled_once
from dpojax.sweeps.group import same_program, train_together
from dpojax.sweeps.layout import begun, folder_of
from dpojax.training.loop import NonFiniteLoss
from dpojax.training.metrics import read_metrics

PLAN, GROUPS, TABLE, FIGURE = "sweep.json", "together", "sweep.csv", "sweep.png"
# What a table shows where it was logged: heading, metric of the last evaluation, factor, format.
COLUMNS = (
    ("held-out loss", "loss", 1, ".4f"),
    ("accuracy, %", "rewards/accuracies", 100, ".1f"),
    ("accuracy, %", "accuracy", 100, ".1f"),
    ("margin, nats", "rewards/margins", 1, "+.3f"),
    ("KL estimate, nats/token", "kl/per_token", 1, ".4f"),
    ("chosen less likely, %", "displacement", 100, ".1f"),
    ("reward of samples", "samples/reward", 1, ".3f"),
    ("±", "samples/reward_error", 1, ".3f"),
    ("KL of samples, nats", "samples/kl", 1, ".2f"),
    ("±", "samples/kl_error", 1, ".2f"),
)


def read_sweep(path: str) -> list[dict[str, Any]]:
    """What the function `sweep()` of a config file returns: the keys that each member changes.

    Raises:
      ConfigError: the file has none, or it returns none.
    """
    spec = importlib.util.spec_from_file_location("sweep_config", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    if not hasattr(module, "sweep") or not (found := module.sweep()):
        raise ConfigError(f"{path}: has no function sweep() that returns a list of changes")
    return found


def names_of(members: Sequence[Mapping[str, Any]], stage: str) -> list[str]:
    """A name of each: `beta-0.1`, with every key that it changes, those of `stage` without it.

    Raises:
      ConfigError: two members are the same.
    """
    shown = lambda x: f"{x:g}" if isinstance(x, float) else str(x).replace("/", "_")
    changed = lambda key, x: f"{key.removeprefix(f'{stage}.')}-{shown(x)}"
    names = ["-".join(changed(*item) for item in own.items()) or "unchanged" for own in members]
    if twice := [name for name in names if names.count(name) > 1]:
        raise ConfigError(f"sweep(): {twice[0]!r} is there {names.count(twice[0])} times")
    return names


def make(config: ConfigDict, members: Sequence[Mapping[str, Any]], workdir: str) -> dict[str, str]:
    """Train every member that is not finished, in workdir/NAME, and write the table and figure.

    Members that differ in traced numbers alone train together, the others one after another; stages
    that several begin with are trained once. The same call goes on where it was stopped.

    Returns:
      why members failed, by name.

    Raises:
      ConfigError: a member that could not start, before anything is made, or a workdir that holds
        another sweep.
      what `run` raises, and `Preempted`: the same call goes on.
    """
    if "://" in workdir:
        raise ConfigError(f"--workdir={workdir}: has to be a folder of a (shared) file system")
    folder = pathlib.Path(workdir).resolve()
    names = names_of(members, config.stages[-1])
    configs = {name: member_of(config, own) for name, own in zip(names, members)}
    if config.distributed:
        sharding.start_distributed()
    for own in configs.values():
        own.token_cache = own.token_cache or str(folder / token_cache.FOLDER)
    plan = _plan(config, dict(zip(configs, members)), folder)
    plan["groups"] = _groups(configs, plan["groups"], folder)
    failed, trained = {}, []
    with only_run(folder), compiled_once(config.compilation_cache):
        if jax.process_index() == 0:
            write_json(folder / PLAN, plan)
        for group in plan["groups"]:
            own = {name: configs[name] for name in group}
            _begin_with_another(own, trained, configs, folder)
            workdirs = [folder / name for name in own]
            if len(own) == 1:
                failed |= _alone(*own.values(), workdirs[0])
            else:
                failed |= train_together(list(own.values()), workdirs, folder / GROUPS)
            trained += own
        if jax.process_index() == 0:
            print(f"\n{write(folder)}\n{folder}: {TABLE}, {FIGURE}")
    return failed


def _groups(
    configs: Mapping[str, ConfigDict], recorded: Sequence[Sequence[str]], folder: pathlib.Path
) -> list[list[str]]:
    """Members that train together: first those that have begun to, as `recorded`, since their
    checkpoints are of all of them; then the others.

    Raises:
      ConfigError: a member is gone whose group has not ended.
    """
    found = []
    for group in recorded:
        workdirs = [folder / name for name in group]
        gone = [name for name in group if name not in configs]
        under_way = len(group) > 1 and begun(folder_of(workdirs, folder / GROUPS))
        if gone and under_way:
            raise ConfigError(
                f"{folder} is training {', '.join(group)} together: put {', '.join(gone)} back "
                "into sweep(), or give these members their own --workdir"
            )
        if under_way or any(map(ended, workdirs)) or (len(group) == 1 and workdirs[0].exists()):
            found.append([name for name in group if name in configs])
    new = [name for name in configs if not any(name in group for group in found)]
    made = same_program([configs[name] for name in new])
    return [group for group in found if group] + [[new[i] for i in group] for group in made]


def _alone(config: ConfigDict, workdir: pathlib.Path) -> dict[str, str]:
    """A run of its own; why it failed, by its name."""
    if not failure_of(workdir):
        try:
            runs.run(config, str(workdir))
        except NonFiniteLoss as error:
            say_failed(workdir, str(error))
            return {workdir.name: str(error)}
    why = failure_of(workdir)
    return {workdir.name: why} if why else {}


def write(folder: pathlib.Path) -> str:
    """Write sweep.csv and sweep.png of the members that are finished; returns a table as text."""
    plan = json.loads((folder / PLAN).read_text())
    stage = plan["config"]["stages"][-1]
    lines = {
        name: [line for line in read_metrics(folder / name / stage) if line["split"] == "eval"]
        for name in plan["members"]
        if (folder / name / runs.FINISHED).exists()
    }
    keys = list(dict.fromkeys(key for own in plan["members"].values() for key in own))
    last = {name: found[-1] for name, found in lines.items() if found}
    metrics = sorted({key for line in last.values() for key in line} - {"split", "time", "step"})
    table = io.StringIO()
    out = csv.writer(table)
    out.writerow(["member", *keys, "step", *metrics])
    for name, line in last.items():
        own = plan["members"][name]
        values = [line.get(metric, math.nan) for metric in metrics]
        out.writerow([name, *(own.get(key, "") for key in keys), line["step"], *values])
    (folder / TABLE).write_text(table.getvalue())
    if lines:
        draw(lines, folder / FIGURE)
    return _text(last)


def _text(last: Mapping[str, Mapping[str, float]]) -> str:
    """The last evaluation of every member, in columns."""
    columns = [c for c in COLUMNS if any(c[1] in line for line in last.values())]
    rows = [("", *(heading for heading, *_ in columns))]
    for name, line in last.items():
        cells = (format(scale * line.get(m, math.nan), form) for _, m, scale, form in columns)
        rows.append((name, *cells))
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    aligned = lambda row: "  ".join(
        f"{cell:<{width}}" if i == 0 else f"{cell:>{width}}"
        for i, (cell, width) in enumerate(zip(row, widths))
    )
    return "\n".join(aligned(row) for row in rows)


def member_of(config: ConfigDict, own: Mapping[str, Any]) -> ConfigDict:
    """A member's config.

    Raises:
      ConfigError: a key that the config does not have or that no stage of it reads, a value of
        another type, or one that no run could use.
    """
    found = config.copy_and_resolve_references()
    try:
        found.update_from_flattened_dict(dict(own))
    except (KeyError, TypeError, AttributeError) as error:
        raise ConfigError(f"sweep(): {dict(own)}: {error.args[0]}") from error
    check(found)
    unread = {"frontier", *itertools.chain(*STAGES)} - {*found.stages}
    others = [key for key in own if key.split(".")[0] in unread]
    if found.tokenizer.startswith("train:"):  # on the texts of SFT, whatever the stages are
        others = [key for key in others if not key.startswith("sft.data.")]
    if others:
        raise ConfigError(
            f"sweep(): {others[0]} is read by none of the stages {', '.join(found.stages)} "
            "(config.stages)"
        )
    fill_in(found)
    return found


def _begin_with_another(
    own: Mapping[str, ConfigDict],
    trained: Sequence[str],
    configs: Mapping[str, ConfigDict],
    folder: pathlib.Path,
) -> None:
    """Give the first of a group the stages before the last of a member that had the same."""
    name, config = next(iter(own.items()))
    for other in trained:
        if _before_last(configs[other]) == _before_last(config):
            (folder / name).mkdir(parents=True, exist_ok=True)
            share(folder / other, folder / name, but=(config.stages[-1],))
            return


def _before_last(config: ConfigDict) -> dict:
    """All that decides the stages before the last."""
    found = json.loads(config.to_json())
    kept = (*config.stages[:-1], "seed", "stages", "model", "tokenizer", "tokens", "chat_template")
    return {key: found[key] for key in kept}


def _plan(config: ConfigDict, members: Mapping[str, Any], folder: pathlib.Path) -> dict:
    """What sweep.json is to hold; members may be added to those that it has.

    Raises:
      ConfigError: it is of another config, or a member of that name had other changes.
    """
    path = folder / PLAN
    now = {"config": json.loads(config.to_json()), "members": members, "groups": []}
    now = json.loads(json.dumps(now))
    if path.exists():
        then = json.loads(path.read_text())
        if changed := changes(then["config"], now["config"]):
            raise ConfigError(
                f"{folder} holds a sweep of another config; give this one its own --workdir, or "
                "take back these changes:\n" + "\n".join(changed)
            )
        for name, own in now["members"].items():
            if (before := then["members"].get(name, own)) != own:
                raise ConfigError(
                    f"{folder} holds a member {name} with {before}, which is now {own}; give this "
                    "sweep its own --workdir"
                )
        now["members"] = then["members"] | now["members"]
        now["groups"] = then.get("groups", [])
    return now
