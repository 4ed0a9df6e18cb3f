"""Regression of log-ratios on a reward model's numbers."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax import Array
from jax.typing import ArrayLike

from dpojax.losses.checks import checked


@checked
def optimal_values(rewards: Array, mask: ArrayLike | None = None, *, beta: ArrayLike) -> Array:
    """Estimate V*(x) = beta log E[exp(r / beta)] over the reference's responses to each prompt.

    Brantley et al. 2025 (A*-PO), eq. 2. No gradient flows into it.

    Args:
      rewards: of responses drawn from the reference, [..., K].
      mask: which responses exist, [..., K]; all if None.
      beta: in units of the rewards, > 0. For large beta the value is the mean of the rewards, for
        small beta the largest one.

    Returns:
      The values, in units of the rewards, [...]; 0 where no response exists.

    >>> print(f"{optimal_values(jnp.array([1.0, 0.0]), beta=0.5):.4f}")
    0.7169
    """
    mask = jnp.ones(rewards.shape, bool) if mask is None else jnp.asarray(mask, bool)
    count = mask.sum(-1)
    scaled = jnp.where(mask, rewards, 0.0) / beta  # an absent reward may be NaN
    largest = jnp.where(mask, scaled, -jnp.inf).max(-1)
    largest = jnp.where(count > 0, largest, 0.0)
    total = jnp.where(mask, jnp.exp(scaled - largest[..., None]), 0.0).sum(-1)
    mean = jnp.where(count > 0, total / jnp.maximum(count, 1), 1.0)
    return jax.lax.stop_gradient(beta * (largest + jnp.log(mean)))


@checked
def astar_po(
    policy: Array, reference: Array, scores: ArrayLike, values: ArrayLike, *, beta: ArrayLike
) -> Array:
    """Per-response loss (beta d - (score - value))^2 of the log-ratio d.

    Regression on the optimal advantage, Brantley et al. 2025 (A*-PO), as in TRL: the optimal policy
    of a reward under a KL penalty beta has exactly the log-ratios (score - value) / beta, so there
    the loss is 0.

    Args:
      policy, reference: sequence log-probs, nats, any shape.
      scores: a reward model's number for each response, the same shape or a scalar.
      values: V* of each response's prompt, in units of the scores, the same shape or a scalar (see
        `optimal_values`).
      beta: units of the scores per nat, > 0; their beta_2.

    >>> print(f"{astar_po(jnp.float32(-12.0), jnp.float32(-12.5), 1.0, 0.7, beta=0.1):.4f}")
    0.0625
    """
    return (beta * (policy - reference) - (scores - values)) ** 2
