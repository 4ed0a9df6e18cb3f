"""The reward-KL frontier: estimates of reward and KL, best-of-n, Pareto fronts and their distances.

All in NumPy float64. Rewards are exact rewards of sampled responses, in any unit. KL is that of
whole sequences, in nats. Standard errors are over prompts unless a field says otherwise. The best
possible reward at a KL is in `optimum.py`.

>>> print(mean_over_prompts([1.0, 2.0, 3.0]).value)
2.0
>>> pareto_front(kl=[2.0, 1.0, 3.0], reward=[0.6, 0.5, 0.4]).tolist()
[1, 0]
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

Array = NDArray[np.float64]


class Estimate(NamedTuple):
    """A value and its standard error; nan where unknown."""

    value: Array | float
    error: Array | float


class Points(NamedTuple):
    """Measured points of a method, arrays [points]; errors are standard errors."""

    kl: Array
    reward: Array
    kl_error: Array
    reward_error: Array


class Shortfall(NamedTuple):
    """How far one front lies below another at most; negative if it lies above everywhere."""

    reward: float  # largest difference, in units of reward
    reward_at: float  # KL of that
    sigmas: float  # largest difference, in standard errors of the difference
    sigmas_at: float  # KL of that


def mean_over_prompts(values: ArrayLike, prompts: ArrayLike | None = None) -> Estimate:
    """The mean of n samples, with a cluster-robust standard error: clusters are prompts.

    error^2 = G / (G - 1) sum_g (sum_{i in g} (x_i - mean))^2 / n^2 over G prompts. With one sample
    for each prompt it is the usual s / sqrt(n). The error of a single prompt is nan.

    Args:
      values: [samples].
      prompts: [samples], any labels; None if each sample has its own prompt.

    Raises:
      ValueError: no samples, or shapes that differ.

    >>> print(mean_over_prompts([1.0, 1.0, 3.0, 3.0], prompts=["a", "a", "b", "b"]))
    Estimate(value=2.0, error=1.0)
    """
    values = np.asarray(values, np.float64)
    labels = np.arange(len(values)) if prompts is None else np.asarray(prompts)
    if values.ndim != 1 or not len(values) or labels.shape != values.shape:
        raise ValueError(
            f"mean_over_prompts: need values [samples] and as many prompts, got shapes "
            f"{values.shape} and {labels.shape}"
        )
    mean = values.mean()
    _, group = np.unique(labels, return_inverse=True)
    residuals = np.bincount(group, values - mean)
    if len(residuals) < 2:
        return Estimate(float(mean), np.nan)
    variance = len(residuals) / (len(residuals) - 1) * (residuals**2).sum() / len(values) ** 2
    return Estimate(float(mean), float(np.sqrt(variance)))


def sequence_kl(
    policy: ArrayLike, reference: ArrayLike, prompts: ArrayLike | None = None
) -> Estimate:
    """Estimate KL(policy || reference), nats, by the mean log-ratio of the policy's own samples.

    Args:
      policy, reference: log-probs of the same responses, [samples]. They were sampled at
        temperature 1 from the whole vocabulary. A truncated response counts with its tokens.
      prompts: as for `mean_over_prompts`.

    >>> print(sequence_kl([-1.0, -2.0], [-1.5, -3.5]))
    Estimate(value=1.0, error=0.5)
    """
    ratio = np.asarray(policy, np.float64) - np.asarray(reference, np.float64)
    return mean_over_prompts(ratio, prompts)


def sequence_kl_of_tokens(
    token_kl: ArrayLike, mask: ArrayLike, prompts: ArrayLike | None = None
) -> Estimate:
    """Estimate KL(policy || reference), nats, by the exact KL of each next-token distribution.

    The Rao-Blackwellised estimate (Amini et al. 2025): each token's log-ratio is replaced by its
    mean over the vocabulary. The expectation is that of `sequence_kl`, the variance is smaller, and
    the estimate is never negative.

    Args:
      token_kl: [samples, tokens], nats.
      mask: [samples, tokens]; masked entries of `token_kl` may be anything.
      prompts: as for `mean_over_prompts`.

    >>> print(sequence_kl_of_tokens([[0.5, 0.5], [1.0, 9.0]], [[1, 1], [1, 0]]))
    Estimate(value=1.0, error=0.0)
    """
    masked = np.where(np.asarray(mask, bool), np.asarray(token_kl, np.float64), 0)
    return mean_over_prompts(masked.sum(-1), prompts)


def best_of_n(rewards: ArrayLike, n: int) -> Estimate:
    """Unbiased estimate of the expected reward of the best of n responses.

    It is the mean over all subsets of n of the m samples of a prompt:
    sum_i C(i - 1, n - 1) / C(m, n) r_(i), where r_(i) is the i-th smallest reward.

    Args:
      rewards: of samples of the reference, [prompts, m].
      n: from 1 to m.

    Raises:
      ValueError: n is out of range.

    >>> print(best_of_n([[0.0, 1.0, 2.0], [0.0, 1.0, 2.0]], n=2).value)  # (1 + 2 + 2) / 3
    1.6666666666666665
    """
    rewards = checked_rewards(rewards, "best_of_n")
    m = rewards.shape[1]
    _check_n(n, m, "best_of_n")
    # From the largest down: C(i-1, n-1) / C(i, n-1) = (i - n + 1) / i, and n / m for i = m.
    i = np.arange(m - 1, 0, -1)
    weights = n / m * np.cumprod(np.concatenate([[1.0], np.maximum(i - n + 1, 0) / i]))
    return mean_over_prompts(np.sort(rewards)[:, ::-1] @ weights)


def best_of_n_kl_bound(n: ArrayLike) -> Array:
    """KL(best of n || reference) if no two responses tie: log n - (n - 1) / n, nats.

    Stiennon et al. 2020, appendix G.3. With ties it is an upper bound: Beirami et al. 2024.

    >>> print(f"{best_of_n_kl_bound(4):.4f}")
    0.6363
    """
    n = np.asarray(n, np.float64)
    return np.log(n) - (n - 1) / n


def best_of_n_kl(rewards: ArrayLike, n: int) -> Estimate:
    """Estimate KL(best of n || reference), nats, with tied rewards taken into account.

    Let F be the distribution function of the reward under the reference. The density ratio of a
    response with reward r is (F(r)^n - F(r-)^n) / (F(r) - F(r-)) if r has probability mass (an
    atom), else n F(r)^(n-1). F is estimated by the samples of a prompt: a reward that occurs
    twice or more is an atom, and one that occurs once is a point of the continuous part. This is
    exact if there are no ties. It assumes that ties are broken without regard to the response.

    Args:
      rewards: of samples of the reference, [prompts, m].
      n: from 1 to m.

    Raises:
      ValueError: n is out of range.

    >>> print(f"{best_of_n_kl([[0.0, 1.0, 2.0, 3.0]], n=4).value:.4f}")  # no ties: the bound
    0.6363
    >>> print(best_of_n_kl([[1.0, 1.0, 1.0, 1.0]], n=4).value)  # all alike: nothing is chosen
    0.0
    """
    rewards = checked_rewards(rewards, "best_of_n_kl")
    _check_n(n, rewards.shape[1], "best_of_n_kl")
    return mean_over_prompts([_best_of_n_kl(row, n) for row in rewards])


def pareto_front(kl: ArrayLike, reward: ArrayLike) -> NDArray[np.int64]:
    """Indices of the points on the Pareto front, by rising KL.

    A point is on the front if no other point has at least its reward at no more KL. Of equal points
    the first one is on the front. A point with a nan never is.

    Args:
      kl, reward: [points].

    >>> pareto_front([2.0, 1.0, 3.0], [0.6, 0.5, 0.4]).tolist()
    [1, 0]
    """
    kl, reward = np.asarray(kl, np.float64), np.asarray(reward, np.float64)
    known = np.flatnonzero(~(np.isnan(kl) | np.isnan(reward)))
    order = known[np.lexsort((-reward[known], kl[known]))]
    if not len(order):
        return order
    before = np.maximum.accumulate(np.concatenate([[-np.inf], reward[order]]))[:-1]
    return order[reward[order] > before]


def front_below(lower: Points, upper: Points) -> Shortfall:
    """Measure how far the first method's front lies below the second's, at KLs that both span.

    Fronts are straight lines between their points, so the largest gap is at a point of one of them;
    all points in the common range are tried. The standard error of a front at a KL combines those
    of its reward and of its KL (times the slope of the front), interpolated. The errors of the two
    fronts are combined as if independent; prompts in common make the result too large. The largest
    of many differences is also large by chance: 2 standard errors are weak evidence here.

    Returns:
      All nan if the fronts have no KL in common.

    >>> zeros = np.zeros(2)
    >>> a = Points(np.array([0.0, 2.0]), np.array([0.0, 1.0]), zeros, zeros + 0.1)
    >>> b = Points(np.array([0.0, 1.0]), np.array([0.0, 0.8]), zeros, zeros + 0.1)
    >>> gap = front_below(a, b)
    >>> print(f"{gap.reward:.1f} at {gap.reward_at:.0f} nats, {gap.sigmas:.2f} standard errors")
    0.3 at 1 nats, 2.12 standard errors
    """
    fronts = [_front(points) for points in (lower, upper)]
    if not all(len(front.kl) for front in fronts):
        return Shortfall(*[np.nan] * 4)
    start, stop = max(h.kl[0] for h in fronts), min(h.kl[-1] for h in fronts)
    grid = np.unique(np.concatenate([h.kl for h in fronts]))
    grid = grid[(grid >= start) & (grid <= stop)]
    if not len(grid):
        return Shortfall(*[np.nan] * 4)
    low, high = (np.interp(grid, h.kl, h.reward) for h in fronts)
    error = np.hypot(*(np.interp(grid, h.kl, _error_at_kl(h)) for h in fronts))
    gap = high - low
    with np.errstate(divide="ignore", invalid="ignore"):
        sigmas = np.where(gap == 0, 0.0, gap / error)
    most, surest = int(gap.argmax()), int(sigmas.argmax())
    return Shortfall(
        float(gap[most]), float(grid[most]), float(sigmas[surest]), float(grid[surest])
    )


def checked_rewards(rewards: ArrayLike, caller: str) -> Array:
    """Return rewards [prompts, samples] in float64.

    Raises:
      ValueError: another shape, an empty array, or a reward that is not finite.
    """
    rewards = np.asarray(rewards, np.float64)
    if rewards.ndim != 2 or not rewards.size:
        raise ValueError(f"{caller}: rewards must be [prompts, samples], got {rewards.shape}")
    if not np.isfinite(rewards).all():
        where = np.argwhere(~np.isfinite(rewards))[0].tolist()
        raise ValueError(f"{caller}: the reward of [prompt, sample] {where} is not finite")
    return rewards


def _check_n(n: int, m: int, caller: str) -> None:
    if not 1 <= n <= m:
        raise ValueError(f"{caller}: n must be from 1 to the {m} samples of a prompt, got {n}")


def _best_of_n_kl(rewards: Array, n: int) -> float:
    """`best_of_n_kl` of one prompt, rewards [m]. Arrays are [levels], one per distinct reward."""
    _, counts = np.unique(rewards, return_counts=True)
    above = np.cumsum(counts) / len(rewards)  # F(r)
    below = above - counts / len(rewards)  # F(r-)
    below[0] = 0.0
    chosen = above**n - below**n  # probability that best-of-n has this reward
    positive = chosen > 0  # a level whose probability underflows contributes nothing
    ratio = np.log(np.where(positive, chosen, 1.0) / (counts / len(rewards)))
    atoms = np.where(positive, chosen * ratio, 0.0)

    def antiderivative(u: Array) -> Array:  # of n u^(n-1) log(n u^(n-1))
        log = np.log(np.where(u > 0, u, 1.0))
        return u**n * (np.log(n) + (n - 1) * log - (n - 1) / n)

    points = antiderivative(above) - antiderivative(below)
    return float(np.where(counts > 1, atoms, points).sum())


def _front(points: Points) -> Points:
    index = pareto_front(points.kl, points.reward)
    return Points(*(np.asarray(x, np.float64)[index] for x in points))


def _error_at_kl(front: Points) -> Array:
    """Standard error of the front's reward at each point; an error in KL acts through the slope."""
    slope = np.gradient(front.reward, front.kl) if len(front.kl) > 1 else np.zeros(1)
    return np.hypot(front.reward_error, slope * front.kl_error)
