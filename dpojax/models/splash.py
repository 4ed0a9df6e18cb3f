"""Attention on TPUs: JAX's splash kernel for rows that share prompts, memory linear in length.

In a row, every token sees two spans of columns: its own branch up to itself, and the prompt of its
segment (`spans`). The kernel runs once for each span, and the two softmaxes are merged through
their logsumexp. In the backward pass, both runs get the merged output and the merged logsumexp. The
kernel then gives exactly its part of the gradient, as in ring attention (Liu et al. 2023).

Spans are data: rows may have any number of examples and branches. Blocks of columns that no token
of a block sees are skipped when the program runs. The rows of a device lie one after another on the
kernel's sequence axis, and its grid is as wide as one row.

Letters of shapes: see `dpojax.models`; T' is T padded to a multiple of a block, X = T' / block.
"""

from __future__ import annotations

import functools
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array
from jax.ad_checkpoint import checkpoint_name
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as splash
from jax.experimental.pallas.ops.tpu.splash_attention.splash_attention_mask_info import MaskInfo

from dpojax.models.attention import Kernel, by_device, scaled
from dpojax.models.layers import MIXED
from dpojax.models.spans import blocks_seen, spans

MAX_COLUMNS = 2**16  # of a row: two column numbers are packed into an int32
BLOCKS = (512, 256, 128)  # columns that the kernel works on at once; a TPU has 128 lanes
MAX_PADDING = 1 / 4  # of a row: how much it may be padded for the sake of larger blocks


class SpanMask(NamedTuple):
    """The span of columns that each token sees in one run of the kernel, of rows padded to T'."""

    span: Array  # int32 [R, T']: first column + 2**16 * last column; empty if last < first
    blocks: Array  # bool [R, X, X]: whether a token of block i sees a column of block j


class Settings(NamedTuple):
    """The static settings of a run of the kernel."""

    length: int  # columns of a row, T'
    softcap: float | None
    interpret: bool  # run on a CPU, for tests


def span_masks(rows, window: int | None = None) -> tuple[SpanMask, SpanMask]:
    """Compute the mask of each run: of the token's own branch, and of its prompt.

    Args:
      rows: laid out as `spans.spans` needs it.
      window: how many positions a token sees, or None.

    Raises:
      ValueError: a row has more than 65,536 columns.
    """
    columns = rows.tokens.shape[1]
    length, block = _padded_length(columns)
    if length > MAX_COLUMNS:
        raise ValueError(
            f"model.attention: rows of {columns} tokens; splash takes {MAX_COLUMNS} at most: "
            "shorten them, or set xla"
        )
    branch_first, prompt_first, prompt_last = spans(rows, window, length)
    column = jax.lax.broadcasted_iota(jnp.int32, branch_first.shape, 1)
    return _span_mask(branch_first, column, block), _span_mask(prompt_first, prompt_last, block)


def attend(query, key, value, mask, scale, *, softcap=None, interpret: bool = False) -> Array:
    """Compute `attention.attend` with the two masks of `span_masks`.

    Args:
      query, key, value, scale, softcap: as for `attention.attend`.
      mask: see `span_masks`.
      interpret: run the kernel's program on a CPU, for tests.
    """
    mix = functools.partial(_mix, softcap=softcap, interpret=interpret)
    return by_device(mix, scaled(query, scale), key, value, mask)


def _padded_length(columns: int) -> tuple[int, int]:
    """To how many columns rows are padded, and the block that divides this number.

    The largest block that needs little padding, or else the smallest block.
    """
    for block in BLOCKS:
        length = block * math.ceil(columns / block)
        if length <= (1 + MAX_PADDING) * columns:
            break
    return length, block


def _span_mask(first: Array, last: Array, block: int) -> SpanMask:
    return SpanMask(span=first | (last << 16), blocks=blocks_seen(first, last, block))


def _mix(query, key, value, mask, *, softcap, interpret) -> Array:
    """Attention of the rows and heads of one device, [R, T, H, E] like `query`."""
    rows, columns, heads, head_dim = query.shape
    length = mask[0].span.shape[1]

    def on_one_axis(x):  # [H, R * T', E]
        x = jnp.pad(x, ((0, 0), (0, length - columns), (0, 0), (0, 0)))
        return x.transpose(2, 0, 1, 3).reshape(x.shape[2], rows * length, head_dim)

    settings = Settings(length, softcap, interpret)
    query, key, value = (on_one_axis(x) for x in (query, key, value))
    mixed = _merged(settings, query, key, value, mask)
    return mixed.reshape(heads, rows, length, head_dim)[:, :, :columns].transpose(1, 2, 0, 3)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _merged(settings: Settings, query, key, value, mask) -> Array:
    return _merged_forward(settings, query, key, value, mask)[0]


def _merged_forward(settings: Settings, query, key, value, mask):
    outs, logsumexps = [], []
    for span_mask in mask:
        kernel = splash.SplashAttentionKernel(
            _forward_info(span_mask),
            None,
            None,
            is_mqa=False,
            save_residuals=True,
            residual_checkpoint_name=None,
            **_options(settings, span_mask),
        )
        out, (logsumexp,) = kernel(query, key, value)  # [H, R * T', E], [H, R * T']
        outs.append(out)
        logsumexps.append(logsumexp)
    total = jnp.logaddexp(*logsumexps)
    weights = [jnp.exp(x - total)[..., None] for x in logsumexps]
    # A token with an empty span may get NaN from that run. Its weight there is exactly 0.
    parts = [jnp.where(w > 0, w * out, 0.0) for w, out in zip(weights, outs)]
    mixed = checkpoint_name(sum(parts).astype(query.dtype), MIXED)
    total = checkpoint_name(total, MIXED)
    return mixed, (query, key, value, mask, mixed, total)


def _merged_backward(settings: Settings, saved, cotangent):
    query, key, value, mask, mixed, total = saved
    gradients = []
    for span_mask in mask:
        query_info, key_info = _forward_info(span_mask), _key_info(span_mask)
        residuals = (query, key, value, None, None, mixed, total, query_info, key_info)
        _, _, _, d_query, d_key, d_value, *_ = splash._splash_attention_bwd(
            save_residuals=False,
            is_mqa=False,
            residual_checkpoint_name=None,
            **_options(settings, span_mask),
            res=residuals,
            do=cotangent,
        )
        gradients.append((d_query, d_key, d_value))
    of_branch, of_prompt = gradients
    return *(a + b for a, b in zip(of_branch, of_prompt)), None


_merged.defvjp(_merged_forward, _merged_backward)


def _options(settings: Settings, mask: SpanMask) -> dict:
    block = settings.length // mask.blocks.shape[-1]
    names = "block_q", "block_kv", "block_q_dkv", "block_kv_dkv", "block_q_dq", "block_kv_dq"
    return {
        "mask_value": splash.DEFAULT_MASK_VALUE,
        "block_sizes": splash.BlockSizes(**dict.fromkeys(names, block)),
        "mask_function": _mask_function(settings.length),
        "attn_logits_soft_cap": settings.softcap,
        "interpret": settings.interpret,
    }


@functools.cache
def _mask_function(length: int):
    """The function by which the kernel computes the mask of a block of its sequence axis.

    Cached, so that equal settings give the same function and the kernel is not compiled anew.
    """

    def sees(span: Array, column: Array) -> Array:
        # A block lies in one row, and a row starts at a multiple of its length.
        corner = column[:1, :1]
        column = column - (corner - jax.lax.rem(corner, jnp.full_like(corner, length)))
        return (column >= (span & 0xFFFF)) & (column <= jax.lax.shift_right_logical(span, 16))

    return sees


def _forward_info(mask: SpanMask) -> MaskInfo:
    """Which blocks of keys each block of queries visits: forward, and for the queries' gradient."""
    rows, _, count = mask.blocks.shape
    return _mask_info(mask, visited_axis=2, order=(0, 1, 2), shape=(1, rows * count, count))


def _key_info(mask: SpanMask) -> MaskInfo:
    """Which blocks of queries each block of keys visits, for the gradient of keys and values."""
    rows, _, count = mask.blocks.shape
    return _mask_info(mask, visited_axis=1, order=(1, 0, 2), shape=(1, count, rows * count))


def _mask_info(
    mask: SpanMask, visited_axis: int, order: tuple[int, ...], shape: tuple[int, ...]
) -> MaskInfo:
    """The visits along one axis of `mask.blocks`, [R, X, X], in the kernel's layout.

    A block that is skipped names the last one that was not, so that nothing is copied for it.
    """
    rows, _, count = mask.blocks.shape
    row_start = count * jnp.arange(rows, dtype=jnp.int32)[:, None, None]
    index = jax.lax.broadcasted_iota(jnp.int32, mask.blocks.shape, visited_axis)
    latest = row_start + jax.lax.cummax(jnp.where(mask.blocks, index, 0), axis=visited_axis)

    def lay_out(x: Array) -> Array:
        return x.astype(jnp.int32).transpose(order).reshape(shape)

    return MaskInfo(lay_out(latest), None, lay_out(mask.blocks), None, mask.span.reshape(-1))


SPLASH = Kernel(span_masks, attend)
