"""Confidence intervals over prompts: a Bayesian bootstrap with two pseudo-prompts.

Rubin 1981, "The Bayesian bootstrap". A resample gives every prompt a random weight, drawn from an
exponential distribution. All comparisons of a prompt share its weight, so that several samples per
prompt are one cluster. The ends of a 95 % interval are the 2.5 and 97.5 % quantiles of the weighted
statistic over the resamples.

An ordinary bootstrap of a judge that prefers A on all of 50 prompts gives the interval [1, 1]. Two
pseudo-prompts, one at each end of the scale, mend that. For a share they weigh as much as a prompt
each: of k wins on n prompts the interval is that of Beta(k + 1, n - k + 1). For a number between -1
and 1 they weigh half a prompt each, as in Agresti & Min 2005. Where a prompt has k comparisons, a
pseudo-prompt is made smaller, down to 1/k of that, as far as these are independent of each other.
Pseudo-prompts affect intervals only, never the values.
"""

from __future__ import annotations

import functools
from collections.abc import Hashable, Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

Array = NDArray[np.float64]

LEVEL = 0.95
RESAMPLES = 2000
SHARE = (0.0, 1.0)  # ends of the scale of a share
SIGNED = (-1.0, 1.0)  # ends of the scale of a difference of shares
MASSES = {SHARE: (1.0, 1.0), SIGNED: (0.5, 0.5)}  # weights of the pseudo-prompts, in prompts


class Measured(NamedTuple):
    """A number with the ends of its 95 % interval; all are nan where nothing was measured."""

    value: float
    low: float
    high: float


UNKNOWN = Measured(np.nan, np.nan, np.nan)


@functools.lru_cache(maxsize=2)
def _weights(prompts: int, resamples: int, seed: int) -> Array:
    weights = np.random.default_rng(seed).standard_exponential((resamples, prompts))
    weights.flags.writeable = False  # the cache hands out the same array again
    return weights


def prompt_weights(prompts: int, *, resamples: int = RESAMPLES, seed: int = 0) -> Array:
    """Random weights of the prompts, [resamples, prompts], with mean 1; read-only."""
    return _weights(prompts, resamples, seed)


def pseudo_weights(masses: Sequence[float], *, resamples: int = RESAMPLES, seed: int = 0) -> Array:
    """Random weights of pseudo-prompts, [resamples, pseudo-prompts].

    Args:
      masses: the mean of each weight; a prompt has 1.
    """
    return np.random.default_rng([seed, 1]).standard_gamma(masses, (resamples, len(masses)))


def interval(value: float, resampled: ArrayLike) -> Measured:
    """A value with the quantiles of its resamples. The interval always contains the value."""
    tail = 50 * (1 - LEVEL)
    low, high = np.percentile(resampled, [tail, 100 - tail])
    return Measured(float(value), float(min(low, value)), float(max(high, value)))


def ratio(
    numerators: ArrayLike,
    denominators: ArrayLike,
    ends: tuple[float, float] = SHARE,
    *,
    per_prompt: float = 1.0,
    resamples: int = RESAMPLES,
    seed: int = 0,
) -> Measured:
    """sum(numerators) / sum(denominators), with an interval over prompts.

    Args:
      numerators: [prompts].
      denominators: [prompts], not negative; a prompt with 0 counts for nothing.
      ends: smallest and largest value that the ratio can have: `SHARE` or `SIGNED`.
      per_prompt: comparisons per prompt.

    Returns:
      `UNKNOWN` if all denominators are 0.
    """
    numerators, denominators = np.asarray(numerators, float), np.asarray(denominators, float)
    counted = denominators > 0
    if not counted.any():
        return UNKNOWN
    numerators = np.where(counted, numerators, 0)
    size = pseudo_size(numerators, denominators, ends, per_prompt)
    weights = prompt_weights(len(numerators), resamples=resamples, seed=seed)
    pseudo = size * pseudo_weights(MASSES[ends], resamples=resamples, seed=seed)
    tops = weights @ numerators + pseudo @ np.array(ends)
    bottoms = weights @ denominators + pseudo.sum(1)
    return interval(numerators.sum() / denominators.sum(), tops / bottoms)


def pseudo_size(
    numerators: Array, denominators: Array, ends: tuple[float, float], per_prompt: float
) -> float:
    """The denominator of a pseudo-prompt: that of a mean prompt, or less.

    It shrinks with the variance between prompts, relative to that of prompts whose comparisons are
    all the same (a design effect), but to no less than one comparison. Arguments: see `ratio`.
    """
    counted = denominators > 0
    value = numerators.sum() / denominators.sum()
    largest = (value - ends[0]) * (ends[1] - value) * (denominators**2).sum()
    between = ((numerators - value * denominators)[counted] ** 2).sum()
    shrunk = between / largest if largest > 0 else 1.0
    return float(denominators[counted].mean() * np.clip(shrunk, 1 / max(1, per_prompt), 1))


def mean_over_prompts(
    values: ArrayLike,
    prompts: ArrayLike,
    ends: tuple[float, float] = SHARE,
    *,
    resamples: int = RESAMPLES,
    seed: int = 0,
) -> Measured:
    """The mean over prompts of each prompt's mean. Every prompt counts the same.

    Args:
      values: [comparisons]; nan is left out. A prompt without another value is left out.
      prompts: [comparisons], indices of prompts as `index_prompts` gives them.
      ends: see `ratio`.
    """
    means = prompt_means(values, prompts)
    known = np.isfinite(means)
    per_prompt = np.isfinite(values).sum() / max(1, known.sum())
    options = dict(per_prompt=per_prompt, resamples=resamples, seed=seed)
    return ratio(np.where(known, means, 0), known, ends, **options)


def prompt_means(values: ArrayLike, prompts: ArrayLike) -> Array:
    """The mean of each prompt's values that are not nan, [prompts]; nan where there is none."""
    values, prompts = np.asarray(values, float), np.asarray(prompts, int)
    known = np.isfinite(values)
    size = int(prompts.max(initial=-1)) + 1
    sums = np.bincount(prompts[known], values[known], minlength=size)
    counts = np.bincount(prompts[known], minlength=size)
    return np.divide(sums, counts, out=np.full(size, np.nan), where=counts > 0)


def index_prompts(ids: Sequence[Hashable]) -> NDArray[np.int64]:
    """The index of each comparison's prompt, [comparisons], in order of first appearance.

    >>> index_prompts(["b", "a", "b"]).tolist()
    [0, 1, 0]
    """
    indices: dict[Hashable, int] = {}
    return np.array([indices.setdefault(name, len(indices)) for name in ids], int)
