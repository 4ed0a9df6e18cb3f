"""Preference losses: pure functions of log-probabilities, one number per example, no reduction.

Every loss takes sequence log-probs in nats (sums over the response's tokens, end token included)
of any leading shape. Hyper-parameters that a paper sweeps may be arrays:

>>> import jax, jax.numpy as jnp
>>> policy = Pair(chosen=jnp.float32(-12.0), rejected=jnp.float32(-14.0))
>>> reference = Pair(chosen=jnp.float32(-12.5), rejected=jnp.float32(-13.0))
>>> betas = jnp.array([0.1, 0.5])
>>> losses = jax.vmap(lambda beta: dpo(policy, reference, beta=beta))(betas)
>>> [f"{loss:.3f}" for loss in losses.tolist()]
['0.621', '0.387']
"""

from __future__ import annotations

from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array
from jax.typing import ArrayLike


class Pair(NamedTuple):
    """What belongs to the preferred and to the other response of the same prompts."""

    chosen: Array
    rejected: Array


def implicit_rewards(policy: Pair, reference: Pair, beta: ArrayLike) -> Pair:
    """beta (log policy - log reference) of each response, in nats.

    Rafailov et al. 2023, eq. 5, up to the prompt's constant beta log Z(x).
    """
    return jax.tree.map(lambda p, r: beta * (p - r), policy, reference)


def dpo(
    policy: Pair, reference: Pair, *, beta: ArrayLike, label_smoothing: ArrayLike = 0.0
) -> Array:
    """Per-pair loss -log sigmoid(r_chosen - r_rejected) with r the implicit rewards.

    Rafailov et al. 2023, eq. 7. With label smoothing e it is the conservative form
    (1 - e) * -log sigmoid(m) + e * -log sigmoid(-m) of the margin m (Mitchell 2023, "cDPO").

    Args:
      policy, reference: sequence log-probs, nats, any shape.
      beta: strength of the KL penalty, > 0.
      label_smoothing: assumed share of flipped labels, in [0, 0.5).

    Returns:
      The loss per pair, the shape of `policy.chosen`. log 2 wherever policy == reference.

    >>> zero = Pair(jnp.zeros(2), jnp.zeros(2))
    >>> [f"{loss:.3f}" for loss in dpo(zero, zero, beta=0.1).tolist()]
    ['0.693', '0.693']
    """
    reward = implicit_rewards(policy, reference, beta)
    margin = reward.chosen - reward.rejected
    return -(1 - label_smoothing) * jax.nn.log_sigmoid(
        margin
    ) - label_smoothing * jax.nn.log_sigmoid(-margin)


def ipo(
    policy: Pair,
    reference: Pair,
    *,
    beta: ArrayLike,
    length_norm: Literal["sum", "mean"],
    lengths: Pair | None = None,
) -> Array:
    """Per-pair loss (h - 1 / (2 beta))^2 with h the difference of the two log-ratios.

    Azar et al. 2023, eq. 17 (their tau is beta). Systems differ in what a log-ratio is, so the
    choice is named and has no default: "sum" over the response's tokens (the paper; emdpo,
    OpenRLHF) or "mean" per token (TRL, HALOs, LLaMA-Factory).

    Args:
      policy, reference: sequence log-probs, nats, any shape.
      beta: the regularisation tau, > 0.
      length_norm: "sum" or "mean".
      lengths: tokens of each response, wanted by "mean" (clamped to at least 1).

    Raises:
      ValueError: another `length_norm`, or "mean" without `lengths`.

    >>> zero = Pair(jnp.zeros(1), jnp.zeros(1))
    >>> ipo(zero, zero, beta=0.1, length_norm="sum").tolist()
    [25.0]
    """
    if length_norm not in ("sum", "mean"):
        raise ValueError(f"ipo: length_norm must be 'sum' or 'mean', got {length_norm!r}")
    ratio = jax.tree.map(jnp.subtract, policy, reference)
    if length_norm == "mean":
        if lengths is None:
            raise ValueError("ipo: length_norm='mean' needs lengths=Pair(chosen, rejected)")
        ratio = jax.tree.map(lambda x, n: x / jnp.maximum(n, 1), ratio, lengths)
    return (ratio.chosen - ratio.rejected - 1 / (2 * jnp.asarray(beta))) ** 2


def sft(logprobs: Array) -> Array:
    """Negative log-likelihood, nats, one number per sequence (a sum over its tokens).

    Divide the batch's sum by its number of tokens for the usual token mean.

    >>> sft(jnp.array([-3.0])).tolist()
    [3.0]
    """
    return -logprobs
