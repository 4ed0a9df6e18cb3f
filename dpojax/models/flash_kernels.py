"""The programs of `models.flash`. Each computes one tile of columns of one head, in one row.

A program gets the list of blocks to visit, which is the first `count[...]` of `blocks`, and the
spans of columns that its queries see (`spans.Spans`). Shapes in comments: i queries and j keys of a
tile, E size of a head, T' columns of a padded row, G heads of queries that share a head of keys.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array
from jax.experimental import pallas as pl

from dpojax.models.attention import HIDDEN


class Settings(NamedTuple):
    """The static settings of a call."""

    tile: int  # columns that a program works on at once; it divides the block
    block: int  # columns of a block, as `count` and `blocks` count them
    softcap: float | None
    interpret: bool  # run on a CPU, for tests


def flash_forward(
    settings: Settings,
    count,
    blocks,
    branch_first,
    prompt_first,
    prompt_last,
    query,
    key,
    value,
    mixed_out,
    logsumexp_out,
):
    """Compute the attention of a tile of queries [i, E] over all keys [T', E] that it sees."""
    queries, tile = query[...], settings.tile  # [i, E]
    i = pl.program_id(0) * tile + jnp.arange(tile)  # [i]
    spans = branch_first[...], prompt_first[...], prompt_last[...]  # [i] each

    def visit(n, carry):
        mixed, top, total = carry  # [i, E], [i], [i]
        at = pl.ds(_start(settings, blocks, n), tile)
        keys, values = key[at, :], value[at, :]  # [j, E]
        sees = _sees(*(x[:, None] for x in spans), i[:, None], _columns(at)[None, :])  # [i, j]
        scores = jnp.where(sees, _capped(settings, _product(queries, keys, 1, 1)), HIDDEN)  # [i, j]
        # The sums of a query have no meaning until it meets a column that it sees. All tokens see
        # themselves, so each will. Then exp(HIDDEN - highest) = 0 removes the earlier sums.
        highest = jnp.maximum(top, scores.max(axis=1))  # [i]
        shrink, weights = jnp.exp(top - highest), jnp.exp(scores - highest[:, None])  # [i], [i, j]
        mixed = mixed * shrink[:, None] + _product(weights.astype(values.dtype), values, 1, 0)
        return mixed, highest, total * shrink + weights.sum(axis=1)

    start = _zeros(queries), jnp.full(tile, HIDDEN, jnp.float32), jnp.zeros(tile, jnp.float32)
    mixed, top, total = jax.lax.fori_loop(0, _tile_visits(settings, count), visit, start)
    mixed_out[...] = (mixed / total[:, None]).astype(mixed_out.dtype)
    logsumexp_out[...] = top + jnp.log(total)


def flash_query_gradient(
    settings: Settings,
    count,
    blocks,
    branch_first,
    prompt_first,
    prompt_last,
    query,
    key,
    value,
    cotangent,
    logsumexp,
    delta,
    d_query_out,
):
    """Compute the gradient of a tile of queries [i, E], from all keys that it sees."""
    queries, d_mixed, tile = query[...], cotangent[...], settings.tile  # [i, E], [i, E]
    query_logsumexp, query_delta = logsumexp[...][:, None], delta[...][:, None]  # [i, 1]
    i = pl.program_id(0) * tile + jnp.arange(tile)  # [i]
    spans = branch_first[...], prompt_first[...], prompt_last[...]  # [i] each

    def visit(n, d_query):
        at = pl.ds(_start(settings, blocks, n), tile)
        keys, values = key[at, :], value[at, :]  # [j, E]
        sees = _sees(*(x[:, None] for x in spans), i[:, None], _columns(at)[None, :])  # [i, j]
        scores = _capped(settings, _product(queries, keys, 1, 1))  # [i, j]
        d_weights = _product(d_mixed, values, 1, 1)  # [i, j]
        _, d_scores = _softmax_gradient(
            settings, scores, sees, query_logsumexp, d_weights, query_delta
        )
        return d_query + _product(d_scores.astype(keys.dtype), keys, 1, 0)  # [i, E]

    d_query = jax.lax.fori_loop(0, _tile_visits(settings, count), visit, _zeros(queries))
    d_query_out[...] = d_query.astype(d_query_out.dtype)


def flash_key_gradient(
    settings: Settings,
    count,
    blocks,
    branch_first,
    prompt_first,
    prompt_last,
    query,
    key,
    value,
    cotangent,
    logsumexp,
    delta,
    d_key_out,
    d_value_out,
):
    """Compute the gradients of a tile of keys and values [j, E].

    They come from all queries [T', G, E], of all heads of the group, that see them. Scores are
    [j, i], keys by queries, so that no result of a product has to be transposed.
    """
    keys, values, tile = key[...], value[...], settings.tile  # [j, E], [j, E]
    j = pl.program_id(0) * tile + jnp.arange(tile)  # [j]
    visits = _tile_visits(settings, count)

    def visit(n, carry):
        d_key, d_value = carry  # [j, E], [j, E]
        head = jax.lax.div(n, visits)  # all tiles of one head, then those of the next
        at = pl.ds(_start(settings, blocks, jax.lax.rem(n, visits)), tile)
        queries, d_mixed = query[at, head, :], cotangent[at, head, :]  # [i, E]
        spans = (x[at][None, :] for x in (branch_first, prompt_first, prompt_last))
        sees = _sees(*spans, _columns(at)[None, :], j[:, None])  # [j, i]
        scores = _capped(settings, _product(keys, queries, 1, 1))  # [j, i]
        weights, d_scores = _softmax_gradient(
            settings,
            scores,
            sees,
            logsumexp[head, at][None, :],  # [1, i]
            _product(values, d_mixed, 1, 1),  # [j, i]
            delta[head, at][None, :],  # [1, i]
        )
        d_value += _product(weights.astype(d_mixed.dtype), d_mixed, 1, 0)  # [j, E]
        return d_key + _product(d_scores.astype(queries.dtype), queries, 1, 0), d_value

    start, heads = (_zeros(keys), _zeros(values)), query.shape[1]
    d_key, d_value = jax.lax.fori_loop(0, heads * visits, visit, start)
    d_key_out[...] = d_key.astype(d_key_out.dtype)
    d_value_out[...] = d_value.astype(d_value_out.dtype)


def _tile_visits(settings: Settings, count) -> Array:
    """How many tiles to visit; `count` is the number of blocks."""
    return count[...] * (settings.block // settings.tile)


def _start(settings: Settings, blocks, n: Array) -> Array:
    """The first column of the n-th tile to visit."""
    tiles = settings.block // settings.tile
    return blocks[jax.lax.div(n, tiles)] * settings.block + jax.lax.rem(n, tiles) * settings.tile


def _columns(at: pl.Slice) -> Array:
    return at.start + jnp.arange(at.size)  # [tile]


def _sees(
    branch_first: Array, prompt_first: Array, prompt_last: Array, i: Array, j: Array
) -> Array:
    """Whether queries at columns i see columns j; arrays are [tile, 1] or [1, tile]."""
    in_branch = (branch_first <= j) & (j <= i)
    return in_branch | ((prompt_first <= j) & (j <= prompt_last))


def _capped(settings: Settings, scores: Array) -> Array:
    cap = settings.softcap
    return scores if cap is None else cap * jnp.tanh(scores / cap)


def _softmax_gradient(settings: Settings, scores, sees, logsumexp, d_weights, delta):
    """The softmax's weights, and the gradient of the scores before their cap."""
    weights = jnp.where(sees, jnp.exp(scores - logsumexp), 0.0)
    d_scores = weights * (d_weights - delta)
    if settings.softcap is not None:
        d_scores *= 1 - (scores / settings.softcap) ** 2  # 1 - tanh^2
    return weights, d_scores


def _product(a: Array, b: Array, a_axis: int, b_axis: int) -> Array:
    """The product of two matrices that sums over these axes, in float32."""
    dimensions = (((a_axis,), (b_axis,)), ((), ()))
    return jax.lax.dot_general(a, b, dimensions, preferred_element_type=jnp.float32)


def _zeros(like: Array) -> Array:
    return jnp.zeros(like.shape, jnp.float32)
