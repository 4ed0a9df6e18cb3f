"""Data that are not at hand: examples of the lengths that a config expects, for plans alone."""

from __future__ import annotations

import math

import numpy as np
from ml_collections import ConfigDict

from dpojax.config.errors import ConfigError
from dpojax.data.examples import Example
from dpojax.stages.data import StageData

DRAWN = 2048  # examples that stand for all
HELD_OUT = 64
SPREAD = 0.6  # standard deviation of the logarithm of lengths, about that of HH and TL;DR


def expected_data(config: ConfigDict, *, responses: int) -> StageData:
    """Examples with the lengths of `config.plan`, log-normal around their means.

    Args:
      config: of the run. `plan.prompt` and `plan.response` are mean lengths in tokens; no example
        is longer than `tokens.max_length`.
      responses: of each example.

    Raises:
      ConfigError: the config expects nothing.
    """
    plan, longest = config.plan, config.tokens.max_length
    if min(plan.examples, plan.response) < 1:
        raise ConfigError(
            "config.plan.examples, prompt and response: say how many examples there are, and how "
            "many tokens their prompts and responses have on average; or name data that are there"
        )
    generator = np.random.default_rng(0)
    count = DRAWN + HELD_OUT
    prompts = _lengths(generator, plan.prompt, count)
    answers = _lengths(generator, plan.response, (count, responses))
    limit = config.tokens.max_prompt_length or longest
    examples = []
    for i in range(count):
        length = min(prompts[i], limit, longest - 1)
        lengths = [max(1, min(n, longest - length)) for n in answers[i]]
        examples.append(_example(str(i), length, lengths))
    return StageData(examples, DRAWN, {})


def _lengths(generator: np.random.Generator, mean: float, shape) -> np.ndarray:
    """Whole numbers of at least 1 with this mean."""
    logarithm = math.log(max(mean, 1.0)) - SPREAD**2 / 2
    if mean <= 1:
        return np.ones(shape, int)
    return np.maximum(1, np.rint(generator.lognormal(logarithm, SPREAD, shape))).astype(int)


def _example(name: str, prompt: int, responses: list[int]) -> Example:
    return Example(
        id=name,
        prompt=np.ones(prompt, np.int32),
        responses=tuple(np.ones(n, np.int32) for n in responses),
        cut=(False,) * len(responses),
        label=None,
    )
