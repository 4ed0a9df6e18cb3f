"""Losses that make a policy forget some responses and keep others.

`policy` and `reference` are sequence log-probs in nats, of any shape. `desirable` has their shape
and is true where the response is to be kept: there, the loss is its likelihood term alone.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax import Array
from jax.typing import ArrayLike

from dpojax.losses.checks import checked


@checked
def npo(
    policy: Array,
    reference: Array,
    desirable: Array,
    *,
    beta: ArrayLike,
    retain_weight: ArrayLike,
    nll: ArrayLike,
) -> Array:
    """Per-response loss -(2 / beta) log sigmoid(-beta d) of the log-ratio d of one to be forgotten.

    Negative preference optimisation, Zhang et al. 2024, as in the authors' code. It is 2 / beta
    times `dpo` without its chosen response. Its gradient is 2 sigmoid(beta d) times that of the
    log-prob: for beta -> 0 the log-prob itself is minimised (gradient ascent on the likelihood
    loss), and for larger beta less and less the more unlikely the response has become. The loss is
    2 log(2) / beta where policy == reference.

    Args:
      policy, reference: sequence log-probs, nats, any shape.
      desirable: whether the response is to be kept, the same shape.
      beta: > 0.
      retain_weight: weight of the likelihood term of responses to be kept; 0 leaves them alone.
      nll: negative log-likelihood of each response; divided by its tokens in the authors' code. The
        same shape, or a scalar.

    >>> kept = jnp.array([True, False])
    >>> loss = npo(jnp.array([-12.0, -14.0]), jnp.array([-12.5, -13.0]), kept, beta=0.1,
    ...            retain_weight=1.0, nll=jnp.array([2.4, 3.5]))
    >>> [f"{x:.3f}" for x in loss.tolist()]
    ['2.400', '12.888']
    """
    forget = -2 / beta * jax.nn.log_sigmoid(-beta * (policy - reference))
    return jnp.where(desirable, retain_weight * nll, forget)


@checked
def simnpo(
    policy: Array,
    desirable: Array,
    *,
    beta: ArrayLike,
    gamma: ArrayLike,
    lengths: ArrayLike,
    retain_weight: ArrayLike,
    nll: ArrayLike,
) -> Array:
    """Per-response loss -(2 / beta) log sigmoid(-beta l / |y| - gamma) of one to be forgotten.

    `npo` without a reference, of the log-prob l per token. Fan et al. 2024 (SimNPO). Their code
    computes -(2 / beta) log sigmoid(beta (-l / |y| - gamma')): then pass gamma = beta gamma'. They
    use gamma = 0, where the two are equal.

    Args:
      policy: sequence log-probs, nats, any shape.
      gamma: margin, nats, >= 0.
      lengths: tokens of each response, clamped to at least 1; the same shape.
      desirable, beta, retain_weight, nll: as in `npo`.

    >>> loss = simnpo(jnp.array([-14.0]), jnp.array([False]), beta=2.5, gamma=0.0,
    ...               lengths=jnp.array([7]), retain_weight=1.0, nll=2.0)
    >>> f"{loss.item():.5f}"
    '0.00537'
    """
    per_token = policy / jnp.maximum(lengths, 1)
    forget = -2 / beta * jax.nn.log_sigmoid(-beta * per_token - gamma)
    return jnp.where(desirable, retain_weight * nll, forget)
