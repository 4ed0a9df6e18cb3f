"""Losses whose beta or margin follows the pairs themselves: their gaps, or perturbed policies."""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array
from jax.typing import ArrayLike

from dpojax.losses.checks import checked
from dpojax.losses.margin import dpo, log_ratios, per_token
from dpojax.losses.pair import Pair
from dpojax.losses.reference_free import simpo
from dpojax.mesh_axes import AxisName, require_axis_name, sum_over_batch


class GapStatistics(NamedTuple):
    """Mean and standard deviation of the gaps of a batch, scalars, nats."""

    mean: Array
    std: Array


@checked
def gap_statistics(
    gap: Array, weight: ArrayLike | None = None, *, axis_name: AxisName | None = None
) -> GapStatistics:
    """Compute mean and standard deviation of the gaps d_w - d_l of a whole batch; no gradient.

    The deviation has one degree of freedom less than there are pairs, as PyTorch's; that of a
    single pair is 0.

    Args:
      gap: differences of the log-ratios of each pair, of sums or of means over tokens, nats.
      weight: the pairs' weights or mask, the same shape; all 1 if None.
      axis_name: in `jax.shard_map` or `jax.vmap`: the axes of shards that share the batch; ()
        where each shard has a batch of its own.

    >>> mean, std = gap_statistics(jnp.array([1.0, 3.0, 5.0]))
    >>> print(mean, std)
    3.0 2.0
    """
    require_axis_name("gap_statistics", gap, axis_name)
    weight = jnp.ones_like(gap) if weight is None else jnp.asarray(weight, gap.dtype)
    gap = jax.lax.stop_gradient(jnp.where(weight > 0, gap, 0.0))  # a masked gap may be NaN
    total, count = sum_over_batch(((gap * weight).sum(), weight.sum()), axis_name)
    mean = total / jnp.where(count > 0, count, 1.0)
    square = sum_over_batch((weight * (gap - mean) ** 2).sum(), axis_name)
    variance = square / jnp.where(count > 1, count - 1, 1.0)
    return GapStatistics(mean, jnp.sqrt(jnp.where(count > 1, variance, 0.0)))


@checked
def beta_dpo(
    policy: Pair,
    reference: Pair,
    *,
    beta: ArrayLike,
    alpha: ArrayLike,
    batch_gap: ArrayLike,
    running_gap: ArrayLike,
) -> Array:
    """Per-pair DPO loss with the beta of its batch: beta (1 + alpha (batch_gap - running_gap)).

    beta-DPO, Wu et al. 2024, as in the authors' code: batches of easy pairs get a larger beta. It
    is at least 1e-3, and no gradient flows through it. Departure: the authors leave out a share of
    the pairs, drawn by how far their gaps are from the running mean; here every pair counts.

    Args:
      policy, reference: sequence log-probs, nats, any shape.
      beta: what beta is for a batch of average pairs, > 0.
      alpha: how strongly beta follows the gaps, per nat. At 0 the loss is `dpo`.
      batch_gap: the mean of d_w - d_l over the batch, nats, a scalar (see `gap_statistics`).
      running_gap: the same over the batches so far: their code keeps
        0.9 running_gap + 0.1 batch_gap, from 0 on, and takes the batch in before it uses it.

    >>> policy, reference = Pair(-12.0, -14.0), Pair(-12.5, -13.0)
    >>> loss = beta_dpo(policy, reference, beta=0.1, alpha=0.6, batch_gap=1.5, running_gap=0.15)
    >>> print(f"{loss:.4f}")
    0.5666
    """
    change = alpha * (jnp.asarray(batch_gap) - running_gap)
    used = jax.lax.stop_gradient(jnp.maximum(beta * (1 + change), 1e-3))
    return dpo(policy, reference, beta=used)


@checked
def alpha_dpo(
    policy: Pair,
    reference: Pair,
    *,
    beta: ArrayLike,
    gamma: ArrayLike,
    alpha: ArrayLike,
    gap_mean: ArrayLike,
    gap_std: ArrayLike,
    lengths: Pair,
    label_smoothing: ArrayLike = 0.0,
) -> Array:
    """Per-pair SimPO loss with the margin gamma + alpha z of each pair.

    z = (gap - gap_mean) / gap_std of the gap d_w / |w| - d_l / |l|, without a gradient; 0 where
    gap_std is 0. AlphaDPO, Wu et al. 2024. Their code computes beta (l_w / |w| - l_l / |l| -
    gamma' - alpha' z): then pass gamma = beta gamma' and alpha = beta alpha'.

    Args:
      policy, reference: sequence log-probs, nats, any shape.
      beta: scale of the per-token rewards, > 0.
      gamma: target margin of an average pair, nats.
      alpha: by how much the margin grows with z, nats. At 0 the loss is `simpo`.
      gap_mean, gap_std: of the gaps per token, nats, scalars (see `gap_statistics`). Their code
        keeps running means of both: 0.9 of the old and 0.1 of each batch's.
      lengths: tokens of each response, clamped to at least 1.
      label_smoothing: as in `dpo`.

    >>> loss = alpha_dpo(Pair(-12.0, -14.0), Pair(-12.5, -13.0), beta=2.0, gamma=0.5, alpha=0.1,
    ...                  gap_mean=0.1, gap_std=0.5, lengths=Pair(5, 4))
    >>> print(f"{loss:.3f}")
    0.176
    """
    ratio = per_token(log_ratios(policy, reference), lengths)
    std = jnp.asarray(gap_std)
    centred = ratio.chosen - ratio.rejected - gap_mean
    z = jnp.where(std > 0, centred / jnp.where(std > 0, std, 1.0), 0.0)
    margin = gamma + alpha * jax.lax.stop_gradient(z)
    return simpo(policy, beta=beta, gamma=margin, lengths=lengths, label_smoothing=label_smoothing)


@checked
def epsilon_steps(
    policy: Pair[ArrayLike], away: Pair[ArrayLike], towards: Pair[ArrayLike]
) -> Array:
    """Say for each pair which way beta shall go: 1 down, -1 up, 0 not at all; no gradient.

    Lee et al. 2025 (epsilon-DPO), as in the authors' code. It compares the difference
    l_w - l_l under three policies. If it grows from `towards` over `policy` to `away`, a weaker
    penalty would separate the pair better; if it falls, a stronger one.

    Args:
      policy: sequence log-probs, nats, any shape.
      away, towards: the same under logits that are moved away from the reference's and towards
        them: the sums of `logprobs.perturbed_logprobs` over each response.

    Returns:
      1.0, -1.0 or 0.0 for each pair, the shape of `policy.chosen`.

    >>> steps = epsilon_steps(Pair(-12.0, -14.0), away=Pair(-12.0, -14.5), towards=Pair(-12.5, -14))
    >>> print(steps)
    1.0
    """
    gaps = [jnp.subtract(*pair) for pair in (towards, policy, away)]
    grows = (gaps[0] < gaps[1]) & (gaps[1] < gaps[2])
    falls = (gaps[0] > gaps[1]) & (gaps[1] > gaps[2])
    steps = jnp.where(grows, 1.0, jnp.where(falls, -1.0, 0.0))
    return jax.lax.stop_gradient(steps.astype(jnp.result_type(float, gaps[1])))


@checked
def epsilon_dpo(
    policy: Pair[ArrayLike],
    reference: Pair[ArrayLike],
    *,
    beta: ArrayLike,
    epsilon: ArrayLike,
    steps: ArrayLike,
) -> Array:
    """Per-pair DPO loss with the beta of each pair: beta / (1 + epsilon steps).

    epsilon-DPO, Lee et al. 2025, as in the authors' code. After each batch they also divide beta
    itself by 1 + epsilon mean(steps); that is the caller's to do.

    Args:
      policy, reference: sequence log-probs, nats, any shape.
      beta: what beta is for a pair whose steps are 0, > 0.
      epsilon: size of a step, in (0, 1): 0.01 in the paper.
      steps: of each pair (see `epsilon_steps`). At 0 the loss is `dpo`.

    >>> policy, reference = Pair(-12.0, -14.0), Pair(-12.5, -13.0)
    >>> print(f"{epsilon_dpo(policy, reference, beta=0.11, epsilon=0.1, steps=1.0):.4f}")
    0.6210
    """
    used = beta / (1 + epsilon * jnp.asarray(steps))
    return dpo(policy, reference, beta=jax.lax.stop_gradient(used))
