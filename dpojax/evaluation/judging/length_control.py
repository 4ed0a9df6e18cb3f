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
STEPS, TOLERANCE = 50, 1e-8  # of Newton's method


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
    (policy,), fitted = _fit(gaps, scores, shares[None], pseudo=np.zeros((1, 2)))
    weights = prompt_weights(int(prompts.max()) + 1, resamples=resamples, seed=seed)
    means = prompt_means(scores, prompts)
    size = pseudo_size(means, np.ones_like(means), SHARE, len(scores) / len(means))
    pseudo = size * pseudo_weights(MASSES[SHARE], resamples=resamples, seed=seed)
    parts = math.ceil(resamples * len(scores) / LARGEST)  # a part takes some 200 MiB
    fits = [
        _fit(gaps, scores, part[:, prompts] * shares, pseudo_part)
        for part, pseudo_part in zip(np.array_split(weights, parts), np.array_split(pseudo, parts))
    ]
    resampled, converged = map(np.concatenate, zip(*fits))
    if not fitted.all() or (~converged).mean() > MOST_FAILED:
        return None
    return interval(expit(policy), expit(resampled[converged]))


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


def _fit(gaps: Array, scores: Array, weights: Array, pseudo: Array) -> tuple[Array, Array]:
    """Fit the policy's effect in every resample, by Newton's method.

    Args:
      gaps: [comparisons], length differences.
      scores: [comparisons], in [0, 1].
      weights: [resamples, comparisons].
      pseudo: [resamples, 2], weights of a lost and of a won comparison at equal lengths.

    Returns:
      the policy's effect in logits, and whether the fit converged, both [resamples].
    """
    totals = weights.sum(1)
    centre = weights @ gaps / totals
    spread = np.sqrt(weights @ gaps**2 / totals - centre**2)
    lengths = np.tanh(gaps / spread[:, None])
    policy, slope = np.zeros(len(weights)), np.zeros(len(weights))
    step = np.full((2, len(weights)), np.inf)
    for _ in range(STEPS):
        fitted = expit(policy[:, None] + slope[:, None] * lengths)
        residual, information = weights * (scores - fitted), weights * fitted * (1 - fitted)
        at_zero = expit(policy)
        gradient = residual.sum(1) + pseudo[:, 1] - pseudo.sum(1) * at_zero
        slope_gradient = np.einsum("rc,rc->r", residual, lengths)
        level = information.sum(1) + pseudo.sum(1) * at_zero * (1 - at_zero)
        product = information * lengths
        cross, square = product.sum(1), np.einsum("rc,rc->r", product, lengths)
        determinant = level * square - cross**2
        with np.errstate(divide="ignore", invalid="ignore"):
            step = np.stack(
                [
                    (square * gradient - cross * slope_gradient) / determinant,
                    (level * slope_gradient - cross * gradient) / determinant,
                ]
            )
        # Newton's method diverges from far away; a step of 2 logits is far.
        step = np.clip(np.nan_to_num(step, nan=np.inf), -2, 2)
        policy, slope = policy + step[0], slope + step[1]
        if (np.abs(step) < TOLERANCE).all():
            break
    return policy, (np.abs(step) < TOLERANCE).all(0)
