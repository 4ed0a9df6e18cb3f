"""What a policy says during a run: responses to held-out prompts, their reward and their KL."""

from __future__ import annotations

import functools
import json
from collections.abc import Callable

import jax
import numpy as np

from dpojax import storage
from dpojax.config.errors import config_errors
from dpojax.data.prompts import read_prompts
from dpojax.evaluation import policies
from dpojax.evaluation.policies import PolicyEvaluation, RankCorrelation
from dpojax.evaluation.rewards import open_reward
from dpojax.sampling import build_sampler
from dpojax.stages import wins
from dpojax.stages.setup import Setup
from dpojax.stages.wins import AddWins, open_wins
from dpojax.training.metrics import forget_later_steps

SEED = 0  # of the held-out prompts and of the draws: runs with other seeds are judged alike
SEED_OF_REFERENCE = 1  # of the reference's draws that a judge compares with
FILE = "samples.jsonl"
WIN_SCORE = "win_score"  # field of a line there


def held_out_prompts(setup: Setup) -> list[str]:
    """The prompts that `config.samples` names."""
    config = setup.config.samples
    return read_prompts(
        config.prompts, split="eval", limit=config.count, seed=SEED, tokenizer=setup.tokenizer
    )


def open_samples(
    setup: Setup, reference_params: dict, score: Callable, *, reward_name: str
) -> Callable[[dict], PolicyEvaluation]:
    """params -> what `config.samples` measures of that policy, against the reference.

    Responses that run into the length limit are counted, and are no error: a policy that has lost
    its end is a result.

    Args:
      score: of `training.forward.build_score`, jitted.
      reward_name: see `evaluation.rewards.open_reward`; "" scores nothing.

    Raises:
      ConfigError, DataError: a reward or prompts that are not there.
    """
    config = setup.config.samples
    with config_errors("samples.reward"):
        reward = open_reward(reward_name, mesh=setup.mesh) if reward_name else None
    prompts = held_out_prompts(setup)
    sampler = build_sampler(
        setup.model, max_new_tokens=config.max_new_tokens, stop=setup.stop_tokens
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


def open_judged_samples(
    setup: Setup, reference_params: dict, score: Callable, *, reward_name: str
) -> Callable[[dict], PolicyEvaluation]:
    """Like `open_samples`, with the win rate where `config.samples` names a judge."""
    sample = open_samples(setup, reference_params, score, reward_name=reward_name)
    add_wins = _open_wins(setup, reference_params)

    def evaluate(params: dict) -> PolicyEvaluation:
        return add_wins(sample(params))

    return evaluate


def _open_wins(setup: Setup, reference_params: dict) -> AddWins:
    return open_wins(setup, reference_params, held_out_prompts(setup), SEED_OF_REFERENCE)


def open_ranks(
    setup: Setup, reference_params: dict, score: Callable, of_reference: PolicyEvaluation
) -> Callable[[dict], RankCorrelation]:
    """params -> how well the log-ratio to the reference orders responses as their rewards do.

    The log-ratio is the implicit reward up to beta (Rafailov et al. 2023, eq. 5).

    Args:
      of_reference: what `open_samples` gives for the reference: its own responses are ordered.
    """
    config = setup.config.samples
    prompts = policies.encode_prompts(setup.tokenizer, held_out_prompts(setup))
    logprobs = functools.partial(
        policies.response_logprobs,
        score,
        prompts=prompts,
        drawn=of_reference.drawn,
        max_new_tokens=config.max_new_tokens,
        batch_size=64,
        mesh=setup.mesh,
    )
    reference_logprobs = logprobs(params=reference_params)
    prompt_of_response = np.repeat(np.arange(len(prompts)), config.per_prompt)

    def ranks(params: dict) -> RankCorrelation:
        log_ratios = logprobs(params=params) - reference_logprobs
        return policies.rank_correlation(
            log_ratios.ravel(), of_reference.rewards.ravel(), prompt_of_response, resamples=200
        )

    return ranks


def sampled_metrics(
    setup: Setup, reference_params: dict, score: Callable, *, starts_at_reference: bool
) -> Callable[[dict, int, storage.Path], dict[str, float]]:
    """(params, step, folder) -> metrics of what a policy says; its texts go into the folder.

    Args:
      starts_at_reference: the policy at step 0 is the reference.
    """
    reward_name = setup.config.samples.reward
    evaluate = open_samples(setup, reference_params, score, reward_name=reward_name)
    of_reference = evaluate(reference_params)
    add_wins = _open_wins(setup, reference_params)
    ranks = open_ranks(setup, reference_params, score, of_reference) if reward_name else None

    def metrics(params: dict, step: int, folder: storage.Path) -> dict[str, float]:
        is_reference = step == 0 and starts_at_reference
        evaluation = add_wins(of_reference if is_reference else evaluate(params))
        of_ranks = ranks(params).metrics() if ranks else {}
        append_samples(folder, step, evaluation)  # last: a signal may end what comes before
        return evaluation.metrics() | of_ranks

    return metrics


def sample_metric_names(setup: Setup, *, reward_name: str, with_ranks: bool) -> list[str]:
    """The names of what evaluations measure of samples, without drawing any.

    Args:
      reward_name: see `open_samples`.
      with_ranks: whether evaluations have the rank correlation.
    """
    names = list(policies.SAMPLE_METRICS)
    names += policies.REWARD_METRICS if reward_name else ()
    names += policies.RANK_METRICS if with_ranks else ()
    return [*names, *(wins.METRICS if setup.config.samples.judge else ())]


def append_samples(folder: storage.Path, step: int, evaluation: PolicyEvaluation) -> None:
    """One line per prompt in the stage's samples.jsonl: the first response to it.

    The reward is that of this response; `win_score` is of all responses to the prompt.
    """
    if jax.process_index() != 0:
        return
    ratios = evaluation.log_ratios[:, 0].tolist()
    with storage.LineWriter(folder / FILE) as lines:
        for index, (text, ratio) in enumerate(zip(evaluation.texts, ratios)):
            line = {"step": step} | text._asdict() | {"log_ratio": ratio}
            if evaluation.win_scores:
                line[WIN_SCORE] = evaluation.win_scores[index]
            known = {name: x for name, x in line.items() if x == x}  # without nan
            lines.write(json.dumps(known))


def forget_later_samples(folder: storage.Path, step: int | None) -> None:
    """Remove what evaluations after a step appended: a run that is resumed there repeats them.

    Args:
      step: that a run resumes at; None where it begins.
    """
    if jax.process_index() == 0:
        forget_later_steps(folder / FILE, -1 if step is None else step)


def last_samples(folder: storage.Path, step: int | None = None) -> list[dict]:
    """What the evaluation at a step appended, or the last: one line for each different prompt.

    Several prompts may be equal; the last of them counts.
    """
    lines = [line for line in storage.read_records(folder / FILE) if {"step", "prompt"} <= {*line}]
    step = lines[-1]["step"] if step is None and lines else step
    last = [line for line in lines if line["step"] == step]
    return list({line["prompt"]: line for line in last}.values())
