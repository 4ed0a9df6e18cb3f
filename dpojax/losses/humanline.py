"""Humanline: a loss sees no token whose probability has moved further than a bound."""

from __future__ import annotations

import jax.numpy as jnp
from jax import Array
from jax.typing import ArrayLike

from dpojax.losses.checks import checked


@checked
def humanline_logprobs(
    policy: Array, reference: Array, *, low: ArrayLike, high: ArrayLike
) -> Array:
    """Clamp each token's log-ratio to [low, high]: reference + clip(policy - reference).

    Sum the result over the tokens of each response, and give it to any loss with a reference in the
    place of the policy's log-probs. A token outside of the bounds gets no gradient. Ethayarajh et
    al. 2025 (Humanline), as in the authors' code, HALOs. There, the reference is also set to the
    policy before every update; that is the caller's to do (in a run, `preference.sync_every` does).

    Args:
      policy, reference: log-probs of tokens, not of sequences, nats, any shape.
      low, high: bounds of the log-ratio, nats, low <= 0 <= high: -1 and 1.5 in HALOs.

    Returns:
      The policy's log-probs as the loss sees them, nats, the same shape.

    >>> policy, reference = jnp.array([-1.0, -4.0, -0.5]), jnp.array([-1.5, -2.0, -3.0])
    >>> humanline_logprobs(policy, reference, low=-1.0, high=1.5).tolist()
    [-1.0, -3.0, -1.5]
    """
    return reference + jnp.clip(policy - reference, low, high)
