"""The chunked path from hidden states to log-probs and entropies, with its own gradient.

Shapes in comments: T scored tokens, behind any leading axes; D width of the model; V vocabulary;
C tokens of the vocabulary in one chunk.
"""

from __future__ import annotations

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

from dpojax.head import (
    ChunkTokens,
    Head,
    VocabularyChunks,
    logits_of,
    scan_vocabulary,
    scan_vocabulary_gradients,
    sum_dtype,
    target_logits,
)


class Static(NamedTuple):
    """What the compiled program of `chunked_logprobs` depends on besides shapes."""

    scale: float | None  # of the head
    softcap: float | None  # of the head
    chunks: VocabularyChunks
    max_logits: int
    with_entropy: bool


class LogprobAndEntropy(NamedTuple):
    """Of each target, nats, [..., T]. The entropy is None if it is not computed."""

    logprob: Array
    entropy: Array | None


class _Sums(NamedTuple):
    """Running sums over the logits z of the vocabulary so far, [..., T] each.

    All exponentials are relative to the largest logit so far, so none can overflow.
    """

    max_logit: Array
    total: Array  # sum of exp(z - max_logit)
    weighted_distance: Array | None  # sum of exp(z - max_logit) (z - max_logit)


def over_tokens(per_word: Array, targets: Array) -> Array:
    """[C] as [1, ..., 1, C], so that it broadcasts against logits [..., T, C]."""
    return per_word[(None,) * targets.ndim]


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def chunked_logprobs(static: Static, hidden, weight, bias, targets) -> LogprobAndEntropy:
    return _forward(static, hidden, weight, bias, targets)[0]


def _forward(static: Static, hidden, weight, bias, targets):
    """The log-probs (and entropies) [..., T], and what the backward pass reads."""
    head = Head(weight.astype(hidden.dtype), bias, static.scale, static.softcap)
    store_logits = static.chunks.count == 1 or targets.size * len(weight) <= static.max_logits

    def update(sums: _Sums, head: Head, tokens: ChunkTokens, _) -> tuple[_Sums, Array | None]:
        counted = over_tokens(tokens.counted, targets)
        logits = jnp.where(counted, logits_of(hidden, head), -jnp.inf)  # [..., T, C]
        max_logit = jnp.maximum(sums.max_logit, logits.max(-1))
        relative, rescale = logits - max_logit[..., None], jnp.exp(sums.max_logit - max_logit)
        mass, distance = jnp.exp(relative), None
        if static.with_entropy:
            # Before the first chunk the largest logit is -inf: 0 * -inf would be NaN.
            moved = jnp.where(sums.total > 0, sums.total * (sums.max_logit - max_logit), 0)
            distance = rescale * (sums.weighted_distance + moved)
            distance += (mass * jnp.where(counted, relative, 0)).sum(-1)
        total = sums.total * rescale + mass.sum(-1)
        return _Sums(max_logit, total, distance), logits if store_logits else None

    zero = jnp.zeros_like(targets, sum_dtype(hidden))
    start = _Sums(
        max_logit=jnp.full_like(zero, -jnp.inf),
        total=zero,
        weighted_distance=zero if static.with_entropy else None,
    )
    sums, logits = scan_vocabulary(update, start, head, static.chunks)
    log_total = jnp.log(sums.total)
    logsumexp = sums.max_logit + log_total
    # H = -sum p log p with log p = (z - max_logit) - log_total.
    entropy = log_total - sums.weighted_distance / sums.total if static.with_entropy else None
    logprob = target_logits(hidden, head, targets) - logsumexp
    saved = hidden, weight, bias, targets, logsumexp, entropy, logits
    return LogprobAndEntropy(logprob, entropy), saved


def _backward(static: Static, saved, cotangent: LogprobAndEntropy):
    """Gradients of hidden states, weight and bias, one chunk of the vocabulary at a time."""
    hidden, weight, bias, targets, logsumexp, entropy, logits = saved
    head = Head(weight.astype(hidden.dtype), bias, static.scale, static.softcap)
    pull = partial(_pull_chunk, hidden, targets, logsumexp, entropy, cotangent)
    d_hidden, *d_head = scan_vocabulary_gradients(pull, hidden, head, static.chunks, logits)
    d_weight, d_bias = jax.tree.map(lambda d, x: d.astype(x.dtype), tuple(d_head), (weight, bias))
    return d_hidden.astype(hidden.dtype), d_weight, d_bias, None


def _pull_chunk(
    hidden,
    targets,
    logsumexp,
    entropy,
    cotangent: LogprobAndEntropy,
    head: Head,
    tokens: ChunkTokens,
    logits,
):
    """Gradients of hidden states and of one chunk's weight and bias.

    With log p = logits - logsumexp: d logprob / d logits = one-hot target - p, and
    d entropy / d logits = -p (log p + entropy). `logits` are the stored ones, or None.
    """
    logits = logits_of(hidden, head) if logits is None else logits  # [..., T, C]
    ids, counted = over_tokens(tokens.ids, targets), over_tokens(tokens.counted, targets)
    log_p = logits - logsumexp[..., None]
    p = jnp.exp(log_p)
    d_logits = cotangent.logprob[..., None] * ((targets[..., None] == ids) - p)
    if entropy is not None:
        d_logits = d_logits - cotangent.entropy[..., None] * p * (log_p + entropy[..., None])
    if head.softcap is not None:
        d_logits = d_logits * (1 - (logits / head.softcap) ** 2)  # 1 - tanh^2
    d_logits = jnp.where(counted, d_logits, 0)
    d_bias = None if head.bias is None else jnp.sum(d_logits, axis=range(d_logits.ndim - 1))
    d_logits = d_logits if head.scale is None else d_logits * head.scale
    # Rounded to the compute dtype, so that both products run at its speed; sums stay in float32.
    d_logits = d_logits.astype(hidden.dtype)
    d_hidden = jnp.einsum(
        "...v,vd->...d", d_logits, head.weight, preferred_element_type=sum_dtype(hidden)
    )
    d_weight = weight_gradient(
        d_logits.reshape(-1, d_logits.shape[-1]), hidden.reshape(-1, hidden.shape[-1])
    )
    return d_hidden, d_weight, d_bias


def weight_gradient(x: Array, cotangent: Array) -> Array:
    """Compute the gradient of `x @ weight` with respect to `weight`, in `sum_dtype(x)`.

    On a CPU, products of bfloat16 are fast (2.5 times as fast in our measurements) if the last axis
    of the first factor is summed over. So x is transposed first. XLA would fold a plain
    transposition back into the product. It does not do so for one that is made of two halves.

    Args:
      x: [n, d].
      cotangent: [n, f], gradient with respect to the product, in the dtype of x.

    Returns:
      [d, f]: sum_n x[n] cotangent[n].
    """

    def summed_over_first_axes(x, g):
        return jnp.einsum("nd,nf->df", x, g, preferred_element_type=sum_dtype(x))

    def transposed_first(x, g):
        half = x.shape[1] // 2
        halves = [x[:, :half].T, x[:, half:].T]
        return jnp.matmul(jnp.concatenate(halves), g, preferred_element_type=sum_dtype(x))

    if x.dtype == sum_dtype(x) or x.shape[1] < 2:
        return summed_over_first_axes(x, cotangent)
    return jax.lax.platform_dependent(
        x, cotangent, cpu=transposed_first, default=summed_over_first_axes
    )


chunked_logprobs.defvjp(_forward, _backward)
