"""A frontier's runs, and their programs from shapes alone: no weights, no data, no tokenizer.

The programs are those that the jobs would run: the train step of every stage and loss, the sampler,
the classifier that is the reward, and PPO's update.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from ml_collections import ConfigDict

from dpojax import storage
from dpojax.data.prefixes import LONGEST
from dpojax.frontier.configs import RunConfigs
from dpojax.frontier.runs import Run
from dpojax.planning.outline import Outline
from dpojax.plans.dry_run import NOWHERE, encoder_program, lines_of_names, sampler_program
from dpojax.stages.stage import RowSize

PROMPT = 2 * LONGEST  # tokens of the widest prompt: twice those of the paper's


def dry_run(config: ConfigDict, runs: Sequence[Run], outline: Outline) -> Iterator[str]:
    """Lines for the runs, and for each program; runs that differ in numbers alone share one.

    Args:
      config: of the frontier.
      runs: of its figure.
      outline: what builds the programs, and sums their hours up.

    Raises:
      ConfigError: a run that could not start. OSError, ValueError: a config.json is missing.
    """
    configs, programs = RunConfigs(config, storage.as_path(NOWHERE)), {}
    for run in runs:
        configs.resolve(run)
        run_config = configs.config_of(run)
        run_config.update(tokenizer=config.tokenizer)
        run_config.model.path = config.model.path  # in the place of the SFT policy
        (stage,) = run_config.stages
        program = stage, run_config[stage].get("loss")
        programs.setdefault(program, []).append((run, run_config))
    yield f"Runs ({len(runs)}), those of a line with one program:"
    for same in programs.values():
        yield from lines_of_names([run.name for run, _ in same])
    yield "Programs:"
    yield from _beginning(config, runs, outline)
    for (stage, _), same in programs.items():
        run_config = same[0][1]
        yield from outline.stage(run_config, stage, _row(run_config), times=len(same))
    yield outline.total()


def _beginning(config: ConfigDict, runs: Sequence[Run], outline: Outline) -> Iterator[str]:
    """The programs of the jobs before the runs."""
    reward = config.frontier.reward
    yield from outline.stage(config, "sft", _row(config))
    if reward == "classifier":
        yield from outline.stage(config, "classifier", _row(config))
    elif reward.startswith("classifier:"):
        yield encoder_program(reward.split(":")[1], "frontier.reward")
    yield sampler_program(
        config,
        prompt=PROMPT,
        new_tokens=config.samples.max_new_tokens,
        samples=config.frontier.completions,
    )
    if any(run.method == "ppo" for run in runs):
        yield from outline.stage(config, "reward", _row(config))


def _row(config: ConfigDict) -> RowSize:
    responses = config.frontier.completions if config.frontier.pairs == "ranked" else 2
    return RowSize(PROMPT, config.samples.max_new_tokens, responses)
