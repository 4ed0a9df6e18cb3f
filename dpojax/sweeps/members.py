"""The members of a sweep: their names and configs, and which of them one program can train."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from ml_collections import ConfigDict

from dpojax import storage
from dpojax.config.contents import TRAINED_HERE
from dpojax.config.errors import ConfigError
from dpojax.config.files import failing_at_its_line, load_config_file, split_variant
from dpojax.config.resolved import ResolvedRun, as_json, editable, flat
from dpojax.stages.registry import STAGES, resolve

Changes = Mapping[str, Any]  # config keys, with the values of one member


def read_sweep(path: str) -> list[Changes]:
    """What the function `sweep()` of a config file returns: the keys that each member changes.

    Raises:
      ConfigError: the file has no such function, or it returns no member.
    """
    module = load_config_file(path)
    with failing_at_its_line(split_variant(path)[0]):
        members = module.sweep() if hasattr(module, "sweep") else []
    if not members:
        raise ConfigError(
            f"{path}: has no function sweep() that returns a list of changes; write one, or give "
            "--grid KEY=VALUE,VALUE"
        )
    return members


def member_names(members: Sequence[Changes], stage: str) -> list[str]:
    """A name for each member: `beta-0.1`, with every key that it changes.

    Args:
      stage: its name is left out of keys.

    Raises:
      ConfigError: two members are the same.
    """
    names = []
    for changes in members:
        parts = [f"{key.removeprefix(f'{stage}.')}-{_in_name(x)}" for key, x in changes.items()]
        names.append("-".join(parts) or "unchanged")
    for name in names:
        if names.count(name) > 1:
            raise ConfigError(f"sweep: {name!r} is there {names.count(name)} times")
    return names


def member_config(config: ConfigDict, changes: Changes) -> ConfigDict:
    """A member's config.

    Raises:
      ConfigError: a key that the config does not have, or a value of another type.
    """
    changed = editable(config)
    try:
        changed.update_from_flattened_dict(dict(changes))
    except (KeyError, TypeError, AttributeError) as error:
        raise ConfigError(f"sweep: {dict(changes)}: {error.args[0]}") from error
    return changed


def member_run(config: ConfigDict, changes: Changes, workdir: storage.Path) -> ResolvedRun:
    """A member's run.

    Raises:
      ConfigError: see `member_config`; also a key that no stage of it reads, or a value that no run
        could use.
    """
    run = resolve(member_config(config, changes), workdir)
    stages = run.config.stages
    unread_parts = {"frontier", *STAGES} - {*stages}
    unread = [key for key in changes if key.split(".")[0] in unread_parts]
    if run.config.tokenizer.startswith(TRAINED_HERE):  # from the texts of SFT, whatever the stages
        unread = [key for key in unread if not key.startswith("sft.data.")]
    if unread:
        raise ConfigError(
            f"sweep: {unread[0]} is read by none of the stages {', '.join(stages)} (config.stages)"
        )
    return run


def traced_keys(run: ResolvedRun) -> frozenset[str]:
    """The keys in which runs of one program may differ; empty if no two runs can share one."""
    return STAGES[run.config.stages[-1]].traced_keys(run)


def same_program(runs: Sequence[ResolvedRun]) -> list[list[int]]:
    """The runs by their indices, those together that one program can train; in order."""
    groups: dict[str, list[int]] = {}
    for index, run in enumerate(runs):
        keys = traced_keys(run)
        shared = {key: x for key, x in flat(as_json(run.config)).items() if key not in keys}
        alone = [] if keys else [index]
        groups.setdefault(json.dumps([sorted(keys), shared, alone]), []).append(index)
    return list(groups.values())


def same_beginning(run: ResolvedRun, other: ResolvedRun) -> bool:
    """Whether two runs have the same stages before the last."""
    return what_begins(run.config) == what_begins(other.config)


def what_begins(config: ConfigDict) -> dict:
    """All that decides the stages before the last, as JSON has it."""
    values = as_json(config)
    keys = (*config.stages[:-1], "seed", "stages", "model", "tokenizer", "tokens", "chat_template")
    return {key: values[key] for key in keys}


def _in_name(value: Any) -> str:
    """A value in a member's name, which is a folder's; a list of sweep.json was a tuple."""
    if isinstance(value, float):
        return f"{value:g}"
    return str(tuple(value) if isinstance(value, list) else value).replace("/", "_")
