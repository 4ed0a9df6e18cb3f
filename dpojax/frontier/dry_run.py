"""A frontier's programs from shapes alone: no weights, no data, no tokenizer.

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
from dpojax.plans.dry_run import NOWHERE, encoder_program, sampler_program, stage_program
from dpojax.stages.stage import RowSize

PROMPT = 2 * LONGEST  # tokens of the widest prompt: twice those of the paper's


def dry_run(config: ConfigDict, runs: Sequence[Run]) -> Iterator[str]:
    """A line for each program, once it is lowered; runs that differ in numbers alone share one.

    Raises:
      ConfigError: a run that could not start. OSError, ValueError: a config.json is missing.
    """
    reward = config.frontier.reward
    yield _stage(config, "sft")
    if reward == "classifier":
        yield _stage(config, "classifier")
    elif reward.startswith("classifier:"):
        yield encoder_program(reward.split(":")[1], "frontier.reward")
    yield sampler_program(
        config,
        prompt=PROMPT,
        new_tokens=config.samples.max_new_tokens,
        samples=config.frontier.completions,
    )
    if any(run.method == "ppo" for run in runs):
        yield _stage(config, "reward")
    configs, programs = RunConfigs(config, storage.as_path(NOWHERE)), set()
    for run in runs:
        configs.resolve(run)
        run_config = configs.config_of(run)
        run_config.update(tokenizer=config.tokenizer)
        run_config.model.path = config.model.path  # in the place of the SFT policy
        (stage,) = run_config.stages
        program = stage, run_config[stage].get("loss")
        if program not in programs:
            programs.add(program)
            yield _stage(run_config, stage)


def _stage(config: ConfigDict, name: str) -> str:
    """The train step of a stage."""
    responses = config.frontier.completions if config.frontier.pairs == "ranked" else 2
    return stage_program(config, name, RowSize(PROMPT, config.samples.max_new_tokens, responses))
