"""How far rounding may take attention and its gradients from exact arithmetic.

A kernel reads queries, keys, values and a cotangent that are exact numbers of its dtype, with unit
roundoff u, and adds up in float32. What it computes is rounded to the dtype at a few places:

- forward: the query once it is scaled, the weights, their product with the values, the result;
- backward: the cotangent, the output inside of delta, the score's gradient, and each result, which
  is scaled once more. (delta_t is the sum of output x cotangent of query t.)

A score s = scale q.k is then off by at most u S, with S_t the largest scale |q_t|.|k| that query t
sees. A weight, which is exp(s) over a sum of such numbers, is off by the share exp(2 u S) - 1. All
else is linear: each number is a sum of terms, and u times the sum of their sizes is its bound, once
for each rounding of a term. A float32 sum of n numbers is off by about sqrt(n) roundings (Higham
and Mary 2019); four times as much is allowed. So counts of roundings make the constants, and no
measurement does.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

from dpojax.models.attention import HIDDEN, attend

SUMS = 4 * 2.0**-24  # what float32 sums of n numbers may be off by, over sqrt(n)


class Numbers(NamedTuple):
    """The result of attention and the gradients by its three inputs, or bounds for them."""

    mixed: Array  # [R, T, H, E]
    query: Array  # [R, T, H, E]
    key: Array  # [R, T, K, E]
    value: Array  # [R, T, K, E]


def exact(query, key, value, cotangent, mask, scale: float) -> Numbers:
    """Plain attention in float32 and its gradients; matmul precision has to be `highest`."""
    arrays = [x.astype(jnp.float32) for x in (query, key, value)]
    mixed, back = jax.vjp(lambda *x: attend(*x, mask, scale), *arrays)
    return Numbers(mixed, *back(cotangent.astype(jnp.float32)))


def bounds(query, key, value, cotangent, mask, scale: float, *, unit: float) -> Numbers:
    """How far each number may be from `exact`, for a kernel whose dtype has this unit roundoff."""
    (rows, columns, heads, dim), kv_heads = query.shape, key.shape[2]
    group = heads // kv_heads
    query, key, value, cotangent = (x.astype(jnp.float32) for x in (query, key, value, cotangent))
    key, value = (jnp.repeat(x, group, axis=2) for x in (key, value))  # [R, T, H, E]
    hidden = jnp.where(mask, 0.0, HIDDEN)[:, None]  # [R, 1, T, T]
    scores = scale * jnp.einsum("rthe,rshe->rhts", query, key)
    weights = jax.nn.softmax(scores + hidden, axis=-1)
    query, key, value, cotangent = (jnp.abs(x) for x in (query, key, value, cotangent))

    sizes = scale * jnp.einsum("rthe,rshe->rhts", query, key) + hidden
    largest = sizes.max(-1, keepdims=True)  # S, [R, H, T, 1]
    of_weight = jnp.expm1(2 * (unit + SUMS * math.sqrt(dim)) * largest)
    of_row, of_column = SUMS * math.sqrt(columns), SUMS * math.sqrt(columns * group)

    mixed = jnp.einsum("rhts,rshe->rthe", weights, value)  # of |value|
    share = (of_weight + 3 * unit + 2 * of_row)[..., 0].swapaxes(1, 2)[..., None]  # [R, T, H, 1]
    bound_mixed = share * mixed

    # The gradient of a score is weight x (cotangent . value - delta).
    delta = jnp.einsum("rthe,rthe->rht", mixed, cotangent)[..., None]
    of_score = weights * (jnp.einsum("rthe,rshe->rhts", cotangent, value) + delta)
    of_score = of_score * (2 * of_weight + 8 * unit + 2 * of_row + of_column)
    bound_query = scale * jnp.einsum("rhts,rshe->rthe", of_score, key)
    bound_key = scale * jnp.einsum("rhts,rthe->rshe", of_score, query)
    of_value = weights * (of_weight + 4 * unit + of_column)
    bound_value = jnp.einsum("rhts,rthe->rshe", of_value, cotangent)

    def of_group(x: Array) -> Array:  # [R, T, H, E] -> [R, T, K, E]
        return x.reshape(rows, columns, kv_heads, group, dim).sum(3)

    return Numbers(bound_mixed, bound_query, of_group(bound_key), of_group(bound_value))
