"""Loops over micro-batches: each at the smallest bucket that holds it, and none that is empty."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

from dpojax.data.packing import Bucket, Buckets, bucket_of
from dpojax.data.rows import Rows, buckets_of, needs_of

BY_COLUMN = ("tokens", "positions", "segment", "branch")
BY_SCORED = ("source", "target", "response", "reference")


def add_up(function: Callable[[Rows, Array], tuple[Any, Any]], rows: Rows) -> tuple[Any, Any]:
    """Sum the first results of all micro-batches, and stack the second ones.

    A single micro-batch is computed whole, without a loop.

    Args:
      function: (rows [R, ...] of micro-batch m, m) -> two trees of arrays. It may get fewer rows,
        columns and scored tokens than there are (see `Rows.buckets`). Then its second result may
        be as much smaller.
      rows: [M, R, ...].

    Returns:
      The sums, and the stack [M, ...]. Empty micro-batches are not computed; they give zero.
    """
    if len(rows.tokens) == 1:
        sums, result = function(_part(rows, 0), jnp.int32(0))
        return sums, jax.tree.map(lambda x: x[None], result)
    zeros = lambda x, *leading: jnp.zeros((*leading, *x.shape), x.dtype)
    sums, result = jax.eval_shape(function, _part(rows, 0), jnp.int32(0))
    carry = jax.tree.map(zeros, sums), jax.tree.map(lambda x: zeros(x, len(rows.tokens)), result)
    buckets, needs = buckets_of(rows), needs_of(rows)
    chosen = jnp.where(needs[:, 0] > 0, bucket_of(needs, buckets), len(buckets))
    order = jnp.argsort(chosen)  # by bucket, the empty ones last
    begin = jnp.searchsorted(chosen[order], jnp.arange(len(buckets) + 1))

    def visit(bucket: Bucket, j: Array, carry):
        sums, stacked = carry
        more, result = function(_part(rows, order[j], bucket), order[j])

        def place(xs: Array, x: Array) -> Array:
            return jax.lax.dynamic_update_slice(xs, x[None], _start(xs, order[j]))

        return jax.tree.map(jnp.add, sums, more), jax.tree.map(place, stacked, result)

    for i, bucket in enumerate(buckets):
        body = lambda j, carry, bucket=bucket: visit(bucket, j, carry)
        carry = jax.lax.fori_loop(begin[i], begin[i + 1], body, carry)
    return carry


def map_present(function: Callable[[Rows], Any], rows: Rows) -> Any:
    """Stack `function` of every micro-batch, [M, ...]; zeros where there is nothing."""
    return add_up(lambda part, _: ((), function(part)), rows)[1]


def part_like(stacked: Any, index: Array, like: Any) -> Any:
    """Take entry `index` of a stack [M, ...], cut to the shapes of `like`."""

    def cut(xs: Array, x: Array) -> Array:
        return jax.lax.dynamic_slice(xs, _start(xs, index), (1, *x.shape))[0]

    return jax.tree.map(cut, stacked, like)


def _part(rows: Rows, index, bucket: Bucket | None = None) -> Rows:
    """One micro-batch, cut to the rows, columns and scored tokens of a bucket."""
    part = jax.tree.map(lambda x: jax.lax.dynamic_index_in_dim(x, index, keepdims=False), rows)
    if not rows.buckets:
        return part
    part = part._replace(buckets=Buckets())
    if bucket is None:
        return part
    part = jax.tree.map(lambda x: x[: bucket.rows], part)
    arrays = {name: getattr(part, name)[:, : bucket.length] for name in BY_COLUMN}
    for name in BY_SCORED:
        array = getattr(part, name)
        if array is not None:
            arrays[name] = array[:, : bucket.scored]
    return part._replace(**arrays)


def _start(stacked: Array, index: Array) -> tuple:
    """Where entry `index` of a stack begins."""
    return (index, *[0] * (stacked.ndim - 1))
