"""From tokens to responses to pairs: the views of rows that methods and metrics share."""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np
from jax import Array

from dpojax.data.rows import Rows
from dpojax.logprobs import of_response, sum_by_response
from dpojax.losses import Pair


def answer_tokens(rows: Rows) -> Array:
    """Which scored tokens [..., R, S] belong to an answer; those of mismatched responses do not."""
    is_answer = (rows.rank >= 0).reshape(*rows.rank.shape[:-2], -1)  # [..., R, E * K]
    return (rows.response >= 0) & of_response(is_answer, rows.response)


def response_sums(values: Array, rows: Rows) -> Array:
    """Sum per-token values [..., R, S] by response: [..., R, E, K]."""
    slots = rows.present.shape[-2] * rows.present.shape[-1]
    return sum_by_response(values, rows.response, slots).reshape(rows.present.shape)


def all_pairs(values: Array) -> Pair:
    """All pairs of a better and a worse response.

    Args:
      values: [..., K] by response, best first.

    Returns:
      A pair of [..., P], P = K (K - 1) / 2.
    """
    better, worse = np.triu_indices(values.shape[-1], k=1)
    return Pair(values[..., better], values[..., worse])


def token_weights(rows: Rows) -> Array:
    """The weight of the example that each scored token belongs to, [..., R, S]."""
    by_slot = jnp.repeat(rows.weight, rows.present.shape[-1], axis=-1)  # [..., R, E * K]
    return of_response(by_slot, rows.response)


def best_response_tokens(rows: Rows) -> Array:
    """Which tokens [..., R, S] belong to the first response of an example with a good label."""
    first = jnp.zeros(rows.present.shape, bool).at[..., 0].set(True)
    best = (first & rows.desirable[..., None]).reshape(*first.shape[:-2], -1)  # [..., R, E * K]
    return of_response(best, rows.response)
