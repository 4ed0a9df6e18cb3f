"""The programs of `models.flash`: each of one tile of columns, of one head or group, of one row.

A program is given which blocks to visit, the first `count[...]` of `blocks`, and the spans of
columns that its queries see (`spans.Spans`); queries and keys are [columns, head_dim].
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array
from jax.experimental import pallas as pl

from dpojax.models.attention import HIDDEN


class Settings(NamedTuple):
    """What is static in a call."""

    tile: int  # columns that a program works on at once; divides the block
    block: int  # columns that an entry of `blocks` stands for
    softcap: float | None
    interpret: bool


def flash_forward(
    settings: Settings, count, blocks, own, first, last, query, key, value, mixed, logsumexp
):
    """What a tile of queries mixes of all values that it sees."""
    queries, tile = query[...], settings.tile
    i = pl.program_id(0) * tile + jnp.arange(tile)
    spans = own[...], first[...], last[...]

    def visit(n, carry):
        mixed, top, total = carry
        at = pl.ds(_start(settings, blocks, n), tile)
        keys, values = key[at, :], value[at, :]
        sees = _sees(*(x[:, None] for x in spans), i[:, None], _columns(at)[None, :])
        scores = jnp.where(sees, _capped(settings, _product(queries, keys, 1, 1)), HIDDEN)
        # Until a query has met a column that it sees, its sums mean nothing; when it has, as all
        # see themselves, exp(HIDDEN - highest) = 0 takes them away.
        highest = jnp.maximum(top, scores.max(axis=1))
        shrink, weights = jnp.exp(top - highest), jnp.exp(scores - highest[:, None])
        mixed = mixed * shrink[:, None] + _product(weights.astype(values.dtype), values, 1, 0)
        return mixed, highest, total * shrink + weights.sum(axis=1)

    start = _zeros(queries), jnp.full(tile, HIDDEN, jnp.float32), jnp.zeros(tile, jnp.float32)
    sums, top, total = jax.lax.fori_loop(0, _visits(settings, count), visit, start)
    mixed[...] = (sums / total[:, None]).astype(mixed.dtype)
    logsumexp[...] = top + jnp.log(total)


def flash_query_gradient(settings: Settings, *refs):
    """The gradient of a tile of queries, from all keys that it sees."""
    count, blocks, own, first, last, query, key, value, cotangent, logsumexp, delta, out = refs
    queries, to_mixed, tile = query[...], cotangent[...], settings.tile
    sums, deltas = logsumexp[...][:, None], delta[...][:, None]
    i = pl.program_id(0) * tile + jnp.arange(tile)
    spans = own[...], first[...], last[...]

    def visit(n, gradient):
        at = pl.ds(_start(settings, blocks, n), tile)
        keys, values = key[at, :], value[at, :]
        sees = _sees(*(x[:, None] for x in spans), i[:, None], _columns(at)[None, :])
        scores = _capped(settings, _product(queries, keys, 1, 1))
        to_weights = _product(to_mixed, values, 1, 1)
        _, to_scores = _backward(settings, scores, sees, sums, to_weights, deltas)
        return gradient + _product(to_scores.astype(keys.dtype), keys, 1, 0)

    gradient = jax.lax.fori_loop(0, _visits(settings, count), visit, _zeros(queries))
    out[...] = gradient.astype(out.dtype)


def flash_key_gradient(settings: Settings, *refs):
    """The gradients of a tile of keys and values, from all queries of all heads that see it.

    Scores are of keys by queries, [j, i], so that no product needs a result turned round.
    """
    count, blocks, own, first, last, query, key, value, cotangent, logsumexp, delta = refs[:11]
    to_key, to_value = refs[11:]
    keys, values, tile = key[...], value[...], settings.tile
    j = pl.program_id(0) * tile + jnp.arange(tile)
    visits = _visits(settings, count)

    def visit(n, carry):
        key_gradient, value_gradient = carry
        head = jax.lax.div(n, visits)
        at = pl.ds(_start(settings, blocks, jax.lax.rem(n, visits)), tile)
        queries, to_mixed = query[at, head, :], cotangent[at, head, :]
        spans = (x[at][None, :] for x in (own, first, last))
        sees = _sees(*spans, _columns(at)[None, :], j[:, None])
        scores = _capped(settings, _product(keys, queries, 1, 1))
        weights, to_scores = _backward(
            settings,
            scores,
            sees,
            logsumexp[head, at][None, :],
            _product(values, to_mixed, 1, 1),
            delta[head, at][None, :],
        )
        value_gradient += _product(weights.astype(to_mixed.dtype), to_mixed, 1, 0)
        return key_gradient + _product(
            to_scores.astype(queries.dtype), queries, 1, 0
        ), value_gradient

    start, heads = (_zeros(keys), _zeros(values)), query.shape[1]
    key_gradient, value_gradient = jax.lax.fori_loop(0, heads * visits, visit, start)
    to_key[...], to_value[...] = (
        key_gradient.astype(keys.dtype),
        value_gradient.astype(values.dtype),
    )


def _visits(settings: Settings, count) -> Array:
    """Of tiles, where `count` is of blocks."""
    return count[...] * (settings.block // settings.tile)


def _start(settings: Settings, blocks, n: Array) -> Array:
    """The first column of the n-th tile to visit."""
    tiles = settings.block // settings.tile
    return blocks[jax.lax.div(n, tiles)] * settings.block + jax.lax.rem(n, tiles) * settings.tile


def _columns(at: pl.Slice) -> Array:
    return at.start + jnp.arange(at.size)


def _sees(own: Array, first: Array, last: Array, i: Array, j: Array) -> Array:
    """Whether queries at columns i see columns j, arrays of [tile, 1] or [1, tile]."""
    return ((own <= j) & (j <= i)) | ((first <= j) & (j <= last))


def _capped(settings: Settings, scores: Array) -> Array:
    cap = settings.softcap
    return scores if cap is None else cap * jnp.tanh(scores / cap)


def _backward(settings: Settings, scores, sees, logsumexp, to_weights, delta):
    """The weights, and the gradient of the scores before their cap."""
    weights = jnp.where(sees, jnp.exp(scores - logsumexp), 0.0)
    to_scores = weights * (to_weights - delta)
    if settings.softcap is not None:
        to_scores *= 1 - (scores / settings.softcap) ** 2
    return weights, to_scores


def _product(a: Array, b: Array, a_axis: int, b_axis: int) -> Array:
    dimensions = (((a_axis,), (b_axis,)), ((), ()))
    return jax.lax.dot_general(a, b, dimensions, preferred_element_type=jnp.float32)


def _zeros(like: Array) -> Array:
    return jnp.zeros(like.shape, jnp.float32)
