"""Confidence intervals of measured shares and means."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple


class Interval(NamedTuple):
    """The ends of a confidence interval."""

    low: float
    high: float


def wilson_interval(successes: int, trials: int, *, level: float = 0.95) -> Interval:
    """Compute the Wilson score interval of a share, for independent trials. Wilson 1927.

    Args:
      successes: how many of the trials succeeded; the share is `successes / trials`.
      trials: at least 1.
      level: probability that the interval covers the true share, about.

    Raises:
      ValueError: there is no trial, or there are more successes than trials.
    """
    # The import takes a second, which no run should wait for at its start.
    from scipy.stats import binomtest

    if trials < 1:
        raise ValueError(f"an interval needs at least 1 trial, got {trials}")
    ends = binomtest(successes, trials).proportion_ci(level, method="wilson")
    return Interval(float(ends.low), float(ends.high))


def mean_interval(
    values: Sequence[float],
    *,
    level: float = 0.95,
    bounds: tuple[float, float] = (-math.inf, math.inf),
) -> Interval:
    """Compute Student's interval of a mean, for independent values of a normal distribution.

    Its ends are mean ± t s / sqrt(n), with the sample's standard deviation s and the quantile t of
    Student's distribution with n - 1 degrees of freedom. Student 1908.

    Args:
      values: two or more; of one value nothing is known about its spread, and the ends are nan.
      level: probability that the interval covers the true mean.
      bounds: the smallest and the largest possible mean, 0 and 1 of a share. An end beyond them is
        moved onto them; the interval covers the true mean as often as before.

    Raises:
      ValueError: there is no value.
    """
    from scipy.stats import t

    count = len(values)
    if not count:
        raise ValueError("a mean needs at least 1 value")
    if count == 1:
        return Interval(math.nan, math.nan)
    mean = math.fsum(values) / count
    variance = math.fsum((x - mean) ** 2 for x in values) / (count - 1)
    reach = float(t.ppf((1 + level) / 2, count - 1)) * math.sqrt(variance / count)
    return Interval(max(mean - reach, bounds[0]), min(mean + reach, bounds[1]))
