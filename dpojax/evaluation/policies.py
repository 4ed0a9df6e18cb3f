"""Evaluates a policy by its own samples for held-out prompts: reward, KL from the reference, texts.

evaluation = evaluate(params, reference_params, model, tokenizer, prompts, reward,
                      sampler=sampler, samples_per_prompt=4, seed=0)
evaluation.reward.value, evaluation.kl.value, evaluation.kl_of_tokens.error
"""

from __future__ import annotations

import types
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from typing import NamedTuple

import jax
import numpy as np
from jax.sharding import Mesh
from numpy.typing import ArrayLike, NDArray

from dpojax.data.examples import Example
from dpojax.data.filling import Size, first_fit
from dpojax.data.packing import Shape, size_of
from dpojax.data.records import Record
from dpojax.data.rows import Rows, collate
from dpojax.data.tokenise import tokenise
from dpojax.data.tokenize_config import TokenizeConfig
from dpojax.evaluation.frontier import Estimate, mean_over_prompts
from dpojax.evaluation.rewards import Reward
from dpojax.evaluation.text_statistics import Lengths, distinct_n, lengths, mean_repetition
from dpojax.models.decoder import Model, Params
from dpojax.sampling import Sample, Sampler, generate
from dpojax.sharding import put_rows, row_shards, settle, to_host
from dpojax.training.forward import build_score

BATCH_SIZE = 64  # prompts that are sampled at a time
NO_LIMIT = 2**30  # tokens; the sampler limits the length of a prompt

# Names in metrics.jsonl: of all samples, of those that a reward scores, of rank correlations.
SAMPLE_METRICS = tuple(
    f"samples/{name}"
    for name in (
        "length",
        "kl",
        "kl_of_tokens",
        "kl_error",
        "kl_of_tokens_error",
        "stopped",
        "distinct_1",
        "distinct_2",
        "repetition",
    )
)
REWARD_METRICS = ("samples/reward", "samples/reward_error")
RANK_METRICS = ("samples/rank_correlation", "samples/rank_correlation_error")


class NothingStopped(ValueError):
    """Every response ran into the length limit."""


class SampledText(NamedTuple):
    """One response and its reward."""

    prompt: str
    response: str
    reward: float
    stopped: bool


class PolicyEvaluation(NamedTuple):
    """Measurements on K samples of a policy for each of P prompts; errors are over prompts.

    Attributes:
      reward: the mean.
      kl: KL(policy || reference) of whole responses, nats, by the mean log-ratio. The policy is the
        one that was sampled, at its temperature. A truncated response counts with its tokens.
      kl_of_tokens: the same expectation with less variance: each token's log-ratio is replaced by
        the exact KL of the next-token distributions (Amini et al. 2025). nan unless the temperature
        is 1.
      lengths: tokens of the responses, without the stop token.
      stopped: share of responses that ended before the length limit.
      distinct_1, distinct_2, repetition: see `text_statistics`; repetition is that of 4-grams.
      texts: the first sample of each of the first prompts.
      rewards, log_ratios: [P, K]; rewards are nan where no reward scores.
      drawn: the K samples of each prompt.
      responses: their texts, [P][K].
      judged: what a judge says of them, by metric; empty without one.
      win_scores: of each prompt, the share of its comparisons that were won; empty without a judge.
    """

    reward: Estimate
    kl: Estimate
    kl_of_tokens: Estimate
    lengths: Lengths
    stopped: float
    distinct_1: float
    distinct_2: float
    repetition: float
    texts: list[SampledText]
    rewards: NDArray[np.float64]
    log_ratios: NDArray[np.float64]
    drawn: list[list[Sample]]
    responses: list[list[str]]
    judged: Mapping[str, float] = types.MappingProxyType({})
    win_scores: Sequence[float] = ()

    def metrics(self) -> dict[str, float]:
        """The numbers under their names in metrics.jsonl."""
        values = (
            self.lengths.mean,
            self.kl.value,
            self.kl_of_tokens.value,
            self.kl.error,
            self.kl_of_tokens.error,
            self.stopped,
            self.distinct_1,
            self.distinct_2,
            self.repetition,
        )
        named = dict(zip(SAMPLE_METRICS, map(float, values), strict=True))
        if not np.isnan(self.rewards).all():
            named |= dict(zip(REWARD_METRICS, map(float, self.reward)))
        return named | self.judged


def evaluate(
    params: Params,
    reference_params: Params,
    model: Model,
    tokenizer,
    prompts: Sequence[str],
    reward: Callable[[Sequence[str], Sequence[str]], np.ndarray] | None,
    *,
    sampler: Sampler,
    samples_per_prompt: int,
    seed: int,
    temperature: float = 1.0,
    batch_size: int = BATCH_SIZE,
    score: Callable | None = None,
    mesh: Mesh | None = None,
    fixed_length: bool = False,
    shown: int = 4,
) -> PolicyEvaluation:
    """Sample from the policy and score the responses.

    The shapes depend on the prompts only, so a second evaluation compiles nothing. In a run of
    several processes, all of them have to call it.

    Args:
      params, reference_params: weights of the policy and of the reference.
      model, tokenizer: of both.
      prompts: P texts; a prompt's random numbers depend on its index.
      reward: maps (prompts, responses) to scores, see `rewards.Reward`; None scores nothing.
      sampler: draws the responses.
      samples_per_prompt: K.
      seed: of the samples.
      temperature: of the samples.
      batch_size: prompts in a batch for sampling, and about the number of responses in a batch for
        scoring.
      score: the jitted `training.forward.build_score(model)` of the run; None builds one.
      mesh: where both params are; None is one device.
      fixed_length: accept that no response ends before the length limit.
      shown: number of `texts` in the result.

    Raises:
      NothingStopped: see `require_stops`.
      RewardError: see `rewards.Reward`.
    """
    ids = encode_prompts(tokenizer, prompts)
    sampling = {"seed": seed, "temperature": temperature, "samples": samples_per_prompt}
    limits = {"max_new_tokens": sampler.max_new_tokens, "batch_size": batch_size, "mesh": mesh}
    with nullcontext() if mesh is None else jax.set_mesh(mesh):
        drawn = generate(sampler, params, ids, batch_size=batch_size, **sampling)
        if not fixed_length:
            require_stops(drawn, sampler)
        score = score or jax.jit(build_score(model))
        ratios, token_kl = divergences(score, params, reference_params, ids, drawn, **limits)
    responses = [response_texts(tokenizer, *pair) for pair in zip(ids, drawn)]
    rewards = _rewards(reward, prompts, responses)
    evaluation = _summary(drawn, rewards, ratios, token_kl if temperature == 1 else None)
    texts = [
        SampledText(prompt, texts[0], float(scores[0]), samples[0].stopped)
        for prompt, texts, scores, samples in zip(prompts, responses, rewards, drawn)
    ]
    return evaluation._replace(texts=texts[:shown], responses=responses)


def _rewards(
    reward: Callable | None, prompts: Sequence[str], responses: Sequence[Sequence[str]]
) -> NDArray[np.float64]:
    """Score K responses to each of P prompts, [P, K]."""
    if reward is None:
        return np.full((len(prompts), len(responses[0])), np.nan)
    reward = reward if isinstance(reward, Reward) else Reward("reward", reward)
    repeated = [prompt for prompt, texts in zip(prompts, responses) for _ in texts]
    scores = reward(repeated, [text for texts in responses for text in texts])
    return scores.reshape(len(prompts), -1)


def _summary(
    drawn: list[list[Sample]],
    rewards: NDArray[np.float64],
    ratios: NDArray[np.float64],
    token_kl: NDArray[np.float64] | None,
) -> PolicyEvaluation:
    """Average over the samples, without texts; arrays are [P, K]."""
    samples = [sample for group in drawn for sample in group]
    prompt_of_sample = np.arange(rewards.size) // rewards.shape[1]
    tokens = [s.tokens[: len(s.tokens) - s.stopped].tolist() for s in samples]

    def mean(values: NDArray[np.float64]) -> Estimate:
        return mean_over_prompts(values.ravel(), prompt_of_sample)

    return PolicyEvaluation(
        reward=mean(rewards),
        kl=mean(ratios),
        kl_of_tokens=Estimate(np.nan, np.nan) if token_kl is None else mean(token_kl),
        lengths=lengths(tokens),
        stopped=float(np.mean([s.stopped for s in samples])),
        distinct_1=distinct_n(tokens, 1),
        distinct_2=distinct_n(tokens, 2),
        repetition=mean_repetition(tokens),
        texts=[],
        rewards=rewards,
        log_ratios=ratios,
        drawn=drawn,
        responses=[],
    )


def encode_prompts(tokenizer, prompts: Sequence[str]) -> list[np.ndarray]:
    """Token ids of each prompt, the same as before a response in training."""
    records = [Record(f"prompt {i}", prompt, ("",)) for i, prompt in enumerate(prompts)]
    config = TokenizeConfig(max_length=NO_LIMIT, truncation="error", identical="keep", empty="keep")
    examples, _ = tokenise(records, tokenizer, config)
    return [example.prompt for example in examples]


def response_texts(tokenizer, prompt: Sequence[int], samples: Sequence[Sample]) -> list[str]:
    """The text that each sample adds to its prompt, such as " was fine", without special tokens."""

    def decode(ids) -> str:
        return tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)

    prompt = [int(token) for token in prompt]
    before, texts = decode(prompt), []
    for sample in samples:
        tokens = sample.tokens.tolist()
        # Decoded alone, the first token would lose its space under some tokenizers.
        whole = decode(prompt + tokens)
        texts.append(whole[len(before) :] if whole.startswith(before) else decode(tokens))
    return texts


def require_stops(drawn: Sequence[Sequence[Sample]], sampler: Sampler) -> None:
    """Raise NothingStopped if there are responses, and none ended before the length limit."""
    samples = [sample for group in drawn for sample in group]
    if samples and not any(sample.stopped for sample in samples):
        raise NothingStopped(
            f"all {len(samples)} responses were cut at max_new_tokens = {sampler.max_new_tokens}; "
            f"none reached a stop token (ids {list(sampler.stop)}): raise max_new_tokens, check "
            "the stop tokens and whether the policy was trained to end, or set fixed_length if "
            "this is intended"
        )


def divergences(
    score: Callable,
    params: Params,
    reference_params: Params,
    prompts: Sequence[np.ndarray],
    drawn: Sequence[Sequence[Sample]],
    *,
    max_new_tokens: int,
    batch_size: int,
    mesh: Mesh | None = None,
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Compute the log-ratio and the exact token KLs of every response.

    Both log-probs come from `score`, so equal weights give exactly 0. The log-ratio belongs to the
    policy that was sampled, at its temperature. The KL is that of temperature 1.

    Args:
      score: jitted `training.forward.build_score(model)`.
      params, reference_params: weights of the policy and of the reference.
      prompts: token ids of P prompts.
      drawn: K samples of each.
      max_new_tokens: most tokens of a sample.
      batch_size: about the number of responses in a batch.
      mesh: where both params are; None is one device.

    Returns:
      log policy(y) - log reference(y) and KL(policy || reference) summed over the contexts of the
      response's tokens, both in nats, [P, K].
    """
    count = sum(map(len, drawn))
    ratio, kl = np.zeros((2, count))
    limits = {"max_new_tokens": max_new_tokens, "batch_size": batch_size, "mesh": mesh}
    for rows, placed in _batches(prompts, drawn, **limits):
        of_policy = settle(score(params, placed))
        # `score` returns KL(reference || params), so the policy is passed as the reference here.
        of_reference = score(reference_params, placed, reference=params)
        policy_logprob, reference_logprob, token_kl = to_host(
            (of_policy.logprob, of_reference.logprob, of_reference.kl)
        )
        ratio += _by_example(rows, np.float64(policy_logprob) - reference_logprob, count)
        kl += _by_example(rows, token_kl, count)
    # `behaviour` are the log-probs at the sampling temperature, `logprobs` those at temperature 1.
    samples = [sample for group in drawn for sample in group]
    ratio += [np.sum(s.behaviour - s.logprobs, dtype=np.float64) for s in samples]
    return ratio.reshape(len(drawn), -1), kl.reshape(len(drawn), -1)


def response_logprobs(
    score: Callable,
    params: Params,
    prompts: Sequence[np.ndarray],
    drawn: Sequence[Sequence[Sample]],
    **limits,
) -> NDArray[np.float64]:
    """Log-prob of every response at temperature 1, nats [P, K], whichever policy sampled it.

    Arguments are those of `divergences`.
    """
    count = sum(map(len, drawn))
    total = np.zeros(count)
    for rows, placed in _batches(prompts, drawn, **limits):
        total += _by_example(rows, to_host(score(params, placed).logprob), count)
    return total.reshape(len(drawn), -1)


def _batches(
    prompts: Sequence[np.ndarray],
    drawn: Sequence[Sequence[Sample]],
    *,
    max_new_tokens: int,
    batch_size: int,
    mesh: Mesh | None = None,
) -> Iterator[tuple[Rows, Rows]]:
    """Yield batches of about `batch_size` responses, each as NumPy rows and on the mesh."""
    examples = [
        Example(f"prompt {i}", prompt, (sample.tokens,), (not sample.stopped,), None)
        for i, (prompt, samples) in enumerate(zip(prompts, drawn))
        for sample in samples
    ]
    shards = 1 if mesh is None else row_shards(mesh)
    count = -(-batch_size // (2 * shards)) * shards  # most rows hold two responses or more
    shape = _shape(prompts, max_new_tokens, count)
    sizes = [size_of(example) for example in examples]
    packed = first_fit(sizes, Size(shape.length, shape.scored))
    for start in range(0, len(packed), shape.rows):
        # `collate` packs the examples of whole rows of a first fit into the same rows again.
        chosen = [index for row in packed[start : start + shape.rows] for index in row]
        rows = collate(examples, sorted(chosen), shape)
        yield rows, rows if mesh is None else put_rows(rows, mesh)


def _shape(prompts: Sequence[np.ndarray], new: int, rows: int) -> Shape:
    """One shape for all batches of `rows` rows and responses of up to `new` tokens."""
    prompt_lengths = [len(prompt) for prompt in prompts]
    length = -(-(max(prompt_lengths) + new) // 32) * 32
    return Shape(
        micro_batches=1,
        rows=rows,
        length=length,
        scored=length,
        examples=length // (min(prompt_lengths) + 1),
        responses=1,
    )


def _by_example(rows: Rows, values: np.ndarray, count: int) -> np.ndarray:
    """Sum the values [M, R, S] of scored tokens over each example, [count]."""
    scored = rows.response >= 0
    example = np.take_along_axis(rows.example, np.maximum(rows.response, 0), axis=-1)  # [M, R, S]
    return np.bincount(example[scored], values[scored].astype(np.float64), minlength=count)


class RankCorrelation(NamedTuple):
    """Spearman's rho and a 95 % interval; nan if one of the rewards is constant."""

    value: float
    low: float
    high: float

    def metrics(self) -> dict[str, float]:
        """The numbers under their names in metrics.jsonl, with a standard error."""
        # That of a normal distribution with the same 95 % interval.
        error = (self.high - self.low) / (2 * 1.96)
        return dict(zip(RANK_METRICS, (self.value, error), strict=True))


def rank_correlation(
    implicit: ArrayLike,
    exact: ArrayLike,
    prompts: ArrayLike | None = None,
    *,
    resamples: int = 1000,
    seed: int = 0,
) -> RankCorrelation:
    """Spearman's rank correlation of two rewards, such as DPO's implicit and the exact one.

    The interval is a percentile bootstrap that resamples prompts with all their responses.

    Args:
      implicit, exact: [responses].
      prompts: [responses], any labels; None: each response has its own prompt.

    Raises:
      ValueError: shapes that differ, or fewer than 3 responses.

    >>> print(rank_correlation([0.1, 0.2, 0.3, 0.4], [1.0, 5.0, 7.0, 9.0]).value)
    1.0
    """
    pair = np.stack([np.asarray(implicit, np.float64), np.asarray(exact, np.float64)])
    labels = np.arange(pair.shape[1]) if prompts is None else np.asarray(prompts)
    if pair.ndim != 2 or pair.shape[1] < 3 or labels.shape != pair.shape[1:]:
        raise ValueError(
            "rank_correlation: need 3 or more responses, as many numbers of each reward and as "
            f"many prompts; got shapes {pair.shape[1:]} and {labels.shape}"
        )
    _, group = np.unique(labels, return_inverse=True)
    members = np.split(np.argsort(group, kind="stable"), np.cumsum(np.bincount(group))[:-1])
    rng = np.random.default_rng(seed)
    drawn = rng.integers(0, len(members), (resamples, len(members)))
    values = [_spearman(pair[:, np.concatenate([members[g] for g in row])]) for row in drawn]
    known = [value for value in values if not np.isnan(value)]
    low, high = np.quantile(known, [0.025, 0.975]) if known else (np.nan, np.nan)
    return RankCorrelation(_spearman(pair), float(low), float(high))


def _spearman(pair: np.ndarray) -> float:
    """Correlation of the ranks of two rows [2, n]; equal values share their mean rank."""
    from scipy.stats import rankdata  # the import takes a second, which no run should wait for

    ranks = rankdata(pair, axis=1)
    a, b = ranks - ranks.mean(axis=1, keepdims=True)
    norm = np.sqrt((a @ a) * (b @ b))
    return float(a @ b / norm) if norm else np.nan
