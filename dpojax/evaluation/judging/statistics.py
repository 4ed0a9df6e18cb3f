"""Win rates, position bias, flip rates, paired differences and repeatability, with intervals.

Every prompt counts the same: a number is the mean over prompts of each prompt's mean. All intervals
are 95 % intervals over prompts (`bootstrap.py`), but that of the repeatability.

>>> from dpojax.evaluation.judging.verdicts import Choice, Judgement, Reply
>>> first, second = Reply(Choice.FIRST), Reply(Choice.SECOND)
>>> won, follows_position = Judgement(first, second), Judgement(first, first)
>>> rate = win_rate([won, follows_position, won, won], ids=["p", "q", "r", "s"])
>>> rate.value, rate.position_bias.value, rate.flip_rate.value
(0.875, 0.25, 0.25)
"""

from __future__ import annotations

import collections
import math
from collections.abc import Hashable, Sequence
from typing import NamedTuple

import numpy as np

from dpojax.evaluation.judging.bootstrap import (
    RESAMPLES,
    SIGNED,
    UNKNOWN,
    Array,
    Measured,
    index_prompts,
    mean_over_prompts,
    prompt_means,
)
from dpojax.evaluation.judging.verdicts import Choice, Judgement, Outcome, Reply
from dpojax.intervals import wilson_interval

_FAVOURS_FIRST = {Choice.FIRST: 1.0, Choice.SECOND: -1.0, Choice.TIE: 0.0}
_FLIPPED = {Outcome.INCONSISTENT: 1.0, Outcome.UNPARSED: math.nan}


class WinRate(NamedTuple):
    """How often a judge prefers A's responses to B's.

    Attributes:
      value: the mean over prompts of `Judgement.score`. A comparison with a reply that could not be
        read has no score and is left out; so is a prompt that has only such comparisons. nan if
        none is left.
      low: lower end of the 95 % interval.
      high: upper end.
      counts: how many comparisons had each outcome.
      position_bias: P(the judge chooses the first response) - P(it chooses the second one), over
        the comparisons whose two replies could both be read, each in both orders. In [-1, 1]. 0 is
        a judge without a bias: whether A is better cancels. nan for a symmetric judge.
      flip_rate: share of inconsistent judgements among those whose two replies could both be read.
        nan for a symmetric judge. Two identical responses, of which nobody asks, count for neither.
      comparisons: how many there were, those that were left out among them.
      prompts: how many have a score.
      prompts_left_out: how many have none.
    """

    value: float
    low: float
    high: float
    counts: dict[Outcome, int]
    position_bias: Measured
    flip_rate: Measured
    comparisons: int
    prompts: int
    prompts_left_out: int

    def share(self, outcome: Outcome) -> float:
        """The share of all comparisons with an outcome."""
        return self.counts[outcome] / self.comparisons if self.comparisons else math.nan


class Difference(NamedTuple):
    """A's win rate minus that of another policy, against the same B on the same prompts.

    Attributes:
      value: the mean over prompts of the difference, in [-1, 1].
      low: lower end of the 95 % interval.
      high: upper end. The two policies differ if the interval does not contain 0.
      prompts: how many prompts have a score of both.
    """

    value: float
    low: float
    high: float
    prompts: int


class Repeatability(NamedTuple):
    """How often a judge that is asked the same question again makes the same choice.

    Attributes:
      value: share of the questions with the same choice both times. A reply that could not be read
        is a choice of its own.
      low: lower end of the 95 % interval (Wilson 1927).
      high: upper end.
      asked: how many questions were asked again.
    """

    value: float
    low: float
    high: float
    asked: int


def win_rate(
    judgements: Sequence[Judgement],
    ids: Sequence[Hashable],
    *,
    is_symmetric: bool = False,
    asked: Sequence[bool] | None = None,
    resamples: int = RESAMPLES,
    seed: int = 0,
) -> WinRate:
    """Measure A's win rate, and what the two orders say of the judge.

    Args:
      judgements: one per comparison.
      ids: the prompt of each comparison.
      is_symmetric: the judge was asked in one order, so that it has no position bias.
      asked: False where nobody was asked, as of two identical responses. Such a tie counts for the
        win rate, but not for position bias and flip rate. None: all were asked.

    Raises:
      ValueError: there are not as many ids as judgements.
    """
    prompts = _indexed(judgements, ids)
    options = dict(resamples=resamples, seed=seed)
    scores = [judgement.score for judgement in judgements]
    known = int(np.isfinite(prompt_means(scores, prompts)).sum())
    outcomes = [judgement.outcome for judgement in judgements]
    bias = flips = UNKNOWN
    if not is_symmetric:
        skipped = np.zeros(len(judgements), bool) if asked is None else ~np.asarray(asked, bool)
        favours = np.array([_favours_first(judgement) for judgement in judgements])
        flipped = np.array([_FLIPPED.get(outcome, 0.0) for outcome in outcomes])
        favours[skipped] = flipped[skipped] = np.nan
        bias = mean_over_prompts(favours, prompts, SIGNED, **options)
        flips = mean_over_prompts(flipped, prompts, **options)
    counts = collections.Counter(outcomes)
    return WinRate(
        *mean_over_prompts(scores, prompts, **options),
        counts={outcome: counts[outcome] for outcome in Outcome},
        position_bias=bias,
        flip_rate=flips,
        comparisons=len(judgements),
        prompts=known,
        prompts_left_out=len(set(ids)) - known,
    )


def difference(
    first: Sequence[Judgement],
    first_ids: Sequence[Hashable],
    second: Sequence[Judgement],
    second_ids: Sequence[Hashable],
    *,
    resamples: int = RESAMPLES,
    seed: int = 0,
) -> Difference:
    """Measure the first policy's win rate minus the second's, paired by prompt.

    Prompts that lack a score of either policy are left out. That both policies met the same prompts
    and the same opponent makes the difference more certain than two separate win rates.

    Raises:
      ValueError: there are not as many ids as judgements.
    """
    shared = index_prompts([*first_ids, *second_ids])
    cut = len(_indexed(first, first_ids))
    _indexed(second, second_ids)
    size = int(shared.max(initial=-1)) + 1
    means = [
        _padded(prompt_means([judgement.score for judgement in judgements], prompts), size)
        for judgements, prompts in ((first, shared[:cut]), (second, shared[cut:]))
    ]
    gaps = means[0] - means[1]
    measured = mean_over_prompts(gaps, np.arange(size), SIGNED, resamples=resamples, seed=seed)
    return Difference(*measured, prompts=int(np.isfinite(gaps).sum()))


def repeatability(repeats: Sequence[tuple[Reply, Reply]]) -> Repeatability | None:
    """Measure how often the same question got the same choice; None if none was asked again."""
    if not repeats:
        return None
    same = sum(first.choice is second.choice for first, second in repeats)
    return Repeatability(same / len(repeats), *wilson_interval(same, len(repeats)), len(repeats))


def _favours_first(judgement: Judgement) -> float:
    """The mean over both orders of 1 for the first response, -1 for the second, 0 for a tie."""
    replies = judgement.a_first, judgement.b_first
    return sum(_FAVOURS_FIRST.get(reply.choice, math.nan) for reply in replies) / 2


def _indexed(judgements: Sequence[Judgement], ids: Sequence[Hashable]) -> np.ndarray:
    if len(judgements) != len(ids):
        raise ValueError(f"{len(judgements)} judgements need as many ids, got {len(ids)}")
    return index_prompts(ids)


def _padded(means: Array, size: int) -> Array:
    return np.pad(means, (0, size - len(means)), constant_values=np.nan)
