"""The mask of `attention.attention_mask` as two spans of columns for each token.

This takes memory that is linear in the length of a row. Letters of shapes: see `dpojax.models`.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array


class Spans(NamedTuple):
    """The columns j that the token of column i sees, int32 [R, T] each.

    One span, branch_first <= j <= i, lies in its own branch. The other, prompt_first <= j <=
    prompt_last, lies in the prompt of its segment. It is empty (prompt_last < prompt_first) for the
    tokens of the prompt itself.
    """

    branch_first: Array
    prompt_first: Array
    prompt_last: Array


def spans(rows, window: int | None, length: int) -> Spans:
    """Compute the spans of rows that are padded to `length` columns; padding sees only itself.

    The tokens of a branch must stand next to each other, after their prompt, as in `data.rows`.
    Padding may stand anywhere between branches.

    Args:
      rows: see `attention.PlainRows`.
      window: how many positions a token sees, or None.
      length: T, at least the columns of the rows.
    """
    segment = _pad_columns(rows.segment, length)
    branch = _pad_columns(rows.branch, length)
    positions = _pad_columns(rows.positions, length)
    column = jax.lax.broadcasted_iota(jnp.int32, segment.shape, 1)
    # Whether a branch, a prompt or padding starts here, and whether a token is one of a prompt.
    starts = (segment != _previous(segment)) | (branch != _previous(branch))
    in_prompt = (branch == 0) & (segment > 0)

    branch_first = jnp.where(segment > 0, _latest(starts, column), column)
    prompt_first, prompt_last = _latest(in_prompt & starts, column), _latest(in_prompt, column)
    # The latest prompt is that of the token's own segment, unless the segment has none.
    is_its_own = _at(in_prompt, prompt_last) & (_at(segment, prompt_last) == segment)
    has_prompt = (branch > 0) & is_its_own
    if window is not None:
        branch_first = jnp.maximum(branch_first, column - window + 1)
        # Columns of a prompt are one position apart, so the window's first position is a column.
        prompt_position = _at(positions, prompt_first)
        prompt_first = jnp.maximum(
            prompt_first, prompt_first + positions - prompt_position - window + 1
        )
    prompt_first = jnp.where(has_prompt, jnp.minimum(prompt_first, prompt_last + 1), 1)
    return Spans(branch_first, prompt_first, jnp.where(has_prompt, prompt_last, 0))


def _pad_columns(x: Array, length: int) -> Array:
    return jnp.pad(x, ((0, 0), (0, length - x.shape[1])))


def _previous(x: Array) -> Array:
    """The value in the column before, -1 in the first column."""
    return jnp.pad(x, ((0, 0), (1, 0)), constant_values=-1)[:, :-1]


def _latest(where: Array, column: Array) -> Array:
    """The last column up to this one at which `where` is true; 0 if there is none."""
    return jax.lax.cummax(jnp.where(where, column, 0), axis=1)


def _at(x: Array, columns: Array) -> Array:
    return jnp.take_along_axis(x, columns, axis=1)


def blocks_seen(first: Array, last: Array, block: int) -> Array:
    """Compute which blocks of columns the tokens of a block see.

    Args:
      first, last: int32 [R, T], the span of columns that each token sees; empty if last < first.
      block: columns of a block; it divides T.

    Returns:
      bool [R, T / block (i), T / block (j)]: whether a token of block i sees a column of block j.
    """
    starts = block * jnp.arange(first.shape[1] // block)[None, None]  # [1, 1, T / block]
    low, high = first[..., None], last[..., None]  # [R, T, 1]
    sees = (low <= high) & (low < starts + block) & (high >= starts)
    return sees.reshape(len(first), -1, block, starts.size).any(axis=2)
