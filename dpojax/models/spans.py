"""`attention.attention_mask` in memory linear in the row: two spans of columns a token."""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array


class Spans(NamedTuple):
    """The columns j that the token of column i sees, int32 [R, T] each.

    own <= j <= i, on its own branch, and first <= j <= last, on the prompt of its segment; nothing
    there where last < first, as for the prompt's own tokens.
    """

    own: Array
    first: Array
    last: Array


def spans(rows, window: int | None, length: int) -> Spans:
    """Of rows that are padded to `length` columns; padding sees itself alone.

    Tokens of one branch have to stand next to each other, and behind their prompt, as in
    `data.rows`; padding may stand anywhere between.
    """
    pad = lambda x: jnp.pad(x, ((0, 0), (0, length - x.shape[1])))
    segment, branch, positions = map(pad, (rows.segment, rows.branch, rows.positions))
    column = jax.lax.broadcasted_iota(jnp.int32, segment.shape, 1)
    latest = lambda where: jax.lax.cummax(jnp.where(where, column, 0), axis=1)
    at = lambda x, columns: jnp.take_along_axis(x, columns, axis=1)
    before = lambda x: jnp.pad(x, ((0, 0), (1, 0)), constant_values=-1)[:, :-1]
    new = (segment != before(segment)) | (branch != before(branch))
    prompt = (branch == 0) & (segment > 0)

    own = jnp.where(segment > 0, latest(new), column)
    first, last = latest(prompt & new), latest(prompt)
    shared = (branch > 0) & at(prompt, last) & (at(segment, last) == segment)
    if window is not None:
        own = jnp.maximum(own, column - window + 1)
        first = jnp.maximum(first, first + positions - at(positions, first) - window + 1)
    first = jnp.where(shared, jnp.minimum(first, last + 1), 1)
    return Spans(own, first, jnp.where(shared, last, 0))


def blocks_seen(first: Array, last: Array, block: int) -> Array:
    """Whether a token of block i sees a column of block j: bool [R, T / block, T / block].

    Args:
      first, last: int32 [R, T], the columns that each token sees; none where last is less.
    """
    starts = block * jnp.arange(first.shape[1] // block)[None, None]
    low, high = first[..., None], last[..., None]
    sees = (low <= high) & (low < starts + block) & (high >= starts)
    return sees.reshape(len(first), -1, block, starts.size).any(axis=2)
