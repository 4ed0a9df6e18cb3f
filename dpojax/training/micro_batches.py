"""Loops over micro-batches: each at the smallest of its sizes, and none that is empty."""

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
    """Over micro-batches: the sum of the first results, and the second ones stacked [M, ...].

    There is no loop around a single one, which is computed whole. What is not computed is zero.

    Args:
      function: (rows [R, ...] of micro-batch m, m) -> two trees of arrays. It may get fewer rows,
        columns and scored tokens than there are (see `Rows.buckets`), and its second result may be
        as much smaller.
    """
    if len(rows.tokens) == 1:
        sums, own = function(_part(rows, 0), jnp.int32(0))
        return sums, jax.tree.map(lambda x: x[None], own)
    zeros = lambda x, *leading: jnp.zeros((*leading, *x.shape), x.dtype)
    sums, own = jax.eval_shape(function, _part(rows, 0), jnp.int32(0))
    carried = jax.tree.map(zeros, sums), jax.tree.map(lambda x: zeros(x, len(rows.tokens)), own)
    buckets, needs = buckets_of(rows), needs_of(rows)
    chosen = jnp.where(needs[:, 0] > 0, bucket_of(needs, buckets), len(buckets))
    order = jnp.argsort(chosen)  # by size, the empty ones last
    begin = jnp.searchsorted(chosen[order], jnp.arange(len(buckets) + 1))

    def visit(bucket: Bucket, j: Array, carried):
        sums, stacked = carried
        more, own = function(_part(rows, order[j], bucket), order[j])
        place = lambda xs, x: jax.lax.dynamic_update_slice(xs, x[None], _start(xs, order[j]))
        return jax.tree.map(jnp.add, sums, more), jax.tree.map(place, stacked, own)

    for i, bucket in enumerate(buckets):
        body = lambda j, carried, bucket=bucket: visit(bucket, j, carried)
        carried = jax.lax.fori_loop(begin[i], begin[i + 1], body, carried)
    return carried


def map_present(function: Callable[[Rows], Any], rows: Rows) -> Any:
    """`function` of every micro-batch, stacked [M, ...]; zeros where there is nothing."""
    return add_up(lambda part, _: ((), function(part)), rows)[1]


def part_like(stacked: Any, index: Array, like: Any) -> Any:
    """Of a stack [M, ...], the beginning of entry `index` that is as large as `like`."""
    cut = lambda xs, x: jax.lax.dynamic_slice(xs, _start(xs, index), (1, *x.shape))[0]
    return jax.tree.map(cut, stacked, like)


def _part(rows: Rows, index, bucket: Bucket | None = None) -> Rows:
    """One micro-batch, or the first rows, columns and scored tokens of it."""
    part = jax.tree.map(lambda x: jax.lax.dynamic_index_in_dim(x, index, keepdims=False), rows)
    if not rows.buckets:
        return part
    part = part._replace(buckets=Buckets())
    if bucket is None:
        return part
    part = jax.tree.map(lambda x: x[: bucket.rows], part)
    kept = {name: getattr(part, name)[:, : bucket.length] for name in BY_COLUMN}
    scored = {name: getattr(part, name) for name in BY_SCORED}
    kept |= {name: x[:, : bucket.scored] for name, x in scored.items() if x is not None}
    return part._replace(**kept)


def _start(stacked: Array, index: Array) -> tuple:
    return (index, *[0] * (stacked.ndim - 1))
