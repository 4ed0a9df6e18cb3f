"""The win rate that A would have if its responses were as long as B's.

In the manner of Dubois et al. 2024, "Length-controlled AlpacaEval" (arXiv 2404.04475, section 3),
but fitted on the run's own prompts, and without their term for the difficulty of an instruction:

    logit P(A wins) = policy + slope * tanh((length of A - length of B) / s)

with s the standard deviation of the length differences. At a difference of 0 the win rate is
sigmoid(policy). The score of a judgement may be a fraction (quasi-binomial likelihood).

The number is not known where lengths tell the two sides apart: then no data say what happens at
equal lengths, and a fit would extrapolate.
"""

from __future__ import annotations

import math
from collections.abc import Hashable, Sequence

import numpy as np
from numpy.typing import ArrayLike
from scipy.special import expit

from dpojax.evaluation.judging.bootstrap import (
    MASSES,
    RESAMPLES,
    SHARE,
    Array,
    Measured,
    index_prompts,
    interval,
    prompt_means,
    prompt_weights,
    pseudo_size,
    pseudo_weights,
)
from dpojax.evaluation.judging.verdicts import Judgement

FEWEST_EACH_SIDE = 0.025  # share of comparisons where A is not longer, and where it is not shorter
MOST_FAILED = 0.01  # share of resamples whose fit may fail
LARGEST = 4_000_000  # resamples x comparisons that are fitted at a time
STEPS, TOLERANCE = 50, 1e-7  # of Newton's method
LARGEST_STEP = 2.0  # logits; from far away Newton's method would overshoot


def length_controlled(
    judgements: Sequence[Judgement],
    ids: Sequence[Hashable],
    lengths_a: ArrayLike,
    lengths_b: ArrayLike,
    *,
    resamples: int = RESAMPLES,
    seed: int = 0,
) -> Measured | None:
    """Measure A's win rate at equal lengths. Everything is fitted anew in each resample.

    Every prompt counts the same. Comparisons without a score are left out.

    Args:
      judgements: one per comparison.
      ids: the prompt of each comparison.
      lengths_a: [comparisons], lengths of A's responses in any unit.
      lengths_b: [comparisons], of B's.

    Returns:
      None if it is not known: all length differences are the same; A is longer, or shorter, nearly
      everywhere (all but `FEWEST_EACH_SIDE`); there is a length difference above which A only wins
      and below which it only loses, or the other way round; or more than `MOST_FAILED` of the
      resamples cannot be fitted.

    Raises:
      ValueError: the arguments have different lengths.
    """
    scores = np.array([judgement.score for judgement in judgements])
    gaps = np.asarray(lengths_a, float) - np.asarray(lengths_b, float)
    if not len(scores) == len(gaps) == len(ids):
        raise ValueError(
            f"{len(scores)} judgements need as many ids and lengths, "
            f"got {len(ids)} ids and {len(gaps)} lengths"
        )
    known = np.isfinite(scores)
    scores, gaps = scores[known], gaps[known]
    prompts = index_prompts([name for name, use in zip(ids, known) if use])
    if not len(scores) or not _is_identified(scores, gaps):
        return None
    shares = 1 / np.bincount(prompts)[prompts]  # a prompt's comparisons weigh 1 in all
    start, fitted = _fit(gaps, scores, shares[None], np.zeros((1, 2)), np.zeros((2, 1)))
    weights = prompt_weights(int(prompts.max()) + 1, resamples=resamples, seed=seed)
    means = prompt_means(scores, prompts)
    size = pseudo_size(means, np.ones_like(means), SHARE, len(scores) / len(means))
    pseudo = size * pseudo_weights(MASSES[SHARE], resamples=resamples, seed=seed)
    parts = math.ceil(resamples * len(scores) / LARGEST)  # a part takes some 200 MiB
    fits = [
        _fit(gaps, scores, part[:, prompts] * shares, pseudo_part, start)
        for part, pseudo_part in zip(np.array_split(weights, parts), np.array_split(pseudo, parts))
    ]
    resampled = np.concatenate([parameters[0] for parameters, _ in fits])
    converged = np.concatenate([ok for _, ok in fits])
    if not fitted.all() or (~converged).mean() > MOST_FAILED:
        return None
    return interval(expit(start[0, 0]), expit(resampled[converged]))


def _is_identified(scores: Array, gaps: Array) -> bool:
    """Whether the data say what A's win rate at equal lengths is."""
    if np.ptp(gaps) == 0 or min((gaps <= 0).mean(), (gaps >= 0).mean()) < FEWEST_EACH_SIDE:
        return False
    # A fraction is both a win and a loss. The likelihood has no maximum if one threshold
    # separates wins and losses (Albert & Anderson 1984); values on the threshold do not help.
    won, lost = gaps[scores > 0], gaps[scores < 1]
    if not len(won) or not len(lost):
        return False
    return bool(lost.max() > won.min() and won.max() > lost.min())


def _fit(
    gaps: Array, scores: Array, weights: Array, pseudo: Array, start: Array
) -> tuple[Array, Array]:
    """Fit policy and slope in every resample, by Newton's method.

    Args:
      gaps: [comparisons], length differences.
      scores: [comparisons], in [0, 1].
      weights: [resamples, comparisons].
      pseudo: [resamples, 2], weights of a lost and of a won comparison at equal lengths.
      start: [2, 1], policy and slope to start from.

    Returns:
      policy and slope in logits, [2, resamples], and whether the fit converged, [resamples].
    """
    centred = gaps - gaps.mean()
    mean, square = weights @ centred / weights.sum(1), weights @ centred**2 / weights.sum(1)
    lengths = np.tanh(gaps / np.sqrt(square - mean**2)[:, None])
    parameters = np.repeat(start, len(weights), axis=1)
    for _ in range(STEPS):
        step = _newton_step(parameters, lengths, scores, weights, pseudo)
        parameters = parameters + step
        converged = (np.abs(step) < TOLERANCE).all(0)
        if converged.all():
            break
    return parameters, converged


def _newton_step(
    parameters: Array, lengths: Array, scores: Array, weights: Array, pseudo: Array
) -> Array:
    """Solve the two normal equations of each resample; at most `LARGEST_STEP`, [2, resamples]."""
    policy, slope = parameters
    wins = expit(policy[:, None] + slope[:, None] * lengths)
    residual, information = weights * (scores - wins), weights * wins * (1 - wins)
    wins_at_zero = expit(policy)
    gradient = residual.sum(1) + pseudo[:, 1] - pseudo.sum(1) * wins_at_zero
    slope_gradient = np.einsum("rc,rc->r", residual, lengths)
    level = information.sum(1) + pseudo.sum(1) * wins_at_zero * (1 - wins_at_zero)
    product = information * lengths
    cross, square = product.sum(1), np.einsum("rc,rc->r", product, lengths)
    solved = np.stack(
        [
            square * gradient - cross * slope_gradient,
            level * slope_gradient - cross * gradient,
        ]
    )
    with np.errstate(divide="ignore", invalid="ignore"):
        step = solved / (level * square - cross**2)
    return np.clip(np.nan_to_num(step, nan=LARGEST_STEP), -LARGEST_STEP, LARGEST_STEP)
