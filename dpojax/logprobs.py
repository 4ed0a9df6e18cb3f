"""Log-probabilities of target tokens, without the logits of a whole batch in memory.

`token_logprobs` is the only path from hidden states to log-probs. The policy, the reference,
evaluation and rewards all use it. It applies the head to the scored tokens only, one chunk of the
vocabulary at a time, and computes in float32 from the logits on. `token_logprobs_plain` is its
plain twin for tests.

Shapes in comments: T scored tokens, behind any leading axes; D width of the model; V vocabulary;
C tokens of the vocabulary in one chunk; R rows; S slots for responses in a row.
"""

from __future__ import annotations

import math
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
    VocabularyChunks,
    logits_of,
    scan_vocabulary,
    scan_vocabulary_gradients,
    sum_dtype,
    target_logits,
    vocabulary_chunks,
)
from dpojax.mesh_axes import spec_of, varying_alike, with_auto_axes


class TokenStatistics(NamedTuple):
    """Statistics of the model's next-token distribution p. Each array has the shape of `targets`.

    A statistic that was not asked for is None: `token_logprobs_and_entropy` computes the first two,
    `token_statistics` all but `kl`, and `token_kl` computes `kl`.
    """

    logprob: Array  # log p(target), nats
    entropy: Array | None = None  # of p, nats
    mean_logit: Array | None = None  # mean of the logits over the vocabulary
    correct: Array | None = None  # 1.0 where no token is more probable than the target, else 0.0
    log_collision: Array | None = None  # log sum_v p_v^2, nats
    kl: Array | None = None  # KL(reference || p), nats


def token_logprobs_plain(hidden: Array, head: Head, targets: Array) -> Array:
    """Compute what `token_logprobs` computes from the full logits: for tests and small inputs."""

    def compute(hidden: Array, weight: Array, bias: Array | None, targets: Array) -> Array:
        logits = logits_of(hidden, head._replace(weight=weight, bias=bias))
        logprobs = jax.nn.log_softmax(logits, axis=-1)  # [..., T, V]
        return jnp.take_along_axis(logprobs, targets[..., None], axis=-1)[..., 0]

    return _by_token(compute, hidden, head.weight, head.bias, targets)


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
      [..., T].

    Raises:
      ValueError: shapes that do not belong together.
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
    _check_shapes(hidden, head, targets)

    def compute(hidden: Array, weight: Array, bias: Array | None, targets: Array):
        hidden, weight, bias, targets = varying_alike(hidden, weight, bias, targets)
        return _statistics(hidden, head._replace(weight=weight, bias=bias), targets, max_logits)

    return _by_token(compute, hidden, head.weight, head.bias, targets)


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
    """

    def compute(hidden: Array, reference_hidden: Array, *arrays: Array | None) -> Array:
        own_head = head._replace(weight=arrays[0], bias=arrays[1])
        its_head = reference_head._replace(weight=arrays[2], bias=arrays[3])

        @jax.checkpoint
        def kl_of_chunk(hidden_pair: tuple[Array, Array]) -> Array:
            log_p = jax.nn.log_softmax(logits_of(hidden_pair[0], own_head), axis=-1)  # [..., t, V]
            log_q = jax.nn.log_softmax(logits_of(hidden_pair[1], its_head), axis=-1)
            return jnp.sum(jnp.exp(log_p) * (log_p - log_q), axis=-1)

        # Two arrays of logits exist at once, so each may have half of the numbers.
        token_chunks = _token_chunk_count(hidden.shape[:-1], len(head.weight), 0.5 * max_logits)
        return _map_token_chunks(kl_of_chunk, (hidden, reference_hidden), token_chunks)

    arrays = *head[:2], *reference_head[:2]  # of each its weight and its bias
    return _by_token(compute, hidden, reference_hidden, *arrays)


def sum_by_response(values: Array, response: Array, slots: int) -> Array:
    """Sum per-token values over the tokens of each response.

    Args:
      values: [R, T].
      response: [R, T], int: the slot of the response that each token belongs to; -1 for padding.
      slots: S, how many responses a row can hold.

    Returns:
      [R, S]; 0 for slots without tokens.
    """
    belongs = response[..., None] == jnp.arange(slots)[(None,) * response.ndim]  # [R, T, S]
    return jnp.sum(jnp.where(belongs, values[..., None], 0), axis=-2)


def of_response(values: Array, response: Array) -> Array:
    """Give every token the value of the response that it belongs to.

    Args:
      values: [R, S].
      response: [R, T], int: the slot of the response that each token belongs to; -1 for padding.

    Returns:
      [R, T]; padding gets the value of slot 0, which has no meaning.
    """
    return jnp.take_along_axis(values, jnp.maximum(response, 0), axis=-1)


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


def _check_shapes(hidden: Array, head: Head, targets: Array) -> None:
    """Refuse shapes that would broadcast to a wrong result. Under jit this runs when tracing."""
    if hidden.ndim == 0 or hidden.shape[:-1] != targets.shape:
        raise ValueError(
            f"hidden: {hidden.shape} must be the shape of targets, {targets.shape}, and the width"
        )
    if head.weight.ndim != 2 or head.weight.shape[1] != hidden.shape[-1]:
        raise ValueError(
            f"head.weight: {head.weight.shape} must be [vocabulary, width], and the width of "
            f"hidden is {hidden.shape[-1]}"
        )


def _token_chunk_count(shape: tuple[int, ...], vocabulary: int, max_logits: float) -> int:
    """Into how many chunks the last axis of tokens is cut."""
    chunks = math.ceil(math.prod(shape) * vocabulary / max_logits)
    return max(1, min(chunks, shape[-1]))


def _map_token_chunks(function: Callable, arrays: tuple[Array, ...], count: int) -> Array:
    """`function` of arrays [..., T, D], `count` chunks of tokens one after another: [..., T].

    A single chunk is computed without a loop.
    """
    tokens = arrays[0].shape[-2]
    chunks = tuple(_split_tokens(x, count) for x in arrays)
    if count > 1:
        outputs = jax.lax.map(function, chunks)
    else:
        outputs = function(tuple(x[0] for x in chunks))[None]
    outputs = jnp.moveaxis(outputs, 0, -2)  # [..., count, t]
    return outputs.reshape(*outputs.shape[:-2], -1)[..., :tokens]


def _split_tokens(x: Array, count: int) -> Array:
    """[..., T, D] as [count, ..., T / count, D], zero-padded at the end."""
    *leading, tokens, width = x.shape
    size = -(-tokens // count)
    padding = [(0, 0)] * len(leading) + [(0, count * size - tokens), (0, 0)]
    return jnp.moveaxis(jnp.pad(x, padding).reshape(*leading, count, size, width), -3, 0)


class _Static(NamedTuple):
    """What the compiled program of `_chunked_logprobs` depends on besides shapes."""

    scale: float | None  # of the head
    softcap: float | None  # of the head
    chunks: VocabularyChunks
    max_logits: int
    with_entropy: bool


class _LogprobAndEntropy(NamedTuple):
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


class _Moments(NamedTuple):
    """The running sums of `token_statistics`: those of `_Sums`, and three more."""

    max_logit: Array
    total: Array
    weighted_distance: Array
    squares: Array  # sum of exp(2 (z - max_logit))
    logits: Array  # sum of z
    target_logit: Array


def _logprobs_by_chunk(
    hidden: Array, head: Head, targets: Array, max_logits: int, *, with_entropy: bool
) -> _LogprobAndEntropy:
    _check_shapes(hidden, head, targets)

    def compute(hidden: Array, weight: Array, bias: Array | None, targets: Array):
        chunks = vocabulary_chunks(targets.size, len(weight), max_logits)
        static = _Static(head.scale, head.softcap, chunks, max_logits, with_entropy)
        return _chunked_logprobs(static, *varying_alike(hidden, weight, bias, targets))

    return _by_token(compute, hidden, head.weight, head.bias, targets)


def _by_token(function: Callable, hidden: Array, *arrays: Array | None) -> Any:
    """Call `function`, whose results have a number for each hidden state, on any kind of mesh."""
    tokens = PartitionSpec(*spec_of(hidden)[:-1])
    return with_auto_axes(function, hidden, *arrays, out=tokens)


def _over_tokens(per_word: Array, targets: Array) -> Array:
    """[C] as [1, ..., 1, C], so that it broadcasts against logits [..., T, C]."""
    return per_word[(None,) * targets.ndim]


def _update_moments(
    hidden: Array, targets: Array, sums: _Moments, head: Head, tokens: ChunkTokens, _: Any
) -> tuple[_Moments, None]:
    """Add one chunk of the vocabulary to the sums, which are rescaled to the new largest logit."""
    logits, counted = logits_of(hidden, head), _over_tokens(tokens.counted, targets)  # [..., T, C]
    is_target = _over_tokens(tokens.ids, targets) == targets[..., None]
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


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _chunked_logprobs(static: _Static, hidden, weight, bias, targets) -> _LogprobAndEntropy:
    return _forward(static, hidden, weight, bias, targets)[0]


def _forward(static: _Static, hidden, weight, bias, targets):
    """The log-probs (and entropies) [..., T], and what the backward pass reads."""
    head = Head(weight.astype(hidden.dtype), bias, static.scale, static.softcap)
    store_logits = static.chunks.count == 1 or targets.size * len(weight) <= static.max_logits

    def update(sums: _Sums, head: Head, tokens: ChunkTokens, _) -> tuple[_Sums, Array | None]:
        counted = _over_tokens(tokens.counted, targets)
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
    return _LogprobAndEntropy(logprob, entropy), saved


def _backward(static: _Static, saved, cotangent: _LogprobAndEntropy):
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
    cotangent: _LogprobAndEntropy,
    head: Head,
    tokens: ChunkTokens,
    logits,
):
    """Gradients of hidden states and of one chunk's weight and bias.

    With log p = logits - logsumexp: d logprob / d logits = one-hot target - p, and
    d entropy / d logits = -p (log p + entropy). `logits` are the stored ones, or None.
    """
    logits = logits_of(hidden, head) if logits is None else logits  # [..., T, C]
    ids, counted = _over_tokens(tokens.ids, targets), _over_tokens(tokens.counted, targets)
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


_chunked_logprobs.defvjp(_forward, _backward)
