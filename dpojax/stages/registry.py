"""Stages by the names that a config gives them, and the run that a config resolves to."""

from __future__ import annotations

import itertools
import types
from collections.abc import Sequence

from ml_collections import ConfigDict, FrozenConfigDict

from dpojax import storage
from dpojax.config.contents import shared_paths
from dpojax.config.errors import ConfigError
from dpojax.config.resolved import ResolvedRun, editable, workdir_path
from dpojax.config.rules import (
    FRONTIER_RULES,
    RECIPE_RULES,
    SHARED_RULES,
    apply_rules,
    check_numbers,
)
from dpojax.stages.classifier import Classifier
from dpojax.stages.data import tokenize_config
from dpojax.stages.ppo import PPO
from dpojax.stages.preference import Preference
from dpojax.stages.reward import Reward
from dpojax.stages.setup import Setup
from dpojax.stages.sft import SFT
from dpojax.stages.stage import Stage

STAGES: dict[str, type[Stage]] = {
    stage.name: stage for stage in (SFT, Preference, Reward, Classifier, PPO)
}


def resolve(config: ConfigDict, workdir: str | storage.Path) -> ResolvedRun:
    """The run that a config describes: checked, with every default filled in, and frozen.

    Raises:
      ConfigError: naming a key whose value no run can use; an empty workdir.
    """
    folder = workdir_path(workdir)
    config = editable(config)
    check_numbers(config)
    apply_rules(SHARED_RULES, config)
    apply_rules(FRONTIER_RULES, config.frontier, "frontier.")
    apply_rules(RECIPE_RULES, config.recipe, "recipe.")
    check_order(config.stages)
    tokenize_config(config.tokens)
    settings = {name: STAGES[name].resolve(config) for name in config.stages}
    paths = shared_paths(config)
    for name in config.stages:
        paths += STAGES[name].paths(config)
    frozen = FrozenConfigDict(config)
    return ResolvedRun(frozen, folder, types.MappingProxyType(settings), tuple(paths))


def open_stage(setup: Setup, name: str) -> Stage:
    """A stage of the run with its programs, without data and weights.

    Raises:
      ConfigError: the run has no such stage, or the stage cannot start from the run's model.
    """
    if name not in setup.config.stages:
        raise ConfigError(
            f"{setup.workdir}: a run of {', '.join(setup.config.stages)}, without a stage {name!r}"
        )
    return STAGES[name].open(setup)


def check_order(names: Sequence[str]) -> None:
    """Raise ConfigError for stages that are unknown, named twice, or cannot follow one another."""
    if not names:
        raise ConfigError(f"config.stages is empty: name one or more of {', '.join(STAGES)}")
    for name in names:
        if name not in STAGES:
            raise ConfigError(
                f"config.stages = {tuple(names)!r}: there is no stage {name!r}; there are "
                f"{', '.join(STAGES)}"
            )
        if names.count(name) > 1:
            raise ConfigError(
                f"config.stages = {tuple(names)!r}: {name} is named twice; a workdir has one "
                "folder for each stage. Export the first one and give its folder as "
                "config.model.path to a second run"
            )
    for before, after in itertools.pairwise(names):
        made, needed = STAGES[before].makes, STAGES[after].starts_from
        if made != needed:
            raise ConfigError(
                f"config.stages = {tuple(names)!r}: {before} makes {made}, whose head is no "
                f"language model's, and {after} starts from {needed}; put {before} last, or into a "
                "run of its own"
            )
