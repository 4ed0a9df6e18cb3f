"""The cache of keys and values: of prompts, and of the samples (branches) of each prompt.

Letters of shapes: see `dpojax.models`; here T is the number of slots for tokens of a branch.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

from dpojax.models.layers import product
from dpojax.sharding import ROWS, constrain


class Prompts(NamedTuple):
    """Keys and values of prompts in the compute dtype; columns after `lengths` are not read."""

    keys: Array  # [L, B, K, P, E]
    values: Array  # [L, B, K, P, E]
    lengths: Array  # int32 [B]


class Branches(NamedTuple):
    """Keys and values of N branches of each prompt. Decoding writes these, never the prompts."""

    prompts: Prompts
    keys: Array  # [L, B, N, K, T, E]
    values: Array  # [L, B, N, K, T, E]


def by_head(x: Array) -> Array:
    """Transpose [B, P, K, E] to [B, K, P, E], so that products read whole matrices."""
    return constrain(jnp.swapaxes(x, 1, 2), ROWS, "tensor", None, None)


def branch(prompts: Prompts, samples: int, tokens: int) -> Branches:
    """Make `samples` empty branches of each prompt, with slots for `tokens` tokens."""
    layers, rows, heads, _, dim = prompts.keys.shape
    empty = jnp.zeros((layers, rows, samples, heads, tokens, dim), prompts.keys.dtype)
    empty = constrain(empty, None, ROWS, None, "tensor", None, None)
    return Branches(prompts, empty, empty)


def widen(branches: Branches, tokens: int) -> Branches:
    """Give branches more slots, for `tokens` tokens in all."""
    more_slots = tokens - branches.keys.shape[4]
    padding = [(0, 0)] * 4 + [(0, more_slots), (0, 0)]
    return branches._replace(
        keys=jnp.pad(branches.keys, padding), values=jnp.pad(branches.values, padding)
    )


class Visible(NamedTuple):
    """Which columns of its prompt and which slots of its branch a token attends to."""

    prompt: Array  # bool [B, P]
    branch: Array  # bool [T]


def visible(branches: Branches, slot: Array, window: int | None) -> Visible:
    """Compute what the tokens in a slot attend to: the prompt, and their branch up to themselves.

    The token in slot t has the position lengths + t. With a window, it sees only the last `window`
    positions, its own included.
    """
    lengths = branches.prompts.lengths[:, None]
    column = jnp.arange(branches.prompts.keys.shape[3])[None]  # [1, P]
    slots = jnp.arange(branches.keys.shape[4])  # [T]
    in_prompt, in_branch = column < lengths, slots <= slot
    if window is not None:
        in_prompt &= lengths + slot - column < window
        in_branch &= slot - slots < window
    return Visible(in_prompt, in_branch)


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
    """Compute `attention.attend` of one new token in every branch.

    One softmax is over the prompt and the branch together.

    Args:
      branches: the cache.
      index: the layer.
      slot: where the new tokens go, the same in all branches.
      query: [B, N, H, E], of the new tokens.
      key, value: [B, N, K, E], of the new tokens.
      mask: see `visible`.
      scale: the factor of the scores.
      softcap: c maps a score z to c tanh(z / c), before the mask.

    Returns:
      [B, N, H, E], and the branches with the new keys and values in their slot.
    """
    prompt_count, samples, heads, head_dim = query.shape
    kv_heads, prompt_columns = key.shape[2], branches.prompts.keys.shape[3]
    start = (index, 0, 0, 0, slot, 0)
    branches = branches._replace(
        keys=jax.lax.dynamic_update_slice(branches.keys, key[None, :, :, :, None], start),
        values=jax.lax.dynamic_update_slice(branches.values, value[None, :, :, :, None], start),
    )
    prompt_key, prompt_value = _layer(branches.prompts, index)  # [B, K, P, E]
    branch_key, branch_value = _layer(branches, index)  # [B, N, K, T, E]
    query = query.reshape(prompt_count, samples, kv_heads, heads // kv_heads, head_dim)
    # The keys of a prompt are read once for all its branches, and never repeated in memory.
    to_prompt = product("bnkge,bkpe->bkngp", query, prompt_key, dtype=jnp.float32)
    to_branch = product("bnkge,bnkte->bnkgt", query, branch_key, dtype=jnp.float32)
    scores = jnp.concatenate([jnp.swapaxes(to_prompt, 1, 2), to_branch], axis=-1)
    scores = scale * scores  # [B, N, K, G, P + T]
    if softcap is not None:
        scores = softcap * jnp.tanh(scores / softcap)
    branch_mask = jnp.broadcast_to(mask.branch, (prompt_count, *mask.branch.shape))
    seen = jnp.concatenate([mask.prompt, branch_mask], axis=-1)  # [B, P + T]
    scores = jnp.where(seen[:, None, None, None], scores, jnp.finfo(jnp.float32).min)
    weights = jax.nn.softmax(scores, axis=-1).astype(value.dtype)
    to_prompt, to_branch = weights[..., :prompt_columns], weights[..., prompt_columns:]
    mixed = product("bnkgp,bkpe->bnkge", to_prompt, prompt_value, dtype=jnp.float32)
    mixed += product("bnkgt,bnkte->bnkge", to_branch, branch_value, dtype=jnp.float32)
    return mixed.astype(value.dtype).reshape(prompt_count, samples, heads, head_dim), branches


def _layer(cache: Prompts | Branches, index: Array) -> tuple[Array, Array]:
    """The keys and values of one layer."""
    keys = jax.lax.dynamic_index_in_dim(cache.keys, index, keepdims=False)
    return keys, jax.lax.dynamic_index_in_dim(cache.values, index, keepdims=False)
