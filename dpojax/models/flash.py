"""Attention on GPUs for rows that share prompts: FlashAttention in Pallas, memory linear in length.

The kernels compute the mask where they use it, from two spans of columns for each token (`spans`).
They skip blocks of columns that no token of a block sees. For every block there is a list of blocks
to visit, as in FlexAttention (Dong et al. 2024). The lists are data and may differ from row to row.
Only they need memory that grows with T^2: 2 (T / 64)^2 int32 for a row, or 2 MiB at 32,768 columns.

The forward pass is algorithm 1 of FlashAttention-2 (Dao 2023). The backward pass is its algorithm 2
as two kernels, one for the gradient of the queries and one for that of keys and values. So each
number is written by one program, and the result does not depend on the order of blocks.

Letters of shapes: see `dpojax.models`; T' is T padded to a multiple of a block, X = T' / block.
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

BLOCK = 64  # columns of a block, as the lists of blocks count them
MIN_TILE = 16  # the smallest side of a matrix that tensor cores multiply
# A program holds up to four tiles: of queries, keys, values and a cotangent. They take 64 KiB of
# shared memory, of which every GPU since Ampere has 99 KiB or more. In the forward pass the next
# keys and values are copied while the current ones are used, which makes 80 KiB.
TILE_BYTES = 16 * 1024
# Full float32 is multiplied without tensor cores. Scores of 64 by 64 then overflow the registers.
FLOAT32_TILE = 32
MAX_HEAD_DIM = 256  # at which a float32 tile of TILE_BYTES has MIN_TILE columns


class Visits(NamedTuple):
    """Which blocks each block visits: the first `count` of its list, in ascending order."""

    count: Array  # int32 [R, X]
    blocks: Array  # int32 [R, X, X]


class FlashMask(NamedTuple):
    """Which columns tokens see, of rows padded to T' columns."""

    spans: Spans  # [R, T'] each
    keys: Visits  # the blocks of keys that each block of queries visits
    queries: Visits  # the blocks of queries that each block of keys visits


def flash_mask(rows, window: int | None = None, *, block: int = BLOCK) -> FlashMask:
    """Compute the mask of `attention.attention_mask` as spans and lists of blocks.

    Args:
      rows: laid out as `spans.spans` needs it.
      window: how many positions a token sees, or None.
      block: columns of a block, a power of two of at least 16.
    """
    seen = spans(rows, window, -(-rows.tokens.shape[1] // block) * block)
    column = jax.lax.broadcasted_iota(jnp.int32, seen.branch_first.shape, 1)
    in_branch = blocks_seen(seen.branch_first, column, block)
    blocks = in_branch | blocks_seen(seen.prompt_first, seen.prompt_last, block)  # [R, X, X]
    return FlashMask(seen, _visits(blocks), _visits(blocks.swapaxes(1, 2)))


def attend(
    query, key, value, mask, scale, *, softcap=None, tile: int | None = None, interpret=False
) -> Array:
    """Compute `attention.attend` with a FlashMask.

    As with XLA on a GPU, products of float32 use TF32, unless `jax_default_matmul_precision` is set
    to more.

    Args:
      query, key, value, scale, softcap: as for `attention.attend`.
      mask: see `flash_mask`.
      tile: columns that a program works on at once, a power of two from 16 to the mask's block; by
        default what fits into shared memory.
      interpret: run the kernels' program on a CPU, for tests.
    """
    block = mask.spans.branch_first.shape[1] // mask.keys.count.shape[1]
    tile = tile or min(block, _tile(query.shape[3], query.dtype))
    mix = functools.partial(_mix, Settings(tile, block, softcap, interpret))
    return by_device(mix, scaled(query, scale), key, value, mask)


def _tile(head_dim: int, dtype) -> int:
    """How many columns of a head fit into TILE_BYTES."""
    itemsize = jnp.dtype(dtype).itemsize
    largest = FLOAT32_TILE if itemsize > 2 else BLOCK
    return max(MIN_TILE, min(largest, TILE_BYTES // (pl.next_power_of_2(head_dim) * itemsize)))


def _visits(blocks: Array) -> Visits:
    """Lists of the true entries of each row of `blocks`, bool [R, X, X]."""
    # A stable sort puts the true entries first and leaves them in ascending order.
    order = jnp.argsort(~blocks, axis=-1, stable=True)
    return Visits(blocks.sum(-1, dtype=jnp.int32), order.astype(jnp.int32))


def _mix(settings: Settings, query, key, value, mask: FlashMask) -> Array:
    """Attention of the rows and heads of one device, [R, T, H, E] like `query`.

    Columns are padded to T', and heads to a power of two: zeros add nothing to a product.
    """
    _, columns, _, head_dim = query.shape
    more_columns = mask.spans.branch_first.shape[1] - columns
    more_dims = max(MIN_TILE, pl.next_power_of_2(head_dim)) - head_dim
    padding = ((0, 0), (0, more_columns), (0, 0), (0, more_dims))
    query, key, value = (jnp.pad(x, padding) for x in (query, key, value))
    return _flash(settings, query, key, value, mask)[:, :columns, :, :head_dim]


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _flash(settings: Settings, query, key, value, mask) -> Array:
    return _flash_forward(settings, query, key, value, mask)[0]


def _flash_forward(settings: Settings, query, key, value, mask: FlashMask):
    rows, length, heads, _ = query.shape
    specs = _specs_by_query(settings, query, key)
    logsumexp_shape = jax.ShapeDtypeStruct((rows, heads, length), jnp.float32)
    call = pl.pallas_call(
        functools.partial(flash_forward, settings),
        grid=(length // settings.tile, heads, rows),
        in_specs=[*specs.mask, specs.query, specs.key, specs.key],
        out_specs=[specs.query, specs.per_query],
        out_shape=[query, logsumexp_shape],
        **_call_options(settings, query, stages=2),
    )
    outputs = call(*mask.keys, *mask.spans, query, key, value)
    mixed, logsumexp = checkpoint_name(tuple(outputs), MIXED)
    return mixed, (query, key, value, mask, mixed, logsumexp)


def _flash_backward(settings: Settings, saved, cotangent):
    query, key, value, mask, mixed, logsumexp = saved
    rows, length, heads, _ = query.shape
    # delta = sum_e mixed * cotangent, [R, H, T']. The gradient of a score is
    # weight * (gradient of the weight - delta), from the sum of the softmax.
    delta = (mixed.astype(jnp.float32) * cotangent.astype(jnp.float32)).sum(-1).swapaxes(1, 2)
    inputs = *mask.spans, query, key, value, cotangent, logsumexp, delta
    tiles, options = length // settings.tile, _call_options(settings, query, stages=1)

    specs = _specs_by_query(settings, query, key)
    d_query = pl.pallas_call(
        functools.partial(flash_query_gradient, settings),
        grid=(tiles, heads, rows),
        in_specs=specs.backward_inputs(),
        out_specs=specs.query,
        out_shape=query,
        **options,
    )(*mask.keys, *inputs)

    specs = _specs_by_key(settings, query, key)
    d_key, d_value = pl.pallas_call(
        functools.partial(flash_key_gradient, settings),
        grid=(tiles, key.shape[2], rows),
        in_specs=specs.backward_inputs(),
        out_specs=[specs.key, specs.key],
        out_shape=[key, value],
        **options,
    )(*mask.queries, *inputs)
    return d_query, d_key, d_value, None


_flash.defvjp(_flash_forward, _flash_backward)


class Specs(NamedTuple):
    """Which part of each array a program gets. The grid is (tiles, heads, rows)."""

    mask: tuple[pl.BlockSpec, ...]  # of a count, a list of blocks, and three spans
    query: pl.BlockSpec  # of queries, and of arrays with their shape, [R, T', H, E]
    key: pl.BlockSpec  # of keys and values, [R, T', K, E]
    per_query: pl.BlockSpec  # of arrays with one number for each query, [R, H, T']

    def backward_inputs(self) -> list[pl.BlockSpec]:
        """Of the mask, query, key, value, cotangent, logsumexp and delta."""
        per_query = self.per_query
        return [*self.mask, self.query, self.key, self.key, self.query, per_query, per_query]


def _specs_by_query(settings: Settings, query: Array, key: Array) -> Specs:
    """A program gets one tile of one head's queries, and all keys of its group."""
    tile, (_, length, heads, head_dim) = settings.tile, query.shape
    group = heads // key.shape[2]
    span = pl.BlockSpec((None, tile), lambda t, h, r: (r, t))
    keys_of_head = pl.BlockSpec(
        (None, length, None, head_dim), lambda t, h, r: (r, 0, jax.lax.div(h, group), 0)
    )
    return Specs(
        mask=(*_visit_specs(settings, length), span, span, span),
        query=pl.BlockSpec((None, tile, None, head_dim), lambda t, h, r: (r, t, h, 0)),
        key=keys_of_head,
        per_query=pl.BlockSpec((None, None, tile), lambda t, h, r: (r, h, t)),
    )


def _specs_by_key(settings: Settings, query: Array, key: Array) -> Specs:
    """A program gets one tile of one head's keys, and all queries of all heads that read them."""
    tile, (_, length, heads, head_dim) = settings.tile, query.shape
    group = heads // key.shape[2]
    span = pl.BlockSpec((None, length), lambda t, k, r: (r, 0))
    return Specs(
        mask=(*_visit_specs(settings, length), span, span, span),
        query=pl.BlockSpec((None, length, group, head_dim), lambda t, k, r: (r, 0, k, 0)),
        key=pl.BlockSpec((None, tile, None, head_dim), lambda t, k, r: (r, t, k, 0)),
        per_query=pl.BlockSpec((None, group, length), lambda t, k, r: (r, k, 0)),
    )


def _visit_specs(settings: Settings, length: int) -> tuple[pl.BlockSpec, pl.BlockSpec]:
    """The count and the list of blocks of the block that a tile lies in."""

    def block_of(tile):
        return jax.lax.div(tile, settings.block // settings.tile)

    return (
        pl.BlockSpec((None, None), lambda t, h, r: (r, block_of(t))),
        pl.BlockSpec((None, None, length // settings.block), lambda t, h, r: (r, block_of(t), 0)),
    )


def _call_options(settings: Settings, query: Array, stages: int) -> dict:
    # With 4 warps, the sums of a head over 64 dimensions do not fit into a thread's registers.
    warps = 4 if query.shape[3] <= 64 else 8
    params = triton.CompilerParams(num_warps=warps, num_stages=stages)
    return {"compiler_params": params, "interpret": settings.interpret}


FLASH = Kernel(flash_mask, attend)
