"""Losses of single responses that are labelled desirable or not; they need no pairs.

`policy` and `reference` are sequence log-probs in nats, of any shape. `desirable` has their shape
and is true where the response is a good one.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax import Array
from jax.typing import ArrayLike

from dpojax.losses.checks import checked
from dpojax.mesh_axes import AxisName, require_axis_name, sum_over_batch


@checked
def kto(
    policy: Array,
    reference: Array,
    desirable: Array,
    *,
    beta: ArrayLike,
    kl: ArrayLike,
    desirable_weight: ArrayLike,
    undesirable_weight: ArrayLike,
) -> Array:
    """Per-response loss 1 - sigmoid(+-beta (d - kl)) of the log-ratio d.

    The sign is + for desirable responses and - for the others. Ethayarajh et al. 2024; the loss is
    lambda - v in their notation.

    Args:
      policy, reference: sequence log-probs, nats, any shape.
      desirable: whether the response is a good one, the same shape.
      beta: strength of the KL penalty, > 0.
      kl: the reference point z_0, nats, a scalar (see `kto_baseline`); no gradient flows into it.
      desirable_weight, undesirable_weight: their lambda_D and lambda_U.

    >>> good = jnp.array([True, False])
    >>> loss = kto(jnp.array([-12.0, -14.0]), jnp.array([-12.5, -13.0]), good, beta=0.1, kl=0.5,
    ...            desirable_weight=1.0, undesirable_weight=1.0)
    >>> [f"{x:.3f}" for x in loss.tolist()]
    ['0.500', '0.463']
    """
    gain = beta * (policy - reference - jax.lax.stop_gradient(kl))
    good = desirable_weight * jax.nn.sigmoid(-gain)
    return jnp.where(desirable, good, undesirable_weight * jax.nn.sigmoid(gain))


@checked
def kto_baseline(
    log_ratio: Array,
    weight: ArrayLike | None = None,
    *,
    axis_name: AxisName | None = None,
) -> Array:
    """Estimate KL(policy || reference) for `kto`: the mean log-ratio, at least 0; no gradient.

    Ethayarajh et al. 2024. Each log-ratio is that of a prompt with the response to another prompt
    of the batch, so that the two are unrelated.

    Args:
      log_ratio: log policy - log reference of these mismatched responses, of the whole batch, nats.
      weight: their weights or mask, the same shape; all 1 if None.
      axis_name: in `jax.shard_map` or `jax.vmap`: the axes of shards that share the batch; ()
        where each shard has a batch of its own.

    Returns:
      A scalar, nats; 0 where all weights are 0.

    >>> print(f"{kto_baseline(jnp.array([0.4, -0.2, 0.3])):.4f}")
    0.1667
    """
    require_axis_name("kto_baseline", log_ratio, axis_name)
    weight = jnp.ones_like(log_ratio) if weight is None else jnp.asarray(weight, log_ratio.dtype)
    weighted = jnp.where(weight > 0, log_ratio, 0.0) * weight  # a masked log-ratio may be NaN
    total, count = sum_over_batch((weighted.sum(), weight.sum()), axis_name)
    mean = total / jnp.where(count > 0, count, 1.0)
    return jax.lax.stop_gradient(jnp.maximum(mean, 0.0))


@checked
def bco_unpaired(
    policy: Array, reference: Array, desirable: Array, *, beta: ArrayLike, delta: ArrayLike
) -> Array:
    """Per-response loss -log sigmoid(+-(r - delta)) of the implicit reward r.

    The sign is + for desirable responses and - for the others. Jung et al. 2024 (BCO); `bco` is the
    sum over a desirable and an undesirable response. `delta` is a scalar shift in nats (see
    `update_baseline`); no gradient flows into it.

    >>> good = jnp.array([True, False])
    >>> loss = bco_unpaired(jnp.zeros(2), jnp.zeros(2), good, beta=0.1, delta=0.0)
    >>> [f"{x:.3f}" for x in loss.tolist()]
    ['0.693', '0.693']
    """
    shifted = beta * (policy - reference) - jax.lax.stop_gradient(delta)
    return -jax.nn.log_sigmoid(jnp.where(desirable, shifted, -shifted))


@checked
def apo_zero_unpaired(
    policy: Array, reference: Array, desirable: Array, *, beta: ArrayLike
) -> Array:
    """Per-response loss sigmoid(-+r) of the implicit reward r.

    The sign is - for desirable responses and + for the others. APO-zero, D'Oosterlinck et al. 2024;
    `apo_zero` is the sum over a desirable and an undesirable response.

    >>> good = jnp.array([True, False])
    >>> apo_zero_unpaired(jnp.zeros(2), jnp.zeros(2), good, beta=0.1).tolist()
    [0.5, 0.5]
    """
    reward = beta * (policy - reference)
    return jax.nn.sigmoid(jnp.where(desirable, -reward, reward))
