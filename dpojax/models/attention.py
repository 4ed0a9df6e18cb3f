"""Grouped-head attention over rows that share prompts."""

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

STRETCHES, SHORTEST = 4, 96  # of a row, at most; columns of one, at least
HIDDEN = -1e30  # added to the score of a token that is not attended to; its weight is exactly 0


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
    """What all layers share: a mask per distinct window, cosine and sine per distinct rope."""

    masks: tuple  # of whatever the function that mixes the heads takes: arrays, or trees of them
    angles: tuple[tuple[Array, Array], ...]


class Layer(NamedTuple):
    """What layers differ in besides weights, [layers] each.

    The scale of attention, and indices into the context's masks and angles.
    """

    scale: Array
    mask: Array
    angle: Array


def context(config: DecoderConfig, positions: Array, mask: Callable[[int | None], Any]) -> Context:
    """Masks (by window) and angles of tokens at these positions, computed once for all layers."""
    masks = tuple(mask(window) for window in _distinct(_windows(config)))
    ropes = [rope for rope in _distinct(_ropes(config)) if rope is not None]
    return Context(masks, tuple(cos_sin(rope, config.head_dim, positions) for rope in ropes))


def layer_constants(config: DecoderConfig) -> Layer:
    """Scales float32 [layers], indices of masks and angles int32 [layers]."""
    scale = config.head_dim**-0.5 if config.attention_scale is None else config.attention_scale
    scales = np.full(config.layers, scale, np.float32)
    if config.attention_scale_by_layer:
        scales /= np.arange(1, config.layers + 1, dtype=np.float32)
    indices = [
        [_distinct(values).index(value) for value in values]
        for values in (_windows(config), _ropes(config))
    ]
    return Layer(jnp.asarray(scales), *(jnp.asarray(index, jnp.int32) for index in indices))


def _windows(config: DecoderConfig) -> tuple[int | None, ...]:
    return config.windows or (None,) * config.layers


def _ropes(config: DecoderConfig) -> tuple[Rope | None, ...]:
    local = config.local_rope or config.rope
    return tuple(local if window else config.rope for window in _windows(config))


def _distinct(values: tuple) -> list:
    return list(dict.fromkeys(values))


def _choose(options: tuple, index: Array):
    """The option at a traced index."""
    if len(options) == 1:
        return options[0]
    return jax.tree.map(lambda *arrays: jnp.stack(arrays)[index], *options)


class Attention(nnx.Module):
    """Attention with kv_heads groups of heads: [R, T, D] -> [R, T, D]; softmax in float32."""

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
        return self.mix(x, context, layer, attend_among)[0]

    def mix(
        self, x: Array, context: Context, layer: Layer, attend: Callable
    ) -> tuple[Array, tuple[Array, Array]]:
        """The same with any `attend`, which also says what to keep of the layer.

        attend(query, key, value, mask, scale, *, softcap) -> (mixed, kept): as `attend_among`.
        """
        query, key, value = (
            constrain(dense(x), ROWS, None, "tensor", None)
            for dense in (self.query, self.key, self.value)
        )
        if self.query_norm is not None:
            query, key = self.query_norm(query), self.key_norm(key)
        if context.angles:
            cos, sin = _choose(context.angles, layer.angle)
            query = rotate(query, cos, sin, interleaved=self.interleaved)
            key = rotate(key, cos, sin, interleaved=self.interleaved)
        mask = _choose(context.masks, layer.mask)
        mixed, kept = attend(query, key, value, mask, layer.scale, softcap=self.softcap)
        return self.out(constrain(mixed, ROWS, None, "tensor", None)), kept


def attend_among(query, key, value, mask, scale, *, softcap=None):
    """`attend` among the given tokens; their keys and values are what to keep."""
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
    """softmax(scale * query . key) . value, [R, T, heads, head_dim], repeated keys never built.

    Head n reads key head n // (heads / kv_heads).

    Args:
      query: [R, T, heads, head_dim]. key, value: [R, S, kv_heads, head_dim].
      mask: bool [R, T, S].
      softcap: c maps a score z to c tanh(z / c), before the mask.
    """
    rows, columns, heads, dim = query.shape
    groups = key.shape[2]
    each = heads // groups
    # Heads lead, so that every product is of plain matrices; the heads of a group share one.
    query = query.reshape(rows, columns, groups, each, dim).transpose(0, 2, 3, 1, 4)
    query = query.reshape(rows, groups, each * columns, dim)
    key, value = key.swapaxes(1, 2), value.swapaxes(1, 2)
    scores = scale * product("rgth,rgsh->rgts", query, key, dtype=jnp.float32)
    if softcap is not None:
        scores = softcap * jnp.tanh(scores / softcap)
    hidden = jnp.where(mask, 0.0, HIDDEN)[:, None, None]
    scores = scores.reshape(rows, groups, each, columns, -1) + hidden
    # Divided by the sum after the product, where there are dim numbers for every key's one.
    weights = jnp.exp(scores - jax.lax.stop_gradient(scores.max(-1, keepdims=True)))
    total = weights.sum(-1, keepdims=True)
    weights = weights.reshape(rows, groups, each * columns, -1).astype(value.dtype)
    mixed = product("rgts,rgsh->rgth", weights, value).astype(jnp.float32)
    mixed = mixed.reshape(rows, groups, each, columns, dim) / total
    return mixed.transpose(0, 3, 1, 2, 4).reshape(rows, columns, heads, dim).astype(value.dtype)


def attend_causally(query, key, value, mask, scale, *, softcap=None) -> Array:
    """`attend` where no token sees a later one: stretch by stretch, each among the keys up to its
    own end, so that most scores that the mask would hide are never computed.

    All have T tokens; otherwise as `attend`.
    """
    ends = stretch_ends(query.shape[1])
    parts = [
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
    return parts[0] if len(parts) == 1 else jnp.concatenate(parts, axis=1)


def stretch_ends(length: int) -> list[int]:
    """Where the stretches of a row of `length` columns end.

    On two CPU cores four took about half the time of all at once, forward and backward, for rows of
    384 to 1,088; twice as many were as fast.
    """
    count = max(1, min(STRETCHES, length // SHORTEST))
    return [-(-length * i // count) for i in range(1, count + 1)]


def scores_of(length: int) -> int:
    """How many scores of a head a row of `length` columns takes."""
    ends = stretch_ends(length)
    return sum(end * (end - start) for start, end in zip([0, *ends], ends))


class Kernel(NamedTuple):
    """A way to compute `attend` for whole rows; `models.kernels` chooses one.

    mask(rows, window) -> what its `attend` takes in the place of `attention_mask`'s, an array or a
      tree of them, each with rows in front.
    attend(query, key, value, mask, scale, *, softcap=None) -> mixed: as `attend`; padding may come
      out as any finite number.
    scores: whether all scores of a layer exist at once: `scores_of` a row's columns for each head.
    """

    mask: Callable[[Any, int | None], Any]
    attend: Callable[..., Array]
    scores: bool = False


XLA = Kernel(attention_mask, attend_causally, scores=True)


def scaled(query: Array, scale: Array | float) -> Array:
    """scale * query in its dtype, for kernels whose own scale cannot be traced."""
    return (query.astype(jnp.float32) * scale).astype(query.dtype)


def by_device(mix: Callable, query: Array, key: Array, value: Array, mask: Any) -> Array:
    """mix(query, key, value, mask) of each device's rows and heads on the ambient mesh.

    For kernels that XLA cannot divide. A device has whole groups of heads: where the `tensor` axis
    does not divide the key heads, it has all of them.
    """
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty:
        return mix(query, key, value, mask)
    spec = fit_spec(P(ROWS, None, "tensor", None), key.shape, mesh)
    specs = spec, spec, spec, P(spec[0])
    rest = set(mesh.axis_names) - set(mesh.manual_axes)  # a lane of a sweep has its device already
    return jax.shard_map(
        mix, mesh=mesh, in_specs=specs, out_specs=spec, axis_names=rest, check_vma=False
    )(query, key, value, mask)
