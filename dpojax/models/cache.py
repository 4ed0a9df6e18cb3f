"""Keys and values of what was read: prompts, and the branches that several samples make of each."""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

from dpojax.models.layers import product
from dpojax.sharding import ROWS, constrain


class Prompts(NamedTuple):
    """Of B prompts in P columns, in the compute dtype; what stands behind `lengths` is not read."""

    keys: Array  # [layers, B, kv_heads, P, head_dim]
    values: Array  # as keys
    lengths: Array  # int32 [B]


class Branches(NamedTuple):
    """N branches of each prompt, T tokens long at most. Only these are written while decoding."""

    prompts: Prompts
    keys: Array  # [layers, B, N, kv_heads, T, head_dim]
    values: Array  # as keys


def by_head(x: Array) -> Array:
    """[B, P, kv_heads, head_dim] as the cache holds it, so that products read whole matrices."""
    return constrain(jnp.swapaxes(x, 1, 2), ROWS, "tensor", None, None)


def branch(prompts: Prompts, samples: int, tokens: int) -> Branches:
    """`samples` empty branches of each prompt with room for `tokens` tokens."""
    layers, rows, heads, _, dim = prompts.keys.shape
    empty = jnp.zeros((layers, rows, samples, heads, tokens, dim), prompts.keys.dtype)
    empty = constrain(empty, None, ROWS, None, "tensor", None, None)
    return Branches(prompts, empty, empty)


def widen(branches: Branches, tokens: int) -> Branches:
    """The same branches with room for `tokens` tokens."""
    more = tokens - branches.keys.shape[4]
    pad = lambda x: jnp.pad(x, [(0, 0)] * 4 + [(0, more), (0, 0)])
    return branches._replace(keys=pad(branches.keys), values=pad(branches.values))


class Visible(NamedTuple):
    """What the token in a slot attends to."""

    prompt: Array  # bool [B, P]
    branch: Array  # bool [T]


def visible(branches: Branches, slot: Array, window: int | None) -> Visible:
    """Of its own branch, up to itself, and of the prompt: all that is in its window.

    The token in slot t stands at the position lengths + t.
    """
    lengths = branches.prompts.lengths[:, None]
    column = jnp.arange(branches.prompts.keys.shape[3])[None]
    earlier = jnp.arange(branches.keys.shape[4])
    prompt, own = column < lengths, earlier <= slot
    if window is not None:
        prompt &= lengths + slot - column < window
        own &= slot - earlier < window
    return Visible(prompt, own)


def attend_cached(
    branches: Branches,
    index: Array,
    slot: Array,
    query: Array,
    key: Array,
    value: Array,
    mask: Visible,
    scale: Array | float,
    *,
    softcap: float | None = None,
) -> tuple[Array, Branches]:
    """`attention.attend` of one new token a branch, in one softmax over its prompt and itself.

    Args:
      index: the layer. slot: where the new tokens go, the same in all branches.
      query: [B, N, heads, head_dim]. key, value: [B, N, kv_heads, head_dim].

    Returns:
      [B, N, heads, head_dim], and the branches with the new keys and values in their place.
    """
    rows, samples, heads, dim = query.shape
    groups, columns = key.shape[2], branches.prompts.keys.shape[3]
    start = (index, 0, 0, 0, slot, 0)
    branches = branches._replace(
        keys=jax.lax.dynamic_update_slice(branches.keys, key[None, :, :, :, None], start),
        values=jax.lax.dynamic_update_slice(branches.values, value[None, :, :, :, None], start),
    )
    prompts, own = _layer(branches.prompts, index), _layer(branches, index)
    query = query.reshape(rows, samples, groups, heads // groups, dim)
    to_prompt = product("bnkgh,bkph->bkngp", query, prompts[0], dtype=jnp.float32)
    to_own = product("bnkgh,bnkth->bnkgt", query, own[0], dtype=jnp.float32)
    scores = scale * jnp.concatenate([jnp.swapaxes(to_prompt, 1, 2), to_own], axis=-1)
    if softcap is not None:
        scores = softcap * jnp.tanh(scores / softcap)
    seen = jnp.concatenate(
        [mask.prompt, jnp.broadcast_to(mask.branch, (rows, *mask.branch.shape))], axis=-1
    )
    scores = jnp.where(seen[:, None, None, None], scores, jnp.finfo(jnp.float32).min)
    weights = jax.nn.softmax(scores, axis=-1).astype(value.dtype)
    mixed = product("bnkgp,bkph->bnkgh", weights[..., :columns], prompts[1], dtype=jnp.float32)
    mixed += product("bnkgt,bnkth->bnkgh", weights[..., columns:], own[1], dtype=jnp.float32)
    return mixed.astype(value.dtype).reshape(rows, samples, heads, dim), branches


def _layer(cache: Prompts | Branches, index: Array) -> tuple[Array, Array]:
    return tuple(
        jax.lax.dynamic_index_in_dim(x, index, keepdims=False) for x in (cache.keys, cache.values)
    )
