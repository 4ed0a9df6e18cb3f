"""Drawing of tokens from logits: temperature, top-k, top-p.

Shapes in comments: B prompts, N samples of each prompt, V vocabulary.
"""

from __future__ import annotations

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array


class SamplingParams(NamedTuple):
    """How tokens are drawn. Traced scalars, so a new value compiles nothing."""

    temperature: Array  # float32
    top_k: Array  # int32
    top_p: Array  # float32


class Draw(NamedTuple):
    """One drawn token of each sample, [B, N] each."""

    token: Array  # int32
    logprob: Array  # nats, as `Samples.logprobs`
    behaviour: Array  # nats, as `Samples.behaviour`


def draw(logits: Array, keys: Array, how: SamplingParams) -> Draw:
    """Draw one token from each distribution: the argmax of logits plus Gumbel noise.

    Args:
      logits: float32 [B, N, V].
      keys: [B, N].
      how: temperature, top_k and top_p.
    """
    greedy = how.temperature == 0
    # Relative to the largest logit, so that no temperature can make them infinite.
    relative = logits - jnp.max(logits, -1, keepdims=True)
    scaled = relative / jnp.maximum(how.temperature, 1e-20)
    scaled = truncate(jnp.where(greedy, logits, scaled), how.top_k, how.top_p)

    def gumbel_noise(keys):
        noise = partial(jax.random.gumbel, shape=logits.shape[2:])
        return jax.vmap(jax.vmap(noise))(keys)

    def no_noise(keys):
        return jnp.zeros_like(scaled)

    noise = jax.lax.cond(greedy, no_noise, gumbel_noise, keys)
    token = jnp.argmax(scaled + noise, axis=-1).astype(jnp.int32)  # [B, N]
    behaviour = _logprob_of(token, scaled)
    return Draw(token, _logprob_of(token, logits), jnp.where(greedy, 0.0, behaviour))


def _logprob_of(token: Array, logits: Array) -> Array:
    """log softmax(logits)[token], [B, N], of logits [B, N, V]."""
    token_logit = jnp.take_along_axis(logits, token[..., None], axis=-1)[..., 0]
    return token_logit - jax.nn.logsumexp(logits, axis=-1)


def truncate(logits: Array, top_k: Array, top_p: Array) -> Array:
    """Set the logits of the tokens that may not be drawn to -inf.

    First the `top_k` largest stay (0: all). Then, of their distribution, the fewest tokens stay,
    largest first, that together have the probability `top_p` (1: all; Holtzman et al. 2020,
    arXiv:1904.09751, section 3.1). Equal logits stay or go together.

    Args:
      logits: [..., V].
      top_k: int32 scalar.
      top_p: float32 scalar.

    Returns:
      [..., V].
    """

    def by_count(logits):
        return _keep_largest(logits, jnp.ones_like(logits), top_k.astype(jnp.float32))

    def by_probability(logits):
        mass = jnp.exp(logits - jnp.max(logits, -1, keepdims=True))
        return _keep_largest(logits, mass, top_p * jnp.sum(mass, -1))

    def keep_all(logits):
        return logits

    logits = jax.lax.cond(top_k > 0, by_count, keep_all, logits)
    return jax.lax.cond(top_p < 1, by_probability, keep_all, logits)


def _keep_largest(logits: Array, weight: Array, target: Array) -> Array:
    """Keep the fewest largest logits whose weights sum to at least `target`; the others are -inf.

    Where the sum of all weights is less than `target`, all stay. The threshold is built bit by bit:
    32 sums over the vocabulary, and no sort. Floats have the order of their bits, read as unsigned
    integers, if all bits of negative ones are flipped and the sign bit of the others is set.

    Args:
      logits, weight: [..., V].
      target: a scalar, or [...].
    """
    bits = jax.lax.bitcast_convert_type(logits, jnp.uint32)
    sign = jnp.uint32(1 << 31)
    order = jnp.where(bits >= sign, ~bits, bits | sign)  # [..., V]

    def try_bit(i, threshold):
        higher = threshold | (sign >> i.astype(jnp.uint32))
        weight_left = jnp.sum(jnp.where(order >= higher[..., None], weight, 0), axis=-1)
        return jnp.where(weight_left >= target, higher, threshold)

    threshold = jax.lax.fori_loop(0, 32, try_bit, jnp.zeros(logits.shape[:-1], jnp.uint32))
    return jnp.where(order >= threshold[..., None], logits, -jnp.inf)
