"""Log-probabilities of target tokens, without the logits of a whole batch in memory.

`token_logprobs` is the only path from hidden states to log-probs. The policy, the reference,
evaluation and rewards all use it. It applies the head to the scored tokens only, one chunk of the
vocabulary at a time, and computes in float32 from the logits on. `token_logprobs_plain` is its
plain twin for tests.

Shapes in comments: T scored tokens, behind any leading axes; D width of the model; V vocabulary;
C tokens of the vocabulary in one chunk; R rows; S slots for responses in a row.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array
from jax.sharding import AbstractMesh, Mesh, PartitionSpec

from dpojax.head import (
    ChunkTokens,
    Head,
    logits_of,
    scan_vocabulary,
    sum_dtype,
    target_logits,
    vocabulary_chunks,
)
from dpojax.logprobs.checks import check_tokens
from dpojax.logprobs.chunked import LogprobAndEntropy, Static, chunked_logprobs, over_tokens
from dpojax.mesh_axes import spec_of, varying_alike, with_auto_axes


class PerturbedLogprobs(NamedTuple):
    """Log-probs of the same tokens under two perturbed policies, nats, [..., T] each."""

    away: Array  # logits of the policy + epsilon (policy - reference)
    towards: Array  # logits of the policy - epsilon (policy - reference)


class TokenStatistics(NamedTuple):
    """Statistics of the model's next-token distribution p. Each array has the shape of `targets`.

    A statistic that was not asked for is None: `token_logprobs_and_entropy` computes the first two,
    `token_statistics` all but the last two. `token_kl` computes `kl`, and `perturbed_logprobs` the
    last one.
    """

    logprob: Array  # log p(target), nats
    entropy: Array | None = None  # of p, nats
    mean_logit: Array | None = None  # mean of the logits over the vocabulary
    correct: Array | None = None  # 1.0 where no token is more probable than the target, else 0.0
    log_collision: Array | None = None  # log sum_v p_v^2, nats
    kl: Array | None = None  # KL(reference || p), nats
    perturbed: PerturbedLogprobs | None = None  # log-probs under perturbed logits, nats


def token_logprobs_plain(hidden: Array, head: Head, targets: Array) -> Array:
    """Compute what `token_logprobs` computes from the full logits: for tests and small inputs."""

    def compute(hidden: Array, weight: Array, bias: Array | None, targets: Array) -> Array:
        logits = logits_of(hidden, head._replace(weight=weight, bias=bias))
        logprobs = jax.nn.log_softmax(logits, axis=-1)  # [..., T, V]
        return jnp.take_along_axis(logprobs, targets[..., None], axis=-1)[..., 0]

    logprobs = by_token(compute, hidden, head.weight, head.bias, targets)
    return _nan_for_no_token(logprobs, targets, head)


def token_logprobs(hidden: Array, head: Head, targets: Array, *, max_logits: int = 2**25) -> Array:
    """Compute log p(target | hidden), nats, float32 (float64 for hidden states of that dtype).

    Forward, it is the target's logit minus the logsumexp of all logits. The target's logit is one
    dot product. The logsumexp is accumulated over chunks of the vocabulary (Milakov and Gimelshein
    2018, algorithm 3). If all logits fit into `max_logits`, they are stored for the backward pass.
    Otherwise the backward pass computes the logits of each chunk again.

    Args:
      hidden: [..., T, D], any float dtype; products are computed in it, sums in float32.
      head: the language-model head; a float32 master weight is cast to the dtype of `hidden`.
      targets: [..., T], token ids.
      max_logits: how many float32 logits of one chunk may exist at once, on all devices together.
        The backward pass needs the same number again for their gradient. A lone CPU uses smaller
        chunks that stay in its cache. On a mesh with a `tensor` axis the size of a chunk is rounded
        up to a multiple of 128 tokens, so a chunk may have up to 127 more logits for each target.

    Returns:
      [..., T]; NaN where a target is no token of the vocabulary.

    Raises:
      TypeError: targets that are no integers.
      ValueError: shapes that do not belong together, or targets that are no tokens of the
        vocabulary, where they are known before the program runs.
    """
    return _logprobs_by_chunk(hidden, head, targets, max_logits, with_entropy=False).logprob


def token_logprobs_and_entropy(
    hidden: Array, head: Head, targets: Array, *, max_logits: int = 2**25
) -> TokenStatistics:
    """Compute `token_logprobs`, and the entropy of the same distributions in the same pass.

    Both have a gradient that needs no more memory than that of `token_logprobs`.

    Returns:
      `TokenStatistics` with `logprob` and `entropy`, [..., T] each.
    """
    computed = _logprobs_by_chunk(hidden, head, targets, max_logits, with_entropy=True)
    return TokenStatistics(logprob=computed.logprob, entropy=computed.entropy)


def token_statistics(
    hidden: Array, head: Head, targets: Array, *, max_logits: int = 2**25
) -> TokenStatistics:
    """Compute all `TokenStatistics` but `kl`, for evaluation. Arguments as in `token_logprobs`.

    Do not differentiate it: the gradient would store the logits of every chunk and a copy of every
    chunk of the head. Use `token_logprobs_and_entropy` instead.
    """
    check_tokens(hidden, head, targets)

    def compute(hidden: Array, weight: Array, bias: Array | None, targets: Array):
        hidden, weight, bias, targets = varying_alike(hidden, weight, bias, targets)
        return _statistics(hidden, head._replace(weight=weight, bias=bias), targets, max_logits)

    return by_token(compute, hidden, head.weight, head.bias, targets)


def logits_at_once(
    tokens: int, vocabulary: int, *, max_logits: int, mesh: Mesh | AbstractMesh | None = None
) -> int:
    """Predict how many float32 numbers `token_logprobs` holds for logits, on all devices together.

    These are the stored logits, if it stores them, and the logits of the current chunk with their
    gradient.

    Args:
      tokens: scored tokens.
      vocabulary: its size; 0 for a model without a language-model head, which holds none.
      max_logits: as in `token_logprobs`. A chunk may have more, as described there.
      mesh: the ambient mesh by default.
    """
    if vocabulary == 0:
        return 0
    chunks = vocabulary_chunks(tokens, vocabulary, max_logits, mesh)
    all_logits = tokens * vocabulary
    stored = chunks.count == 1 or all_logits <= max_logits
    return tokens * chunks.size + (all_logits if stored else tokens * chunks.size)


def _logprobs_by_chunk(
    hidden: Array, head: Head, targets: Array, max_logits: int, *, with_entropy: bool
) -> LogprobAndEntropy:
    check_tokens(hidden, head, targets)

    def compute(hidden: Array, weight: Array, bias: Array | None, targets: Array):
        chunks = vocabulary_chunks(targets.size, len(weight), max_logits)
        static = Static(head.scale, head.softcap, chunks, max_logits, with_entropy)
        return chunked_logprobs(static, *varying_alike(hidden, weight, bias, targets))

    computed = by_token(compute, hidden, head.weight, head.bias, targets)
    return computed._replace(logprob=_nan_for_no_token(computed.logprob, targets, head))


def _statistics(hidden: Array, head: Head, targets: Array, max_logits: int) -> TokenStatistics:
    chunks = vocabulary_chunks(targets.size, len(head.weight), max_logits)
    head = head._replace(weight=head.weight.astype(hidden.dtype))
    update = partial(_update_moments, hidden, targets)
    zero = jnp.zeros_like(targets, sum_dtype(hidden))
    start = _Moments(
        max_logit=jnp.full_like(zero, -jnp.inf),
        total=zero,
        weighted_distance=zero,
        squares=zero,
        logits=zero,
        target_logit=zero,
    )
    sums, _ = scan_vocabulary(update, start, head, chunks)
    log_total = jnp.log(sums.total)
    return TokenStatistics(
        logprob=target_logits(hidden, head, targets) - (sums.max_logit + log_total),
        entropy=log_total - sums.weighted_distance / sums.total,
        mean_logit=sums.logits / len(head.weight),
        correct=(sums.target_logit >= sums.max_logit).astype(zero.dtype),
        log_collision=jnp.log(sums.squares) - 2 * log_total,
    )


class _Moments(NamedTuple):
    """The running sums of `token_statistics`: those of `_Sums`, and three more."""

    max_logit: Array
    total: Array
    weighted_distance: Array
    squares: Array  # sum of exp(2 (z - max_logit))
    logits: Array  # sum of z
    target_logit: Array


def _update_moments(
    hidden: Array, targets: Array, sums: _Moments, head: Head, tokens: ChunkTokens, _: Any
) -> tuple[_Moments, None]:
    """Add one chunk of the vocabulary to the sums, which are rescaled to the new largest logit."""
    logits, counted = logits_of(hidden, head), over_tokens(tokens.counted, targets)  # [..., T, C]
    is_target = over_tokens(tokens.ids, targets) == targets[..., None]
    max_logit = jnp.maximum(sums.max_logit, jnp.where(counted, logits, -jnp.inf).max(-1))
    rescale = jnp.exp(sums.max_logit - max_logit)
    relative = jnp.where(counted, logits - max_logit[..., None], -jnp.inf)
    mass, distance = jnp.exp(relative), jnp.where(counted, relative, 0)
    # Before the first chunk the largest logit is -inf: 0 * -inf would be NaN.
    moved = jnp.where(sums.total > 0, sums.total * (sums.max_logit - max_logit), 0)
    return _Moments(
        max_logit=max_logit,
        total=rescale * sums.total + mass.sum(-1),
        weighted_distance=rescale * (sums.weighted_distance + moved) + (mass * distance).sum(-1),
        squares=rescale**2 * sums.squares + jnp.square(mass).sum(-1),
        logits=sums.logits + jnp.where(counted, logits, 0).sum(-1),
        target_logit=sums.target_logit + jnp.where(is_target & counted, logits, 0).sum(-1),
    ), None


def _nan_for_no_token(logprobs: Array, targets: Array, head: Head) -> Array:
    """NaN where a target is no token. Indexing would take another token in its place."""
    return jnp.where((targets >= 0) & (targets < len(head.weight)), logprobs, jnp.nan)


def by_token(function: Callable, hidden: Array, *arrays: Array | None) -> Any:
    """Call `function`, whose results have a number for each hidden state, on any kind of mesh."""
    tokens = PartitionSpec(*spec_of(hidden)[:-1])
    return with_auto_axes(function, hidden, *arrays, out=tokens)
