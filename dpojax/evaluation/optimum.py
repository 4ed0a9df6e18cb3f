"""The best reward that any policy can have at each KL from the reference, estimated from samples.

The optimal policy is pi*(y | x) = reference(y | x) exp(r(x, y) / beta) / Z(x) (Rafailov et al.
2023, eq. 4), with one beta for all prompts. `optimum` estimates its reward and KL from samples of
the reference with exact rewards, and says up to which KL the estimates can be trusted. All in NumPy
float64; KL is that of whole sequences, in nats.

>>> rewards = np.random.default_rng(0).normal(size=(500, 64))  # of 64 responses to each prompt
>>> curve = optimum(rewards, [np.inf, 4, 2, 1])
>>> best = optimal_reward_at(0.3, curve)  # sqrt(2 * 0.3) = 0.775 for a normal reward
>>> print(f"{best.value:.1f}")
0.8
>>> share = share_of_optimal_gain(0.5, 0.3, curve, base=Estimate(0.0, 0.0))
>>> print(f"{share.value:.1f}")
0.6
"""

from __future__ import annotations

import json
import os
from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.interpolate import PchipInterpolator

from dpojax import storage
from dpojax.evaluation.frontier import Array, Estimate, checked_rewards, mean_over_prompts


class Optimum(NamedTuple):
    """Reward and KL of the optimal policy of each beta, arrays [betas], by rising KL.

    `reward` and `kl` are corrected by the jackknife. `plain_reward` and `plain_kl` are not: they
    are biased low where few samples have most of the weight, and the difference shows how much.
    `_error` regards the prompts as a sample of all prompts. `_sampling_error` is that of sampling
    responses to these same prompts.
    """

    beta: Array
    reward: Array
    reward_error: Array
    reward_sampling_error: Array
    kl: Array
    kl_error: Array
    kl_sampling_error: Array
    frontier_error: Array  # of the best reward at this KL: that of reward - beta kl, over prompts
    plain_reward: Array
    plain_kl: Array
    effective: Array  # median over prompts of the effective number of samples, 1 / sum of w^2
    trusted: NDArray[np.bool_]


def optimum(rewards: ArrayLike, betas: ArrayLike, *, min_effective: float = 10.0) -> Optimum:
    """Estimate reward and KL of the optimal policies from samples of the reference.

    Self-normalised importance sampling, with weights w = exp(r / beta) / sum exp(r / beta) in each
    prompt: E[r] = sum w r, KL = E[r] / beta - log mean exp(r / beta), which cannot exceed log m.
    Both are biased low by O(1 / effective samples). The jackknife over the m samples removes the
    leading term of the bias. A beta is trusted if the median prompt has `min_effective` effective
    samples and the mean KL is at most log(m / min_effective).

    Args:
      rewards: exact rewards of m samples of the reference for each prompt, [prompts, m], m >= 3.
      betas: [betas], > 0, in units of reward per nat, in any order. np.inf is the reference
        itself; a curve should begin there.
      min_effective: number of effective samples that is enough.

    Raises:
      ValueError: a beta that is not positive, or rewards that are not finite or too few.

    >>> curve = optimum([[0.0, 1.0, 0.0, 1.0]] * 2, [np.inf, 1.0], min_effective=2)
    >>> [f"{x:.3f}" for x in curve.plain_reward]  # e / (1 + e)
    ['0.500', '0.731']
    """
    rewards = checked_rewards(rewards, "optimum")
    betas = np.sort(np.atleast_1d(np.asarray(betas, np.float64)))[::-1]
    m = rewards.shape[1]
    if m < 3:
        raise ValueError(f"optimum: the jackknife needs 3 samples a prompt or more, got {m}")
    if not (betas > 0).all():
        raise ValueError(f"optimum: betas must be positive, got {betas.tolist()}")
    falling = np.sort(rewards)[:, ::-1]
    rows = [_one_beta(falling, beta) for beta in betas]
    columns = {name: np.array([row[name] for row in rows]) for name in rows[0]}
    trusted = (columns["effective"] >= min_effective) & (columns["kl"] <= np.log(m / min_effective))
    return Optimum(beta=betas, trusted=trusted, **columns)


def optimal_reward_at(kl: ArrayLike, curve: Optimum) -> Estimate:
    """The best reward at a KL, by monotone cubic interpolation between trusted betas.

    The curve is interpolated over sqrt(KL), in which it starts as a straight line: near the
    reference the best reward is the base plus sqrt(2 KL) times the reward's standard deviation. The
    trusted part ends at the first beta that is not trusted. Outside of it, value and error are nan.
    The error is that of reward - beta kl, because beta is the slope of the curve: an error of the
    KL moves a point along the frontier.

    Args:
      kl: nats, any shape.

    >>> curve = optimum(np.tile(np.arange(100.0), (2, 1)), [np.inf, 20.0])
    >>> print(optimal_reward_at([0.0, 50.0], curve).value)
    [49.5  nan]
    """
    kl = np.asarray(kl, np.float64)
    value, _, error = _interpolate(kl, curve)
    return Estimate(value, error)


def share_of_optimal_gain(
    reward: ArrayLike,
    kl: ArrayLike,
    curve: Optimum,
    *,
    base: Estimate,
    reward_error: ArrayLike = 0.0,
    kl_error: ArrayLike = 0.0,
) -> Estimate:
    """(reward - base) / (optimal reward at the same KL - base): 1 is the theoretical limit.

    Errors are propagated to first order as if independent. With s the share, error^2 =
    (reward_error^2 + s^2 (optimal error^2 + (slope kl_error)^2) + (1 - s)^2 base error^2) / gain^2.
    Prompts in common correlate the errors, so the result is mostly too large. The share is nan
    where the curve is not trusted, or where the optimum gains nothing.

    Args:
      reward, kl: of a policy, any shape; errors of the same shape or scalars.
      curve: as `optimum` returns it.
      base: mean reward of the reference.

    >>> curve = optimum(np.tile(np.arange(100.0), (2, 1)), [np.inf, 20.0])
    >>> share = share_of_optimal_gain(curve.reward, curve.kl, curve, base=Estimate(49.5, 0.0))
    >>> share.value.round(6).tolist()
    [nan, 1.0]
    """
    reward, kl = np.asarray(reward, np.float64), np.asarray(kl, np.float64)
    best, slope, best_error = _interpolate(kl, curve)
    gain = np.where(best - base.value > 1e-12, best - base.value, np.nan)
    share = (reward - base.value) / gain
    optimal_error = np.hypot(best_error, slope * kl_error)
    terms = reward_error, share * optimal_error, (1 - share) * base.error
    variance = sum(np.asarray(term) ** 2 for term in terms)
    return Estimate(share, np.sqrt(variance) / gain)


def above_limit(
    reward: ArrayLike,
    kl: ArrayLike,
    curve: Optimum,
    *,
    reward_error: ArrayLike = 0.0,
    kl_error: ArrayLike = 0.0,
) -> Estimate:
    """Reward minus the best reward at the same KL.

    A value that is several errors above 0 means that something was measured wrongly. error^2 =
    reward_error^2 + (slope kl_error)^2 + the optimum's error^2, as if independent; prompts in
    common make it too large. The value is nan where the curve is not trusted.

    Args:
      reward, kl: of a policy, any shape; errors of the same shape or scalars.

    >>> curve = optimum(np.tile(np.arange(100.0), (2, 1)), [np.inf, 20.0])
    >>> print(*above_limit(50.0, 0.0, curve, reward_error=0.25))
    0.5 0.25
    """
    reward, kl = np.asarray(reward, np.float64), np.asarray(kl, np.float64)
    best, slope, best_error = _interpolate(kl, curve)
    # The slope is infinite at KL 0, where 0 * inf would be nan.
    along_slope = np.where(np.asarray(kl_error) == 0, 0.0, slope * kl_error)
    error = np.sqrt(np.asarray(reward_error) ** 2 + along_slope**2 + best_error**2)
    return Estimate(reward - best, error)


def trusted_up_to(curve: Optimum) -> float:
    """The KL, in nats, where the trusted part of the curve ends; nan if nothing is trusted."""
    kl = _trusted(curve)[0]
    return float(kl[-1]) if len(kl) > 1 else np.nan


def write_optimum(path: str | os.PathLike, curve: Optimum) -> None:
    """Write the curve as JSON, all or nothing; its numbers read back exactly."""
    columns = {
        name: [value if np.isfinite(value) else str(value) for value in np.asarray(values).tolist()]
        for name, values in curve._asdict().items()
    }  # JSON has no inf and no nan: they are written as text
    storage.write_text(path, json.dumps(columns, indent=1, allow_nan=False) + "\n")


def read_optimum(path: str | os.PathLike) -> Optimum:
    """Read what `write_optimum` wrote.

    Raises:
      ValueError: no JSON, other fields, a value that is no number, or unequal lengths. It names the
        file and the field.
    """
    columns, arrays = storage.read_json(path, fields={}), {}
    with storage.damage_named(path):
        if set(columns) != set(Optimum._fields):
            raise ValueError(f"fields must be {', '.join(Optimum._fields)}")
        for name, values in columns.items():
            if name == "trusted" and not all(isinstance(x, bool) for x in values):
                raise ValueError(f"trusted must be true or false, got {values!s:.80}")
            try:
                arrays[name] = np.array(values, bool if name == "trusted" else np.float64)
            except (TypeError, ValueError) as error:
                raise ValueError(f"{name} must be numbers, got {values!s:.80}") from error
            if arrays[name].shape != (len(columns["beta"]),):
                raise ValueError(f"{name} has not as many values as beta")
    return Optimum(**arrays)


def _tilt(rewards: Array, beta: float) -> tuple[Array, Array, Array]:
    """Mean reward and KL under the weights exp(r / beta) of each prompt.

    Args:
      rewards: [prompts, m]; each row falls, so its largest weight is the first, exp(0) = 1.
      beta: in units of reward per nat.

    Returns:
      Mean reward [prompts], KL [prompts] and the weights [prompts, m], not normalised.
    """
    top = rewards[:, :1]
    weight = np.exp((rewards - top) / beta)
    total = weight.sum(1)
    gain = (weight * (rewards - top)).sum(1) / total
    return top[:, 0] + gain, gain / beta - np.log(total / rewards.shape[1]), weight


def _without_one(rewards: Array, beta: float, weight: Array) -> tuple[Array, Array]:
    """Mean reward and KL with each sample left out, both [prompts, m]; rows of rewards fall."""
    top, m = rewards[:, :1], rewards.shape[1]
    part = weight * (rewards - top)
    # The sum of the other weights is at least 1, that of the largest reward, so nothing cancels.
    # Column 0 leaves out that one: it is computed apart.
    others = weight.sum(1, keepdims=True) - weight
    others[:, 0] = 1.0
    gain = (part.sum(1, keepdims=True) - part) / others
    reward, kl = top + gain, gain / beta - np.log(others / (m - 1))
    reward[:, 0], kl[:, 0], _ = _tilt(rewards[:, 1:], beta)
    return reward, kl


def _one_beta(rewards: Array, beta: float) -> dict[str, float]:
    """The fields of `Optimum` at one beta; rows of rewards fall."""
    m = rewards.shape[1]
    reward, kl, weight = _tilt(rewards, beta)
    left_out = _without_one(rewards, beta, weight)
    fields, corrected = {}, {}
    for name, plain, others in zip(("reward", "kl"), (reward, kl), left_out):
        centre = others.mean(1)
        corrected[name] = m * plain - (m - 1) * centre
        mean = mean_over_prompts(corrected[name])
        variance = (m - 1) / m * ((others - centre[:, None]) ** 2).sum(1)
        fields[name], fields[f"{name}_error"] = mean
        fields[f"{name}_sampling_error"] = np.sqrt(variance.sum()) / len(plain)
        fields[f"plain_{name}"] = plain.mean()
    value = corrected["reward"] - (beta * corrected["kl"] if np.isfinite(beta) else 0.0)
    fields["frontier_error"] = mean_over_prompts(value).error
    fields["effective"] = np.median(weight.sum(1) ** 2 / (weight**2).sum(1))
    return fields


def _trusted(curve: Optimum) -> tuple[Array, Array, Array]:
    """KL, reward and its error [points] up to the first beta that is not trusted; KL rises."""
    end = len(curve.trusted) if curve.trusted.all() else int(np.argmin(curve.trusted))
    x = curve.kl[:end]
    rising = x > np.maximum.accumulate(np.concatenate([[-np.inf], x]))[:-1]
    return tuple(a[:end][rising] for a in (curve.kl, curve.reward, curve.frontier_error))


def _interpolate(kl: Array, curve: Optimum) -> tuple[Array, Array, Array]:
    """Best reward, its slope and its error at each KL; nan outside the trusted part."""
    x, reward, error = _trusted(curve)
    if len(x) < 2:
        nothing = np.full(kl.shape, np.nan)
        return nothing, nothing, nothing
    root, roots = np.sqrt(np.maximum(kl, 0)), np.sqrt(np.maximum(x, 0))
    spline = PchipInterpolator(roots, reward)
    slope = spline.derivative()(root) / (2 * np.maximum(root, 1e-6))  # infinite at KL 0
    inside = (kl >= x[0]) & (kl <= x[-1])
    columns = spline(root), slope, np.interp(kl, x, error)
    return tuple(np.where(inside, column, np.nan) for column in columns)
