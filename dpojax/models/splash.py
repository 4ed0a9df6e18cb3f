"""Attention on TPUs: JAX's splash kernel for rows that share prompts, memory linear in length.

In a row every token sees two stretches of columns: its own branch up to itself, and the prompt of
its segment (a token of the prompt: nothing more). The kernel goes over each once, and the two
softmaxes are merged through their logsumexp. Backward each pass gets the merged output and the
merged logsumexp, with which its kernel gives exactly its part of the gradient, as in ring attention
(Liu et al. 2023).

Stretches are data, of any number of examples and branches; blocks of columns that no token of a
block sees are skipped when the program runs. The rows of a device lie one after another on the
kernel's sequence axis, whose grid is as wide as one row.
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

LONGEST = 2**16  # columns of a row: two of them are packed into an int32
BLOCKS = (512, 256, 128)  # columns that the kernel works on at once; lanes of a TPU come by 128
PADDING = 1 / 4  # of a row: what it may be padded by to be cut into larger blocks


class Stretch(NamedTuple):
    """The columns that each token sees in one pass, of rows padded to T', a multiple of a block."""

    seen: Array  # int32 [R, T']: the first column, and 2**16 times the last; none where it is less
    blocks: Array  # bool [R, T' / block, T' / block]: whether a token of i sees a column of j


class Pass(NamedTuple):
    """What is static in a call of the kernel."""

    length: int  # columns of a row
    softcap: float | None
    interpret: bool


def stretches(rows, window: int | None = None) -> tuple[Stretch, Stretch]:
    """The two spans of `spans.spans`, a pass each.

    Raises:
      ValueError: a row has more than 65,536 columns.
    """
    length, block = _padded(rows.tokens.shape[1])
    if length > LONGEST:
        given = f"model.attention: rows of {rows.tokens.shape[1]} tokens"
        raise ValueError(f"{given}; splash takes {LONGEST} at most: shorten them, or set xla")
    own, first, last = spans(rows, window, length)
    column = jax.lax.broadcasted_iota(jnp.int32, own.shape, 1)
    return _stretch(own, column, block), _stretch(first, last, block)


def attend(query, key, value, mask, scale, *, softcap=None, interpret: bool = False) -> Array:
    """As `attention.attend`, with `stretches` as its mask.

    Args:
      interpret: run the kernel's program on a CPU, for tests.
    """
    mix = functools.partial(_mix, softcap=softcap, interpret=interpret)
    return by_device(mix, scaled(query, scale), key, value, mask)


def _padded(length: int) -> tuple[int, int]:
    """To how many columns rows are padded, and the block that divides them."""
    choices = [(block * math.ceil(length / block), block) for block in BLOCKS]
    fitting = [choice for choice in choices if choice[0] <= (1 + PADDING) * length]
    return fitting[0] if fitting else choices[-1]


def _stretch(first: Array, last: Array, block: int) -> Stretch:
    blocks = blocks_seen(first, last, block)
    return Stretch(first | (last << 16), blocks)


def _mix(query, key, value, mask, *, softcap, interpret) -> Array:
    """Of one device's rows and heads; [R, T, heads, head_dim] like `query`."""
    rows, columns, heads, dim = query.shape
    length = mask[0].seen.shape[1]

    def on_one_axis(x):  # [heads, R T', head_dim]
        x = jnp.pad(x, ((0, 0), (0, length - columns), (0, 0), (0, 0)))
        return x.transpose(2, 0, 1, 3).reshape(x.shape[2], rows * length, dim)

    settings = Pass(length, softcap, interpret)
    mixed = _merged(settings, *map(on_one_axis, (query, key, value)), mask)
    return mixed.reshape(heads, rows, length, dim)[:, :, :columns].transpose(1, 2, 0, 3)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _merged(settings: Pass, query, key, value, mask) -> Array:
    return _merged_forward(settings, query, key, value, mask)[0]


def _merged_forward(settings: Pass, query, key, value, mask):
    outs, sums = [], []
    for stretch in mask:
        kernel = splash.SplashAttentionKernel(
            _infos(stretch)[0],
            None,
            None,
            is_mqa=False,
            save_residuals=True,
            residual_checkpoint_name=None,
            **_static(settings, stretch),
        )
        out, (logsumexp,) = kernel(query, key, value)
        outs.append(out)
        sums.append(logsumexp)
    total = jnp.logaddexp(*sums)
    weights = [jnp.exp(x - total)[..., None] for x in sums]
    # What a pass gives a token that sees nothing in it may be NaN; its weight is exactly 0.
    parts = [jnp.where(w > 0, w * out, 0.0) for w, out in zip(weights, outs)]
    mixed = checkpoint_name(sum(parts).astype(query.dtype), MIXED)
    total = checkpoint_name(total, MIXED)
    return mixed, (query, key, value, mask, mixed, total)


def _merged_backward(settings: Pass, saved, cotangent):
    query, key, value, mask, mixed, total = saved
    gradients = []
    for stretch in mask:
        _, of_queries, of_keys = _infos(stretch)
        residuals = (query, key, value, None, None, mixed, total, of_queries, of_keys)
        given = _static(settings, stretch)
        found = splash._splash_attention_bwd(
            save_residuals=False,
            is_mqa=False,
            residual_checkpoint_name=None,
            **given,
            res=residuals,
            do=cotangent,
        )
        gradients.append(found[3:6])
    return *(a + b for a, b in zip(*gradients)), None


_merged.defvjp(_merged_forward, _merged_backward)


def _static(settings: Pass, stretch: Stretch) -> dict:
    block = settings.length // stretch.blocks.shape[-1]
    names = "block_q", "block_kv", "block_q_dkv", "block_kv_dkv", "block_q_dq", "block_kv_dq"
    return dict(
        mask_value=splash.DEFAULT_MASK_VALUE,
        block_sizes=splash.BlockSizes(**dict.fromkeys(names, block)),
        mask_function=_sees(settings.length),
        attn_logits_soft_cap=settings.softcap,
        interpret=settings.interpret,
    )


@functools.cache
def _sees(length: int):
    """Whether tokens see columns of the sequence axis, as the kernel asks: in its own blocks."""

    def sees(seen: Array, column: Array) -> Array:
        corner = column[:1, :1]  # a block is of one row, which begins at a multiple of its length
        column = column - (corner - jax.lax.rem(corner, jnp.full_like(corner, length)))
        return (column >= (seen & 0xFFFF)) & (column <= jax.lax.shift_right_logical(seen, 16))

    return sees


def _infos(stretch: Stretch) -> tuple[MaskInfo, MaskInfo, MaskInfo]:
    """Which blocks to run: forward and for the gradient of queries, key blocks by query block; for
    that of keys and values, query blocks by key block.

    A block that is skipped names the last one that was not, so that nothing is copied for it.
    """
    rows, _, count = stretch.blocks.shape
    start = count * jnp.arange(rows, dtype=jnp.int32)[:, None, None]

    def info(axis: int, order: tuple[int, ...], shape: tuple[int, ...]) -> MaskInfo:
        index = jax.lax.broadcasted_iota(jnp.int32, stretch.blocks.shape, axis)
        latest = start + jax.lax.cummax(jnp.where(stretch.blocks, index, 0), axis=axis)
        lay = lambda x: x.astype(jnp.int32).transpose(order).reshape(shape)
        return MaskInfo(lay(latest), None, lay(stretch.blocks), None, stretch.seen.reshape(-1))

    by_query = info(2, (0, 1, 2), (1, rows * count, count))
    return by_query, by_query, info(1, (1, 0, 2), (1, count, rows * count))


SPLASH = Kernel(stretches, attend)
