"""Log-probabilities of given tokens without ever holding the logits of a whole batch.

`token_logprobs` is the only path from hidden states to log-probs: the policy, the reference,
evaluation and rewards all use it. It applies the head to the scored tokens only, a part of the
vocabulary at a time, and in float32 from the logits on. `token_logprobs_plain` is its twin for
tests.
"""

from __future__ import annotations

import math
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array
from jax.sharding import AbstractMesh, Mesh

from dpojax.head import (
    Head,
    Ids,
    Parts,
    logit_of_target,
    logits_of,
    over_parts,
    parts_of,
    pulled_over_parts,
)


class TokenStatistics(NamedTuple):
    """Of the next-token distribution p at each scored token; arrays have the targets' shape.

    Training fills in what its objective reads, evaluation everything but `kl`.
    """

    logprob: Array  # of the target, nats
    entropy: Array | None = None  # nats
    mean_logit: Array | None = None  # over the vocabulary
    correct: Array | None = None  # 1.0 where no token is more probable than the target
    log_collision: Array | None = None  # log sum_v p_v^2, nats
    kl: Array | None = None  # KL(reference || p), nats


def token_logprobs_plain(hidden: Array, head: Head, targets: Array) -> Array:
    """What `token_logprobs` computes, through the full logits: for tests and small inputs."""
    logprobs = jax.nn.log_softmax(logits_of(hidden, head), axis=-1)
    return jnp.take_along_axis(logprobs, targets[..., None], axis=-1)[..., 0]


def token_logprobs(hidden: Array, head: Head, targets: Array, *, max_logits: int = 2**25) -> Array:
    """log p(target | hidden) in nats, float32.

    Forward, it is the target's logit (a dot product, not a gather from all logits) minus the
    logsumexp, which is gathered over parts of the vocabulary (Milakov and Gimelshein 2018,
    algorithm 3). If all logits fit into `max_logits` they are kept for the backward pass; otherwise
    each part's are computed again.

    Args:
      hidden: [..., tokens, width], any float dtype; products run in it, sums in float32.
      head: the language-model head; a float32 master weight is cast to hidden's dtype here.
      targets: [..., tokens], int.
      max_logits: how many float32 logits of a part may exist at once, on all devices together;
        backward, as many numbers again for their gradient. One CPU has fewer: what stays in its
        cache. On a mesh with a `tensor` axis a part is rounded up to a multiple of 128 tokens of
        the vocabulary, so that it may have up to 127 logits more for each target.

    Returns:
      [..., tokens].
    """
    return _walked(hidden, head, targets, max_logits, entropy=False).logprob


def token_logprobs_and_entropy(
    hidden: Array, head: Head, targets: Array, *, max_logits: int = 2**25
) -> TokenStatistics:
    """`token_logprobs`, and the entropy of the same distributions, from the same walk, with a
    gradient of as little memory.

    Returns:
      `TokenStatistics` with these two, [..., tokens] each.
    """
    return TokenStatistics(*_walked(hidden, head, targets, max_logits, entropy=True))


def token_statistics(
    hidden: Array, head: Head, targets: Array, *, max_logits: int = 2**25
) -> TokenStatistics:
    """All but the KL of `TokenStatistics` of each target; shapes as `token_logprobs`.

    For evaluation. Differentiated, it keeps every part's logits and a copy of every part of the
    head, and adds up gradients of the size of the whole head, one for each part: for the log-prob
    and the entropy see `token_logprobs_and_entropy`.
    """
    parts = parts_of(targets.size, len(head.weight), max_logits)
    head = head._replace(weight=head.weight.astype(hidden.dtype))

    def one(sums: _Moments, part: Head, ids: Ids, _) -> tuple[_Moments, None]:
        logits, fresh = logits_of(hidden, part), ids.fresh[_leading(targets)]
        own = ids.number[_leading(targets)] == targets[..., None]
        top = jnp.maximum(sums.top, jnp.where(fresh, logits, -jnp.inf).max(-1))
        scale, above = jnp.exp(sums.top - top), jnp.where(fresh, logits - top[..., None], -jnp.inf)
        share, distance = jnp.exp(above), jnp.where(fresh, above, 0)
        moved = jnp.where(sums.total > 0, sums.total * (sums.top - top), 0)
        return _Moments(
            top,
            scale * sums.total + share.sum(-1),
            scale * (sums.distance + moved) + (share * distance).sum(-1),
            scale**2 * sums.squares + jnp.square(share).sum(-1),
            sums.logits + jnp.where(fresh, logits, 0).sum(-1),
            sums.target + jnp.where(own & fresh, logits, 0).sum(-1),
        ), None

    zero = jnp.zeros(targets.shape, jnp.float32)
    none = _Moments(jnp.full(targets.shape, -jnp.inf), *[zero] * 5)
    sums, _ = over_parts(one, none, head, parts)
    log_total = jnp.log(sums.total)
    return TokenStatistics(
        logit_of_target(hidden, head, targets) - (sums.top + log_total),
        log_total - sums.distance / sums.total,
        sums.logits / len(head.weight),
        (sums.target >= sums.top).astype(jnp.float32),
        jnp.log(sums.squares) - 2 * log_total,
    )


def logits_at_once(
    tokens: int, vocabulary: int, *, max_logits: int, mesh: Mesh | AbstractMesh | None = None
) -> int:
    """How many float32 numbers `token_logprobs` holds in the place of logits, on all devices.

    Those that it keeps, if it does, and those of a part under way, with their gradient. A part can
    have more than `max_logits` of them, see there. The mesh is the ambient one by default. None of
    a model without a vocabulary.
    """
    if vocabulary == 0:
        return 0
    parts, every = parts_of(tokens, vocabulary, max_logits, mesh), tokens * vocabulary
    kept = parts.count == 1 or every <= max_logits
    return tokens * parts.size + (every if kept else tokens * parts.size)


def token_kl(
    hidden: Array,
    head: Head,
    reference_hidden: Array,
    reference_head: Head,
    *,
    max_logits: int = 2**25,
) -> Array:
    """KL(policy || reference) of the two next-token distributions at each position, nats.

    Exact: summed over the vocabulary. hidden, reference_hidden: [..., tokens, width]; returns
    [..., tokens]. Differentiated, it computes each chunk's logits again.
    """

    @jax.checkpoint
    def one(part):
        log_p = jax.nn.log_softmax(logits_of(part[0], head), axis=-1)
        log_q = jax.nn.log_softmax(logits_of(part[1], reference_head), axis=-1)
        return jnp.sum(jnp.exp(log_p) * (log_p - log_q), axis=-1)

    return _by_chunks(one, (hidden, reference_hidden), hidden[..., 0], head, 0.5 * max_logits)


def sum_by_response(values: Array, response: Array, slots: int) -> Array:
    """Sums of per-token values by the response that each token belongs to.

    Args:
      values: [rows, scored].
      response: [rows, scored], int, the slot of each token; -1 (padding) belongs to none.
      slots: how many responses a row can hold.

    Returns:
      [rows, slots], zero for slots without tokens.
    """
    member = response[..., None] == jnp.arange(slots)[(None,) * response.ndim]
    return jnp.sum(jnp.where(member, values[..., None], 0), axis=-2)


def of_response(values: Array, response: Array) -> Array:
    """What the response of each token has: the inverse of `sum_by_response`.

    Args:
      values: [rows, slots].
      response: [rows, scored], int; what stands at -1 (padding) means nothing.

    Returns:
      [rows, scored].
    """
    return jnp.take_along_axis(values, jnp.maximum(response, 0), axis=-1)


def weight_gradient(x: Array, cotangent: Array) -> Array:
    """sum_n x[n] cotangent[n]: what a product x @ weight says of its weight, float32.

    On a CPU products of bfloat16 are fast (here 2.5 times as fast) where the first factor's last
    axis is summed over, so x is turned first. XLA would fold a transposition back into the product;
    one in two halves it leaves alone.

    Args:
      x: [n, d]. cotangent: [n, f], of the same dtype.

    Returns:
      [d, f].
    """

    def plain(x, g):
        return jnp.einsum("nd,nf->df", x, g, preferred_element_type=jnp.float32)

    def turned(x, g):
        half = x.shape[1] // 2
        parts = [x[:, :half].T, x[:, half:].T]
        return jnp.matmul(jnp.concatenate(parts), g, preferred_element_type=jnp.float32)

    if x.dtype == jnp.float32 or x.shape[1] < 2:
        return plain(x, cotangent)
    return jax.lax.platform_dependent(x, cotangent, cpu=turned, default=plain)


def _chunks(targets: Array, head: Head, max_logits: float) -> int:
    wanted = math.ceil(math.prod(targets.shape) * head.weight.shape[0] / max_logits)
    return max(1, min(wanted, targets.shape[-1]))


def _split(x: Array, chunks: int, axis: int = -1) -> Array:
    """[..., tokens, ...] as [chunks, ..., tokens / chunks, ...], zero-padded at the end."""
    axis = axis % x.ndim
    size = -(-x.shape[axis] // chunks)
    pad = [(0, chunks * size - n if i == axis else 0) for i, n in enumerate(x.shape)]
    shape = (*x.shape[:axis], chunks, size, *x.shape[axis + 1 :])
    return jnp.moveaxis(jnp.pad(x, pad).reshape(shape), axis, 0)


def _join(parts: Array, tokens: int | None = None, axis: int = -1) -> Array:
    """The inverse of `_split` along a last axis, of which `tokens` are kept (all by default)."""
    parts = jnp.moveaxis(parts, 0, axis - 1)
    shape = (*parts.shape[: axis - 1], -1, *parts.shape[parts.ndim + axis + 1 :])
    return parts.reshape(shape)[(..., slice(tokens), *[slice(None)] * (-1 - axis))]


def _by_chunks(one, arrays, targets, head, max_logits):
    chunks = _chunks(targets, head, max_logits)
    parts = _walk(one, tuple(_split(x, chunks, axis=targets.ndim - 1) for x in arrays))
    return jax.tree.map(lambda x: _join(x, targets.shape[-1]), parts)


def _walk(one, parts):
    """lax.map, but without a loop around a single chunk."""
    if len(parts[0]) > 1:
        return jax.lax.map(one, parts)
    return jax.tree.map(lambda x: x[None], one(jax.tree.map(lambda x: x[0], parts)))


class _Static(NamedTuple):
    """What a program of `_found` is compiled for."""

    shaping: tuple[float | None, float | None]  # scale and softcap of the head
    parts: Parts
    max_logits: int
    entropy: bool  # whether it is wanted


class _Found(NamedTuple):
    """Of each target, nats."""

    logprob: Array
    entropy: Array | None


class _Sums(NamedTuple):
    """Sums over the vocabulary as far as it was walked, of logits z and their largest, `top`."""

    top: Array
    total: Array  # of exp(z - top)
    distance: Array | None  # of exp(z - top) (z - top)


class _Moments(NamedTuple):
    """As `_Sums`, and more."""

    top: Array
    total: Array
    distance: Array
    squares: Array  # of exp(2 (z - top))
    logits: Array
    target: Array  # the target's logit


def _walked(hidden, head: Head, targets, max_logits: int, *, entropy: bool) -> _Found:
    parts = parts_of(targets.size, len(head.weight), max_logits)
    static = _Static((head.scale, head.softcap), parts, max_logits, entropy)
    return _found(static, hidden, head.weight, head.bias, targets)


def _leading(targets: Array) -> tuple:
    return (None,) * targets.ndim


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _found(static: _Static, hidden, weight, bias, targets) -> _Found:
    return _forward(static, hidden, weight, bias, targets)[0]


def _forward(static: _Static, hidden, weight, bias, targets):
    """hidden [..., tokens, width], targets [..., tokens]; one log-prob a target."""
    head = Head(weight.astype(hidden.dtype), bias, *static.shaping)
    kept = static.parts.count == 1 or targets.size * len(weight) <= static.max_logits

    def one(sums: _Sums, part: Head, ids: Ids, _) -> tuple[_Sums, Array | None]:
        fresh = ids.fresh[_leading(targets)]
        logits = jnp.where(fresh, logits_of(hidden, part), -jnp.inf)
        top = jnp.maximum(sums.top, logits.max(-1))
        above, scale = logits - top[..., None], jnp.exp(sums.top - top)
        share, distance = jnp.exp(above), None
        if static.entropy:
            moved = jnp.where(sums.total > 0, sums.total * (sums.top - top), 0)
            distance = scale * (sums.distance + moved)
            distance += (share * jnp.where(fresh, above, 0)).sum(-1)
        total = sums.total * scale + share.sum(-1)
        return _Sums(top, total, distance), logits if kept else None

    zero = jnp.zeros(targets.shape, jnp.float32)
    none = _Sums(jnp.full(targets.shape, -jnp.inf), zero, zero if static.entropy else None)
    sums, logits = over_parts(one, none, head, static.parts)
    log_total = jnp.log(sums.total)
    logsumexp = sums.top + log_total
    entropy = log_total - sums.distance / sums.total if static.entropy else None
    found = _Found(logit_of_target(hidden, head, targets) - logsumexp, entropy)
    return found, (hidden, weight, bias, targets, logsumexp, entropy, logits)


def _backward(static: _Static, saved, cotangent: _Found):
    """The gradient of the logits, a part of the vocabulary at a time, and through the head."""
    hidden, weight, bias, targets, logsumexp, entropy, kept = saved
    head = Head(weight.astype(hidden.dtype), bias, *static.shaping)
    pull = partial(_pull, hidden, targets, logsumexp, entropy, cotangent)
    d_hidden, *d_head = pulled_over_parts(pull, hidden, head, static.parts, kept)
    d_weight, d_bias = jax.tree.map(lambda d, x: d.astype(x.dtype), tuple(d_head), (weight, bias))
    return d_hidden.astype(hidden.dtype), d_weight, d_bias, None


def _pull(hidden, targets, logsumexp, entropy, cotangent: _Found, head: Head, ids: Ids, logits):
    """Float32 gradients of `hidden` and of the part of the vocabulary that `head` holds.

    With log p = logits - logsumexp, d logprob / d logits = one-hot target - p, and
    d entropy / d logits = -p (log p + entropy).
    """
    logits = logits_of(hidden, head) if logits is None else logits
    number, fresh = (x[_leading(targets)] for x in ids)
    log_p = logits - logsumexp[..., None]
    p = jnp.exp(log_p)
    dz = cotangent.logprob[..., None] * ((targets[..., None] == number) - p)
    if entropy is not None:
        dz = dz - cotangent.entropy[..., None] * p * (log_p + entropy[..., None])
    if head.softcap is not None:
        dz = dz * (1 - (logits / head.softcap) ** 2)
    dz = jnp.where(fresh, dz, 0)
    d_bias = None if head.bias is None else jnp.sum(dz, axis=range(dz.ndim - 1))
    dz = (dz if head.scale is None else dz * head.scale).astype(hidden.dtype)
    d_hidden = jnp.einsum("...v,vd->...d", dz, head.weight, preferred_element_type=jnp.float32)
    flat = lambda a: a.reshape(-1, a.shape[-1])
    return d_hidden, weight_gradient(flat(dz), flat(hidden)), d_bias


_found.defvjp(_forward, _backward)
