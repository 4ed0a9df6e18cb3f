"""Attention with groups of heads over rows that share prompts.

Letters of shapes: see `dpojax.models`.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import Array
from jax.sharding import PartitionSpec as P

from dpojax.models.config import DecoderConfig, Rope
from dpojax.models.layers import Dense, Norm, product, residual_std
from dpojax.models.rope import cos_sin, rotate
from dpojax.sharding import ROWS, constrain, fit_spec

MAX_STRETCHES = 4  # into which `attend_causally` cuts a row
MIN_STRETCH = 96  # columns of a stretch
HIDDEN = -1e30  # added to the score of a token that is not attended to: its weight is exactly 0


class PlainRows(NamedTuple):
    """The four arrays that a decoder reads, int32 [R, T] each; `data.rows.Rows` has them, too."""

    tokens: Array
    positions: Array  # of the tokens in their text
    segment: Array  # the number of the example in the row, from 1; 0 for padding
    branch: Array  # 0 for the prompt, then 1, 2, ... for its responses


def plain_rows(tokens: Array) -> PlainRows:
    """Make rows of one full-length sequence each, from token ids [R, T]."""
    tokens = jnp.asarray(tokens, jnp.int32)
    positions = jax.lax.broadcasted_iota(jnp.int32, tokens.shape, 1)
    return PlainRows(tokens, positions, jnp.ones_like(tokens), jnp.zeros_like(tokens))


def attention_mask(rows, window: int | None = None) -> Array:
    """Compute which column j the token of column i attends to: bool [R, T (i), T (j)].

    Column j must be i or stand before it, in the same segment, in the prompt (branch 0) or in the
    branch of i, and fewer than `window` positions back. Padding is segment 0 and sees padding, so
    every column sees at least itself.
    """
    column = jnp.arange(rows.tokens.shape[1])
    causal = column[:, None] >= column[None, :]  # [T, T]
    key_branch = rows.branch[:, None, :]
    mask = causal[None] & (rows.segment[:, :, None] == rows.segment[:, None, :])
    mask &= (key_branch == 0) | (key_branch == rows.branch[:, :, None])
    if window is not None:
        mask &= rows.positions[:, :, None] - rows.positions[:, None, :] < window
    return mask


class Context(NamedTuple):
    """What all layers share: one mask for each distinct window, one cos and sin for each rope."""

    masks: tuple  # arrays or trees of arrays, as the `attend` function takes them
    angles: tuple[tuple[Array, Array], ...]  # cos and sin, float32 [R, T, F] each


class Layer(NamedTuple):
    """What layers differ in besides weights: [L] each, or scalars of one layer."""

    scale: Array  # of attention scores, float32
    mask: Array  # index into the context's masks, int32
    angle: Array  # index into the context's angles, int32


def context(config: DecoderConfig, positions: Array, mask: Callable[[int | None], Any]) -> Context:
    """Compute masks and angles once for all layers.

    Args:
      config: gives windows and ropes.
      positions: int32 [R, T], of the tokens.
      mask: makes the mask of a window.
    """
    masks = tuple(mask(window) for window in _distinct(_windows(config)))
    ropes = [rope for rope in _distinct(_ropes(config)) if rope is not None]
    return Context(masks, tuple(cos_sin(rope, config.head_dim, positions) for rope in ropes))


def layer_constants(config: DecoderConfig) -> Layer:
    """Compute what layers differ in besides weights, [L] each: `Layer` to scan over."""
    scale = config.head_dim**-0.5 if config.attention_scale is None else config.attention_scale
    scales = np.full(config.layers, scale, np.float32)
    if config.attention_scale_by_layer:
        scales /= np.arange(1, config.layers + 1, dtype=np.float32)
    return Layer(
        scale=jnp.asarray(scales),
        mask=jnp.asarray(_indices(_windows(config)), jnp.int32),
        angle=jnp.asarray(_indices(_ropes(config)), jnp.int32),
    )


def _windows(config: DecoderConfig) -> tuple[int | None, ...]:
    return config.windows or (None,) * config.layers


def _ropes(config: DecoderConfig) -> tuple[Rope | None, ...]:
    local = config.local_rope or config.rope
    return tuple(local if window else config.rope for window in _windows(config))


def _distinct(values: tuple) -> list:
    """The different values, in the order of their first appearance."""
    return list(dict.fromkeys(values))


def _indices(values: tuple) -> list[int]:
    """For each value its place among the distinct ones."""
    distinct = _distinct(values)
    return [distinct.index(value) for value in values]


def _choose(options: tuple, index: Array):
    """The option, an array or a tree of arrays, at a traced index."""
    if len(options) == 1:
        return options[0]
    return jax.tree.map(lambda *arrays: jnp.stack(arrays)[index], *options)


class Attention(nnx.Module):
    """Attention, [R, T, D] -> [R, T, D]; G = H / K heads of queries share a head of keys."""

    def __init__(self, config: DecoderConfig, rngs: nnx.Rngs):
        width, dim, std = config.width, config.head_dim, config.initializer_range
        self.softcap = config.attention_softcap
        self.interleaved = config.rope is not None and config.rope.interleaved
        dense = functools.partial(Dense, bias=config.qkv_bias, std=std, rngs=rngs)
        self.query = dense((width,), (config.heads, dim))
        self.key = dense((width,), (config.kv_heads, dim))
        self.value = dense((width,), (config.kv_heads, dim))
        head_norm = functools.partial(Norm, config, kind="rmsnorm", size=dim)
        self.query_norm = head_norm() if config.qk_norm else None
        self.key_norm = head_norm() if config.qk_norm else None
        self.out = Dense(
            (config.heads, dim),
            (width,),
            bias=config.out_bias,
            std=residual_std(config),
            rngs=rngs,
        )

    def __call__(self, x: Array, context: Context, layer: Layer) -> Array:
        out, _ = self.with_attend(x, context, layer, attend_among)
        return out

    def with_attend(
        self, x: Array, context: Context, layer: Layer, attend: Callable
    ) -> tuple[Array, Any]:
        """Compute attention with any `attend` function, which may return more than its result.

        Args:
          x: [R, T, D].
          context: masks and angles.
          layer: scalars of this layer.
          attend: (query, key, value, mask, scale, *, softcap) -> (mixed, more), as `attend_among`.

        Returns:
          [R, T, D], and what else `attend` returned.
        """
        query, key, value = (
            constrain(dense(x), ROWS, None, "tensor", None)
            for dense in (self.query, self.key, self.value)
        )
        # query [R, T, H, E]; key and value [R, T, K, E]
        if self.query_norm is not None:
            query, key = self.query_norm(query), self.key_norm(key)
        if context.angles:
            cos, sin = _choose(context.angles, layer.angle)
            query = rotate(query, cos, sin, interleaved=self.interleaved)
            key = rotate(key, cos, sin, interleaved=self.interleaved)
        mask = _choose(context.masks, layer.mask)
        mixed, more = attend(query, key, value, mask, layer.scale, softcap=self.softcap)
        return self.out(constrain(mixed, ROWS, None, "tensor", None)), more


def attend_among(query, key, value, mask, scale, *, softcap=None):
    """Compute `attend`, and return the keys and values, too."""
    return attend(query, key, value, mask, scale, softcap=softcap), (key, value)


def attend(
    query: Array,
    key: Array,
    value: Array,
    mask: Array,
    scale: Array | float,
    *,
    softcap: float | None = None,
) -> Array:
    """Compute softmax(scale * query . key) . value, with the softmax in float32.

    Head h of the queries reads head h // G of the keys. Keys and values are not repeated in memory.

    Args:
      query: [R, T, H, E].
      key, value: [R, S, K, E].
      mask: bool [R, T, S].
      scale: the factor of the scores.
      softcap: c maps a score z to c tanh(z / c), before the mask.

    Returns:
      [R, T, H, E].
    """
    rows, columns, heads, head_dim = query.shape
    kv_heads = key.shape[2]
    group = heads // kv_heads
    # Heads lead, so that every product is one of plain matrices. The queries of all heads of a
    # group stand below each other and share one matrix of keys.
    query = query.reshape(rows, columns, kv_heads, group, head_dim).transpose(0, 2, 3, 1, 4)
    query = query.reshape(rows, kv_heads, group * columns, head_dim)  # [R, K, G * T, E]
    key, value = key.swapaxes(1, 2), value.swapaxes(1, 2)  # [R, K, S, E]
    scores = scale * product("rkte,rkse->rkts", query, key, dtype=jnp.float32)
    if softcap is not None:
        scores = softcap * jnp.tanh(scores / softcap)
    hidden = jnp.where(mask, 0.0, HIDDEN)[:, None, None]
    scores = scores.reshape(rows, kv_heads, group, columns, -1) + hidden  # [R, K, G, T, S]
    # The largest score cancels, so it needs no gradient. The division by the sum comes after the
    # product with the values, as that has E numbers for each query and the weights have S.
    weights = jnp.exp(scores - jax.lax.stop_gradient(scores.max(-1, keepdims=True)))
    total = weights.sum(-1, keepdims=True)
    weights = weights.reshape(rows, kv_heads, group * columns, -1).astype(value.dtype)
    mixed = product("rkts,rkse->rkte", weights, value).astype(jnp.float32)
    mixed = mixed.reshape(rows, kv_heads, group, columns, head_dim) / total
    mixed = mixed.transpose(0, 3, 1, 2, 4)  # [R, T, K, G, E]
    return mixed.reshape(rows, columns, heads, head_dim).astype(value.dtype)


def attend_causally(query, key, value, mask, scale, *, softcap=None) -> Array:
    """Compute `attend` where no token sees a later one, with fewer scores.

    The row is cut into stretches of columns. Each stretch of queries meets only the keys up to its
    own end. So most of the scores that the mask would hide are never computed. Arguments as in
    `attend`; queries and keys have the same columns.
    """
    ends = stretch_ends(query.shape[1])
    stretches = [
        attend(
            query[:, start:end],
            key[:, :end],
            value[:, :end],
            mask[:, start:end, :end],
            scale,
            softcap=softcap,
        )
        for start, end in zip([0, *ends], ends)
    ]
    return stretches[0] if len(stretches) == 1 else jnp.concatenate(stretches, axis=1)


def stretch_ends(length: int) -> list[int]:
    """Compute where the stretches of a row of `length` columns end.

    On two CPU cores, four stretches took about half the time of one, forward and backward, for rows
    of 384 to 1,088 columns. Eight were as fast as four.
    """
    count = max(1, min(MAX_STRETCHES, length // MIN_STRETCH))
    return [-(-length * i // count) for i in range(1, count + 1)]


def scores_of(length: int) -> int:
    """Count the scores that `attend_causally` computes for one head and a row of `length`."""
    ends = stretch_ends(length)
    return sum(end * (end - start) for start, end in zip([0, *ends], ends))


class Kernel(NamedTuple):
    """A way to compute attention of whole rows; `models.kernels` chooses one.

    Attributes:
      mask: (rows, window) -> the mask that its `attend` takes: an array or a tree of arrays, each
        with an axis of rows in front.
      attend: (query, key, value, mask, scale, *, softcap=None) -> mixed, as the function `attend`.
        Padding may come out as any finite number.
      scores: whether all scores of a layer exist at once in memory: `scores_of(T)` of each head.
    """

    mask: Callable[[Any, int | None], Any]
    attend: Callable[..., Array]
    scores: bool = False


XLA = Kernel(attention_mask, attend_causally, scores=True)


def scaled(query: Array, scale: Array | float) -> Array:
    """Compute scale * query in its dtype, for kernels whose own scale cannot be traced."""
    return (query.astype(jnp.float32) * scale).astype(query.dtype)


def by_device(mix: Callable, query: Array, key: Array, value: Array, mask: Any) -> Array:
    """Compute mix(query, key, value, mask) on every device, of its own rows and heads.

    For kernels that XLA cannot divide among the devices of the ambient mesh. A device has whole
    groups of heads. If the `tensor` axis does not divide the heads of the keys, it has all of them.
    """
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty:
        return mix(query, key, value, mask)
    spec = fit_spec(P(ROWS, None, "tensor", None), key.shape, mesh)
    specs = spec, spec, spec, P(spec[0])
    # In a vectorised sweep, an outer shard_map has already given each member its devices.
    free_axes = set(mesh.axis_names) - set(mesh.manual_axes)
    return jax.shard_map(
        mix, mesh=mesh, in_specs=specs, out_specs=spec, axis_names=free_axes, check_vma=False
    )(query, key, value, mask)
