"""A policy on held-out prompts, by its own samples: reward, KL from the reference, and the texts.

found = evaluate(params, reference_params, model, tokenizer, prompts, reward,
                 sampler=sampler, samples_per_prompt=4, seed=0)
found.reward.value, found.kl.value, found.kl_of_tokens.error
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from typing import NamedTuple

import jax
import numpy as np
from jax.sharding import Mesh
from numpy.typing import ArrayLike, NDArray

from dpojax.data.packing import Shape, Size, first_fit, size_of
from dpojax.data.records import Record
from dpojax.data.rows import Rows, collate
from dpojax.data.tokenise import Example, TokenizeConfig, tokenise
from dpojax.evaluation.frontier import Estimate, mean_over_prompts
from dpojax.evaluation.rewards import Reward
from dpojax.evaluation.text_statistics import Lengths, distinct_n, lengths, mean_repetition
from dpojax.models.decoder import Model, Params
from dpojax.sampling import Sample, Sampler, generate
from dpojax.sharding import put_rows, row_shards, to_host
from dpojax.training.forward import build_score

NO_LIMIT = 2**30  # tokens: how long a prompt may be is the sampler's to say


class NothingStopped(ValueError):
    """Every response ran into the length limit."""


class SampledText(NamedTuple):
    """One response as it was scored."""

    prompt: str
    response: str
    reward: float
    stopped: bool


class PolicyEvaluation(NamedTuple):
    """What P prompts with K samples each say of a policy; errors are over prompts.

    Attributes:
      reward: the mean.
      kl: KL(policy || reference) of whole responses, nats, as the mean log-ratio; of the policy as
        it was sampled, with its temperature. A cut response counts with the tokens that it has.
      kl_of_tokens: the same expectation with each token's log-ratio replaced by the exact KL of the
        next-token distributions (Amini et al. 2025), so of less variance; nan unless the
        temperature is 1.
      lengths: tokens of the responses, without the stop token.
      stopped: share of responses that ended before the length limit.
      distinct_1, distinct_2, repetition: see `text_statistics`; repetition of 4-grams.
      texts: the first sample of each of the first prompts.
      rewards, log_ratios: [P, K].
      drawn: K samples of each prompt.
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

    def metrics(self) -> dict[str, float]:
        """The numbers by the names that they have in metrics.jsonl."""
        estimates = {"reward": self.reward, "kl": self.kl, "kl_of_tokens": self.kl_of_tokens}
        found = {"length": self.lengths.mean}
        found |= {name: estimate.value for name, estimate in estimates.items()}
        found |= {f"{name}_error": estimate.error for name, estimate in estimates.items()}
        names = ("stopped", "distinct_1", "distinct_2", "repetition")
        found |= {name: getattr(self, name) for name in names}
        return {f"samples/{name}": float(value) for name, value in found.items()}


def evaluate(
    params: Params,
    reference_params: Params,
    model: Model,
    tokenizer,
    prompts: Sequence[str],
    reward: Callable[[Sequence[str], Sequence[str]], np.ndarray],
    *,
    sampler: Sampler,
    samples_per_prompt: int,
    seed: int,
    temperature: float = 1.0,
    batch_size: int = 64,
    score: Callable | None = None,
    mesh: Mesh | None = None,
    fixed_length: bool = False,
    shown: int = 4,
) -> PolicyEvaluation:
    """Draw from the policy and score what it says.

    Every program has one shape for given prompts, so evaluating again compiles nothing. In a run of
    several processes all call it.

    Args:
      prompts: texts; randomness is keyed by their places.
      reward: as `rewards.Reward`.
      batch_size: prompts of a batch to sample, and, about, responses of one to score.
      score: the jitted `training.forward.build_score(model)` of the run; None makes one.
      mesh: that of both params; None: they lie on one device.
      fixed_length: responses that all run into the length limit are no error.
      shown: how many `texts` to keep.

    Raises:
      NothingStopped: see `require_stops`.
      RewardError: see `rewards.Reward`.
    """
    ids = encode_prompts(tokenizer, prompts)
    how = {"seed": seed, "temperature": temperature, "samples": samples_per_prompt}
    limits = {"max_new_tokens": sampler.max_new_tokens, "batch_size": batch_size, "mesh": mesh}
    with nullcontext() if mesh is None else jax.set_mesh(mesh):
        drawn = generate(sampler, params, ids, batch_size=batch_size, **how)
        if not fixed_length:
            require_stops(drawn, sampler)
        score = score or jax.jit(build_score(model))
        ratios, token_kl = divergences(score, params, reference_params, ids, drawn, **limits)
    responses = [response_texts(tokenizer, *pair) for pair in zip(ids, drawn)]
    asked = [prompt for prompt in prompts for _ in range(samples_per_prompt)]
    reward = reward if isinstance(reward, Reward) else Reward("reward", reward)
    rewards = reward(asked, [text for own in responses for text in own]).reshape(ratios.shape)
    found = _summary(drawn, rewards, ratios, token_kl if temperature == 1 else None)
    rows = zip(prompts, responses, rewards, drawn)
    texts = [SampledText(p, t[0], float(r[0]), d[0].stopped) for p, t, r, d in rows]
    return found._replace(texts=texts[:shown])


def _summary(drawn, rewards, ratios, token_kl) -> PolicyEvaluation:
    """All but the texts; arrays are [P, K]."""
    samples = [sample for own in drawn for sample in own]
    group = np.arange(rewards.size) // rewards.shape[1]
    words = [s.tokens[: len(s.tokens) - s.stopped].tolist() for s in samples]
    mean = lambda values: mean_over_prompts(values.ravel(), group)
    return PolicyEvaluation(
        mean(rewards),
        mean(ratios),
        Estimate(np.nan, np.nan) if token_kl is None else mean(token_kl),
        lengths(words),
        float(np.mean([s.stopped for s in samples])),
        distinct_n(words, 1),
        distinct_n(words, 2),
        mean_repetition(words),
        [],
        rewards,
        ratios,
        drawn,
    )


def encode_prompts(tokenizer, prompts: Sequence[str]) -> list[np.ndarray]:
    """Token ids of each prompt, as they stand before a response in training."""
    records = [Record(f"prompt {i}", prompt, ("",)) for i, prompt in enumerate(prompts)]
    policy = TokenizeConfig(max_length=NO_LIMIT, truncation="error", identical="keep", empty="keep")
    return [example.prompt for example in tokenise(records, tokenizer, policy)[0]]


def response_texts(tokenizer, prompt: Sequence[int], samples: Sequence[Sample]) -> list[str]:
    """What each sample adds to the prompt's text, special tokens left out: " was fine"."""

    def decode(ids) -> str:
        return tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)

    prompt = [int(token) for token in prompt]
    before, texts = decode(prompt), []
    for sample in samples:
        own = sample.tokens.tolist()
        # Decoded alone, a first token would lose its space in some tokenizers.
        whole = decode(prompt + own)
        texts.append(whole[len(before) :] if whole.startswith(before) else decode(own))
    return texts


def require_stops(drawn: Sequence[Sequence[Sample]], sampler: Sampler) -> None:
    """Raise NothingStopped if there are responses, and none ended before the length limit."""
    samples = [sample for own in drawn for sample in own]
    if samples and not any(sample.stopped for sample in samples):
        raise NothingStopped(
            f"all {len(samples)} responses were cut at max_new_tokens = {sampler.max_new_tokens}; "
            f"none reached a stop token (ids {list(sampler.stop)}): raise max_new_tokens, check "
            "the stop tokens and whether the policy was trained to end, or say that a fixed "
            "length is meant (fixed_length)"
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
    """Of every response, nats [P, K]: its log-ratio policy / reference, and its tokens' exact KL.

    Both log-probs come from `score`, so equal weights give exactly 0. The log-ratio is of the
    policy as it was sampled, with its temperature; KL(policy || reference), summed over the
    response's contexts, is that of temperature 1.

    Args:
      score: jitted `training.forward.build_score(model)`.
      prompts: token ids. drawn: K samples of each.
    """
    count = sum(map(len, drawn))
    ratio, kl = np.zeros((2, count))
    limits = {"max_new_tokens": max_new_tokens, "batch_size": batch_size, "mesh": mesh}
    for rows, placed in _batches(prompts, drawn, **limits):
        own = score(params, placed)
        # Roles are exchanged: `kl` is that of the third argument from the first.
        theirs = score(reference_params, placed, reference=params)
        own, theirs, exact = to_host((own.logprob, theirs.logprob, theirs.kl))
        ratio += _by_example(rows, np.float64(own) - theirs, count)
        kl += _by_example(rows, exact, count)
    samples = [sample for own in drawn for sample in own]
    ratio += [np.sum(s.behaviour - s.logprobs, dtype=np.float64) for s in samples]
    return ratio.reshape(len(drawn), -1), kl.reshape(len(drawn), -1)


def response_logprobs(
    score: Callable,
    params: Params,
    prompts: Sequence[np.ndarray],
    drawn: Sequence[Sequence[Sample]],
    **limits,
) -> NDArray[np.float64]:
    """Log-prob of every response at temperature 1, whichever policy drew it, nats [P, K].

    Args: as of `divergences`.
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
    """The responses, packed into rows, about `batch_size` at a time: as NumPy and on the mesh."""
    examples = [
        Example(f"prompt {i}", prompt, (sample.tokens,), (not sample.stopped,), None)
        for i, (prompt, own) in enumerate(zip(prompts, drawn))
        for sample in own
    ]
    shards = 1 if mesh is None else row_shards(mesh)
    count = -(-batch_size // (2 * shards)) * shards  # most rows hold two responses or more
    shape = _shape(prompts, max_new_tokens, count)
    sizes = [size_of(example) for example in examples]
    packed = first_fit(sizes, Size(shape.length, shape.scored))
    for start in range(0, len(packed), shape.rows):
        # Whole rows of a first fit are packed by it in the same way again.
        chosen = [index for row in packed[start : start + shape.rows] for index in row]
        rows = collate(examples, sorted(chosen), shape)
        yield rows, rows if mesh is None else put_rows(rows, mesh)


def _shape(prompts: Sequence[np.ndarray], new: int, rows: int) -> Shape:
    """The one shape for all batches of `rows` rows, whatever the responses' lengths."""
    lengths = [len(prompt) for prompt in prompts]
    length = -(-(max(lengths) + new) // 32) * 32
    return Shape(1, rows, length, scored=length, examples=length // (min(lengths) + 1), responses=1)


def _by_example(rows: Rows, values: np.ndarray, count: int) -> np.ndarray:
    """Sums [count] of the values [M, R, S] of scored tokens over each example's own."""
    scored = rows.response >= 0
    owner = np.take_along_axis(rows.example, np.maximum(rows.response, 0), axis=-1)
    return np.bincount(owner[scored], values[scored].astype(np.float64), minlength=count)


class RankCorrelation(NamedTuple):
    """Spearman's rho and a 95 % interval; nan where a side has only one value."""

    value: float
    low: float
    high: float

    def metrics(self) -> dict[str, float]:
        """By the names of metrics.jsonl, with the standard error that the interval would be of."""
        error = (self.high - self.low) / (2 * 1.96)
        name = "samples/rank_correlation"
        return {name: self.value, f"{name}_error": error}


def rank_correlation(
    implicit: ArrayLike,
    exact: ArrayLike,
    prompts: ArrayLike | None = None,
    *,
    resamples: int = 1000,
    seed: int = 0,
) -> RankCorrelation:
    """How well one reward orders responses as another does, such as DPO's implicit reward.

    The interval is a percentile bootstrap over prompts, whose responses stay together.

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
    found = [_spearman(pair[:, np.concatenate([members[g] for g in row])]) for row in drawn]
    known = [value for value in found if not np.isnan(value)]
    low, high = np.quantile(known, [0.025, 0.975]) if known else (np.nan, np.nan)
    return RankCorrelation(_spearman(pair), float(low), float(high))


def _spearman(pair: np.ndarray) -> float:
    """Of two rows [2, n]: the correlation of their ranks, equal values sharing their mean rank."""
    from scipy.stats import rankdata  # takes a second, which no run waits for at its start

    ranks = rankdata(pair, axis=1)
    a, b = ranks - ranks.mean(axis=1, keepdims=True)
    norm = np.sqrt((a @ a) * (b @ b))
    return float(a @ b / norm) if norm else np.nan
