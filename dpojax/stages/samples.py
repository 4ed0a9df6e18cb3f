"""What a policy says during a run: responses to held-out prompts, their reward and their KL."""

from __future__ import annotations

import json
import pathlib
from collections.abc import Callable

import jax
import numpy as np

from dpojax.config.checks import naming
from dpojax.data.prompts import read_prompts
from dpojax.evaluation import policies
from dpojax.evaluation.policies import PolicyEvaluation, RankCorrelation
from dpojax.evaluation.rewards import open_reward
from dpojax.runs.policy import stop_tokens
from dpojax.sampling import build_sampler
from dpojax.stages.setup import Setup

SEED = 0  # of the held-out prompts and of the draws: runs with other seeds are judged alike
FILE = "samples.jsonl"


def open_samples(
    setup: Setup, reference_params: dict, score: Callable
) -> Callable[[dict], PolicyEvaluation]:
    """params -> what `config.samples` asks of that policy, against the reference.

    Responses that run into the length limit are counted, and no error: a policy that has lost its
    end is a result.

    Raises:
      ConfigError, DataError: a reward or prompts that are not there.
    """
    config = setup.config.samples
    with naming("samples.reward"):
        reward = open_reward(config.reward, mesh=setup.mesh)
    prompts = read_prompts(
        config.prompts, split="eval", limit=config.count, seed=SEED, tokenizer=setup.tokenizer
    )
    sampler = build_sampler(
        setup.model,
        max_new_tokens=config.max_new_tokens,
        stop=stop_tokens(setup.tokenizer, setup.config.model.path),
    )

    def evaluate(params: dict) -> PolicyEvaluation:
        return policies.evaluate(
            params,
            reference_params,
            setup.model,
            setup.tokenizer,
            prompts,
            reward,
            sampler=sampler,
            samples_per_prompt=config.per_prompt,
            seed=SEED,
            temperature=config.temperature,
            score=score,
            mesh=setup.mesh,
            fixed_length=True,
            shown=len(prompts),
        )

    return evaluate


def open_ranks(
    setup: Setup, reference_params: dict, score: Callable, held_out: PolicyEvaluation
) -> Callable[[dict], RankCorrelation]:
    """params -> how well the log-ratio to the reference, which is the implicit reward up to beta
    (Rafailov et al. 2023, eq. 5), orders the responses of `held_out` as their rewards do.

    Args:
      held_out: what `open_samples` gives for the reference: its own responses.
    """
    config = setup.config.samples
    how = {"split": "eval", "limit": config.count, "seed": SEED}
    prompts = read_prompts(config.prompts, tokenizer=setup.tokenizer, **how)
    ids = policies.encode_prompts(setup.tokenizer, prompts)
    limits = {"max_new_tokens": config.max_new_tokens, "batch_size": 64, "mesh": setup.mesh}
    logprobs = lambda params: policies.response_logprobs(
        score, params, ids, held_out.drawn, **limits
    )
    base, owner = logprobs(reference_params), np.repeat(np.arange(len(ids)), config.per_prompt)

    def ranks(params: dict) -> RankCorrelation:
        implicit = logprobs(params) - base
        pair = implicit.ravel(), held_out.rewards.ravel()
        return policies.rank_correlation(*pair, owner, resamples=200)

    return ranks


def append(folder: pathlib.Path, step: int, found: PolicyEvaluation) -> None:
    """One line per prompt in the stage's samples.jsonl: the first response to it."""
    if jax.process_index() == 0:
        ratios = found.log_ratios[:, 0].tolist()
        with open(folder / FILE, "a") as file:
            for text, ratio in zip(found.texts, ratios):
                line = {"step": step} | text._asdict() | {"log_ratio": ratio}
                file.write(json.dumps(line) + "\n")


def last_samples(folder: pathlib.Path) -> list[dict]:
    """What the last evaluation appended: one line for each different prompt, and once if a resumed
    run repeated it."""
    lines = [json.loads(line) for line in (folder / FILE).read_text().splitlines()]
    last = [line for line in lines if line["step"] == lines[-1]["step"]]
    return list({line["prompt"]: line for line in last}.values())
