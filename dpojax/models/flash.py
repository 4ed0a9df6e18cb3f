"""Attention on GPUs for rows that share prompts: FlashAttention in Pallas, memory linear in length.

The mask is computed where it is used, from two spans of columns a token (`spans`). Blocks of
columns that no token of a block sees are not computed: of every block there is a list of those to
visit, as in FlexAttention (Dong et al. 2024), which is data and may differ from row to row. The
lists are all that is kept and grows with T^2: 2 (T / 64)^2 int32 a row, 2 MiB at 32,768 columns.

Forward is algorithm 1 of FlashAttention-2 (Dao 2023), backward its algorithm 2 as two kernels, one
for the gradient of the queries and one for that of keys and values, so that each number has one
writer and the result does not depend on the order of blocks.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array
from jax.ad_checkpoint import checkpoint_name
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton

from dpojax.models.attention import Kernel, by_device, scaled
from dpojax.models.flash_kernels import (
    Settings,
    flash_forward,
    flash_key_gradient,
    flash_query_gradient,
)
from dpojax.models.layers import MIXED
from dpojax.models.spans import Spans, blocks_seen, spans

BLOCK = 64  # columns; what the lists of blocks name
LEAST = 16  # of each dimension of a matrix that tensor cores multiply
# A program holds up to four tiles, of queries, keys, values and a cotangent: 64 KiB of the shared
# memory, of which every GPU since Ampere has 99 KiB or more. Forward the next keys and values are
# copied while these are used, which makes 80 KiB.
TILE_BYTES = 16 * 1024
# Without tensor cores, as full float32 is multiplied, scores of 64 by 64 overflow the registers.
FLOAT32_TILE = 32
LARGEST = 256  # head_dim, at which a tile of float32 has the least columns


class Visits(NamedTuple):
    """Which blocks each block visits, ascending: the first `count` of its list."""

    count: Array  # int32 [R, T' / block]
    blocks: Array  # int32 [R, T' / block, T' / block]


class Seen(NamedTuple):
    """What tokens see, of rows padded to T', a multiple of a block."""

    spans: Spans
    keys: Visits  # of each block of queries
    queries: Visits  # of each block of keys


def seen(rows, window: int | None = None, *, block: int = BLOCK) -> Seen:
    """What `attention.attention_mask` says, for rows laid out as `spans.spans` asks.

    Args:
      block: columns, a power of two of at least 16.
    """
    found = spans(rows, window, -(-rows.tokens.shape[1] // block) * block)
    column = jax.lax.broadcasted_iota(jnp.int32, found.own.shape, 1)
    blocks = blocks_seen(found.own, column, block) | blocks_seen(found.first, found.last, block)
    return Seen(found, _visits(blocks), _visits(blocks.swapaxes(1, 2)))


def attend(
    query, key, value, mask, scale, *, softcap=None, tile: int | None = None, interpret=False
) -> Array:
    """As `attention.attend`, with `seen` as its mask. Like XLA's on a GPU, products of float32 are
    of TF32 unless `jax_default_matmul_precision` asks for more.

    Args:
      tile: columns that a program works on at once, a power of two from 16 to the mask's block; by
        default what fits into shared memory.
      interpret: run the kernels' program on a CPU, for tests.
    """
    block = mask.spans.own.shape[1] // mask.keys.count.shape[1]
    tile = tile or min(block, _tile(query.shape[3], query.dtype))
    mix = functools.partial(_mix, Settings(tile, block, softcap, interpret))
    return by_device(mix, scaled(query, scale), key, value, mask)


def _tile(dim: int, dtype) -> int:
    bytes_each = jnp.dtype(dtype).itemsize
    most = FLOAT32_TILE if bytes_each > 2 else BLOCK
    return max(LEAST, min(most, TILE_BYTES // (pl.next_power_of_2(dim) * bytes_each)))


def _visits(blocks: Array) -> Visits:
    order = jnp.argsort(~blocks, axis=-1, stable=True)
    return Visits(blocks.sum(-1, dtype=jnp.int32), order.astype(jnp.int32))


def _mix(settings: Settings, query, key, value, mask: Seen) -> Array:
    """Of one device's rows and heads; [R, T, heads, head_dim] like `query`."""
    _, columns, _, dim = query.shape
    longer = mask.spans.own.shape[1] - columns
    wider = max(LEAST, pl.next_power_of_2(dim)) - dim
    pad = lambda x: jnp.pad(x, ((0, 0), (0, longer), (0, 0), (0, wider)))
    return _flash(settings, *map(pad, (query, key, value)), mask)[:, :columns, :, :dim]


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _flash(settings: Settings, query, key, value, mask) -> Array:
    return _flash_forward(settings, query, key, value, mask)[0]


def _flash_forward(settings: Settings, query, key, value, mask: Seen):
    rows, length, heads, _ = query.shape
    at = _by_query(settings, query, key)
    sums = jax.ShapeDtypeStruct((rows, heads, length), jnp.float32)
    call = pl.pallas_call(
        functools.partial(flash_forward, settings),
        grid=(length // settings.tile, heads, rows),
        in_specs=[*at.mask, at.query, at.key, at.key],
        out_specs=[at.query, at.sums],
        out_shape=[query, sums],
        **_how(settings, query, stages=2),
    )
    kept = call(*mask.keys, *mask.spans, query, key, value)
    mixed, logsumexp = checkpoint_name(tuple(kept), MIXED)
    return mixed, (query, key, value, mask, mixed, logsumexp)


def _flash_backward(settings: Settings, saved, cotangent):
    query, key, value, mask, mixed, logsumexp = saved
    rows, length, heads, _ = query.shape
    # What the softmax takes off the gradient of each of a query's weights.
    delta = (mixed.astype(jnp.float32) * cotangent.astype(jnp.float32)).sum(-1).swapaxes(1, 2)
    given = *mask.spans, query, key, value, cotangent, logsumexp, delta
    tiles, how = length // settings.tile, _how(settings, query, stages=1)

    at = _by_query(settings, query, key)
    to_query = pl.pallas_call(
        functools.partial(flash_query_gradient, settings),
        grid=(tiles, heads, rows),
        in_specs=[*at.mask, at.query, at.key, at.key, at.query, at.sums, at.sums],
        out_specs=at.query,
        out_shape=query,
        **how,
    )(*mask.keys, *given)

    at = _by_key(settings, query, key)
    to_key, to_value = pl.pallas_call(
        functools.partial(flash_key_gradient, settings),
        grid=(tiles, key.shape[2], rows),
        in_specs=[*at.mask, at.query, at.key, at.key, at.query, at.sums, at.sums],
        out_specs=[at.key, at.key],
        out_shape=[key, value],
        **how,
    )(*mask.queries, *given)
    return to_query, to_key, to_value, None


_flash.defvjp(_flash_forward, _flash_backward)


class Specs(NamedTuple):
    """Which part of each array a program is given; its grid is (tiles, heads, rows)."""

    mask: tuple[pl.BlockSpec, ...]  # of a count, a list of blocks, and three spans
    query: pl.BlockSpec  # of queries, and of what has their shape
    key: pl.BlockSpec
    sums: pl.BlockSpec  # of what there is one of a query


def _by_query(settings: Settings, query: Array, key: Array) -> Specs:
    """A tile of one head's queries, and all keys of its group."""
    tile, (_, length, heads, dim) = settings.tile, query.shape
    each = heads // key.shape[2]
    span = pl.BlockSpec((None, tile), lambda t, h, r: (r, t))
    return Specs(
        (*_visit_specs(settings, length), span, span, span),
        pl.BlockSpec((None, tile, None, dim), lambda t, h, r: (r, t, h, 0)),
        pl.BlockSpec((None, length, None, dim), lambda t, h, r: (r, 0, jax.lax.div(h, each), 0)),
        pl.BlockSpec((None, None, tile), lambda t, h, r: (r, h, t)),
    )


def _by_key(settings: Settings, query: Array, key: Array) -> Specs:
    """A tile of one head's keys, and all queries of all heads that read them."""
    tile, (_, length, heads, dim) = settings.tile, query.shape
    each = heads // key.shape[2]
    span = pl.BlockSpec((None, length), lambda t, g, r: (r, 0))
    return Specs(
        (*_visit_specs(settings, length), span, span, span),
        pl.BlockSpec((None, length, each, dim), lambda t, g, r: (r, 0, g, 0)),
        pl.BlockSpec((None, tile, None, dim), lambda t, g, r: (r, t, g, 0)),
        pl.BlockSpec((None, each, length), lambda t, g, r: (r, g, 0)),
    )


def _visit_specs(settings: Settings, length: int) -> tuple[pl.BlockSpec, pl.BlockSpec]:
    block_of = lambda t: jax.lax.div(t, settings.block // settings.tile)
    return (
        pl.BlockSpec((None, None), lambda t, h, r: (r, block_of(t))),
        pl.BlockSpec((None, None, length // settings.block), lambda t, h, r: (r, block_of(t), 0)),
    )


def _how(settings: Settings, query: Array, stages: int) -> dict:
    # With 4 warps the sums of a wider head would not fit into a thread's registers.
    warps = 4 if query.shape[3] <= 64 else 8
    params = triton.CompilerParams(num_warps=warps, num_stages=stages)
    return dict(compiler_params=params, interpret=settings.interpret)


FLASH = Kernel(seen, attend)
