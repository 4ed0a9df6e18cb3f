"""The exact KL divergence of two next-token distributions, without all logits in memory."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

from dpojax.head import Head, gather_width, logits_of
from dpojax.logprobs.checks import check_reference
from dpojax.logprobs.tokens import by_token


def token_kl(
    hidden: Array,
    head: Head,
    reference_hidden: Array,
    reference_head: Head,
    *,
    max_logits: int = 2**25,
) -> Array:
    """Compute KL(policy || reference) of the two next-token distributions at each position, nats.

    Exact: summed over the vocabulary, one chunk of tokens at a time. The backward pass computes the
    logits of each chunk again.

    Args:
      hidden, head: the policy's hidden states, [..., T, D], and its head.
      reference_hidden, reference_head: those of the reference.
      max_logits: how many float32 logits may exist at once, of both models together.

    Returns:
      [..., T].

    Raises:
      ValueError: the two models are not of the same tokens and the same vocabulary.
    """
    check_reference(hidden, head, reference_hidden, reference_head)

    def compute(hidden: Array, reference_hidden: Array, *arrays: Array | None) -> Array:
        policy_head = head._replace(weight=gather_width(arrays[0]), bias=arrays[1])
        other_head = reference_head._replace(weight=gather_width(arrays[2]), bias=arrays[3])

        @jax.checkpoint
        def kl_of_chunk(hidden_pair: tuple[Array, Array]) -> Array:
            # [..., t, V]
            log_p = jax.nn.log_softmax(logits_of(hidden_pair[0], policy_head), axis=-1)
            log_q = jax.nn.log_softmax(logits_of(hidden_pair[1], other_head), axis=-1)
            return jnp.sum(jnp.exp(log_p) * (log_p - log_q), axis=-1)

        # Two arrays of logits exist at once, so each may have half of the numbers.
        token_chunks = token_chunk_count(hidden.shape[:-1], len(head.weight), 0.5 * max_logits)
        return map_token_chunks(kl_of_chunk, (hidden, reference_hidden), token_chunks)

    arrays = *head[:2], *reference_head[:2]  # of each its weight and its bias
    return by_token(compute, hidden, reference_hidden, *arrays)


def token_chunk_count(shape: tuple[int, ...], vocabulary: int, max_logits: float) -> int:
    """Into how many chunks the last axis of tokens is cut."""
    chunks = math.ceil(math.prod(shape) * vocabulary / max_logits)
    return max(1, min(chunks, shape[-1]))


def map_token_chunks(function: Callable, arrays: tuple[Array, ...], count: int) -> Any:
    """`function` of arrays [..., T, D], `count` chunks of tokens one after another.

    Args:
      function: (arrays [..., t, D]) -> an array [..., t], or several.
      arrays: [..., T, ...] each, tokens on the second axis from the end.
      count: of chunks. A single one is computed without a loop.

    Returns:
      What `function` gives for all tokens, [..., T].
    """
    tokens = arrays[0].shape[-2]
    chunks = tuple(_split_tokens(x, count) for x in arrays)
    if count > 1:
        outputs = jax.lax.map(function, chunks)
    else:
        outputs = jax.tree.map(lambda x: x[None], function(tuple(x[0] for x in chunks)))

    def joined(output: Array) -> Array:
        output = jnp.moveaxis(output, 0, -2)  # [..., count, t]
        return output.reshape(*output.shape[:-2], -1)[..., :tokens]

    return jax.tree.map(joined, outputs)


def _split_tokens(x: Array, count: int) -> Array:
    """[..., T, D] as [count, ..., T / count, D], zero-padded at the end."""
    *leading, tokens, width = x.shape
    size = -(-tokens // count)
    padding = [(0, 0)] * len(leading) + [(0, count * size - tokens), (0, 0)]
    return jnp.moveaxis(jnp.pad(x, padding).reshape(*leading, count, size, width), -3, 0)
