"""Grouped-head attention over rows that share prompts."""

from __future__ import annotations

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import Array

from dpojax.models.config import DecoderConfig
from dpojax.models.layers import Dense, product, residual_std
from dpojax.models.rope import cos_sin, rotate
from dpojax.sharding import ROWS, constrain


class PlainRows(NamedTuple):
    """One sequence per row, int32 [R, T] each; the four arrays that a decoder reads."""

    tokens: Array
    positions: Array
    segment: Array
    branch: Array


def plain_rows(tokens: Array) -> PlainRows:
    """Rows of one full-length sequence each, from token ids [R, T]."""
    tokens = jnp.asarray(tokens, jnp.int32)
    positions = jax.lax.broadcasted_iota(jnp.int32, tokens.shape, 1)
    return PlainRows(tokens, positions, jnp.ones_like(tokens), jnp.zeros_like(tokens))


def attention_mask(rows, window: int | None = None) -> Array:
    """Which column j a column i attends to: bool [R, T (i), T (j)].

    j <= i, in the same segment, on the prompt (branch 0) or on i's own branch, and fewer than
    `window` positions back. Padding is segment 0 and sees padding; no column sees nothing.
    """
    column = jnp.arange(rows.tokens.shape[1])
    causal = column[:, None] >= column[None, :]
    key_branch = rows.branch[:, None, :]
    mask = causal[None] & (rows.segment[:, :, None] == rows.segment[:, None, :])
    mask &= (key_branch == 0) | (key_branch == rows.branch[:, :, None])
    if window is not None:
        mask &= rows.positions[:, :, None] - rows.positions[:, None, :] < window
    return mask


class Context(NamedTuple):
    """What all layers share: a mask for each distinct window, cosines and sines of positions."""

    masks: tuple[Array, ...]
    angles: tuple[Array, Array] | None


class Layer(NamedTuple):
    """What layers differ in besides weights, [layers] each: attention scale, index into masks."""

    scale: Array
    mask: Array


def context(config: DecoderConfig, rows) -> Context:
    """Masks and angles of these rows, computed once for all layers."""
    masks = tuple(attention_mask(rows, window) for window in _distinct_windows(config))
    if config.rope is None:
        return Context(masks, None)
    return Context(masks, cos_sin(config.rope, config.head_dim, rows.positions))


def layer_constants(config: DecoderConfig) -> Layer:
    """Scales float32 [layers] and mask indices int32 [layers]."""
    scale = config.head_dim**-0.5 if config.attention_scale is None else config.attention_scale
    scales = np.full(config.layers, scale, np.float32)
    if config.attention_scale_by_layer:
        scales /= np.arange(1, config.layers + 1, dtype=np.float32)
    distinct = _distinct_windows(config)
    masks = [distinct.index(window) for window in config.windows or (None,) * config.layers]
    return Layer(jnp.asarray(scales), jnp.asarray(masks, jnp.int32))


def _distinct_windows(config: DecoderConfig) -> list[int | None]:
    return list(dict.fromkeys(config.windows or (None,)))


class Attention(nnx.Module):
    """Attention with kv_heads groups of heads: [R, T, D] -> [R, T, D]; softmax in float32."""

    def __init__(self, config: DecoderConfig, rngs: nnx.Rngs):
        width, dim, std = config.width, config.head_dim, config.initializer_range
        self.groups = config.kv_heads
        dense = functools.partial(Dense, bias=config.qkv_bias, std=std, rngs=rngs)
        self.query = dense((width,), (config.heads, dim))
        self.key = dense((width,), (config.kv_heads, dim))
        self.value = dense((width,), (config.kv_heads, dim))
        self.out = Dense(
            (config.heads, dim),
            (width,),
            bias=config.out_bias,
            std=residual_std(config),
            rngs=rngs,
        )

    def __call__(self, x: Array, context: Context, layer: Layer) -> Array:
        query, key, value = (
            constrain(dense(x), ROWS, None, "tensor", None)
            for dense in (self.query, self.key, self.value)
        )
        if context.angles is not None:
            query, key = rotate(query, *context.angles), rotate(key, *context.angles)
        masks = context.masks
        mask = masks[0] if len(masks) == 1 else jnp.stack(masks)[layer.mask]
        mixed = attend(query, key, value, mask, layer.scale)
        return self.out(constrain(mixed, ROWS, None, "tensor", None))


def attend(query: Array, key: Array, value: Array, mask: Array, scale: Array | float) -> Array:
    """softmax(scale * query . key) . value, [R, T, heads, head_dim], repeated keys never built.

    Head n reads key head n // (heads / kv_heads).

    Args:
      query: [R, T, heads, head_dim]. key, value: [R, S, kv_heads, head_dim].
      mask: bool [R, T, S].
    """
    rows, columns, heads, dim = query.shape
    groups = key.shape[2]
    query = query.reshape(rows, columns, groups, heads // groups, dim)
    scores = scale * product("rtgnh,rsgh->rgnts", query, key, dtype=jnp.float32)
    scores = jnp.where(mask[:, None, None], scores, jnp.finfo(jnp.float32).min)
    weights = jax.nn.softmax(scores, axis=-1).astype(value.dtype)
    return product("rgnts,rsgh->rtgnh", weights, value).reshape(rows, columns, heads, dim)
