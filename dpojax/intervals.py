"""Confidence intervals of measured shares."""

from __future__ import annotations

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
