"""Log-probabilities of given tokens without ever holding the logits of a whole batch.

`token_logprobs` is the only path from hidden states to log-probs: the policy, the reference,
evaluation and rewards all use it. It applies the head to the scored tokens only, in as many chunks
as memory asks for, and in float32 from the logits on. `token_logprobs_plain` is its twin for tests.
"""

from __future__ import annotations

import math
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array


class Head(NamedTuple):
    """A language-model head: logits = softcap(scale * (hidden @ weight.T) + bias).

    weight: [vocabulary, width]; bias: [vocabulary] or None; scale and softcap: numbers or None
    (softcap c maps a logit z to c * tanh(z / c)).
    """

    weight: Array
    bias: Array | None = None
    scale: float | None = None
    softcap: float | None = None


class TokenStatistics(NamedTuple):
    """Of the next-token distribution p at each scored token; arrays have the targets' shape.

    Training fills in what its objective reads, evaluation everything but `kl`.
    """

    logprob: Array  # of the target, nats
    entropy: Array | None = None  # nats
    mean_logit: Array | None = None  # over the vocabulary
    correct: Array | None = None  # 1.0 where the target is the most probable token
    log_collision: Array | None = None  # log sum_v p_v^2, nats
    kl: Array | None = None  # KL(reference || p), nats


def logits_of(hidden: Array, head: Head) -> Array:
    """Float32 logits [..., vocabulary] of hidden states [..., width]."""
    weight = head.weight.astype(hidden.dtype)
    z = jnp.einsum("...d,vd->...v", hidden, weight, preferred_element_type=jnp.float32)
    bias = None if head.bias is None else head.bias[(None,) * (z.ndim - 1)]
    return _shape_logits(z, head, bias)


def token_logprobs_plain(hidden: Array, head: Head, targets: Array) -> Array:
    """What `token_logprobs` computes, through the full logits: for tests and small inputs."""
    logprobs = jax.nn.log_softmax(logits_of(hidden, head), axis=-1)
    return jnp.take_along_axis(logprobs, targets[..., None], axis=-1)[..., 0]


def token_logprobs(hidden: Array, head: Head, targets: Array, *, max_logits: int = 2**25) -> Array:
    """log p(target | hidden) in nats, float32.

    Forward, it is the target's logit (a dot product, not a gather from all logits) minus the
    logsumexp. If all logits fit into `max_logits` they are kept for the backward pass; otherwise
    the tokens are walked in chunks that fit, and each chunk's logits are computed again backward.

    Args:
      hidden: [..., tokens, width], any float dtype; products run in it, sums in float32.
      head: the language-model head; a float32 master weight is cast to hidden's dtype here.
      targets: [..., tokens], int.
      max_logits: how many float32 logits may exist at once.

    Returns:
      [..., tokens].
    """
    chunks = _chunks(targets, head, max_logits)
    hidden, wanted = _split(hidden, chunks, axis=targets.ndim - 1), _split(targets, chunks)
    static = (head.scale, head.softcap)
    return _join(_logprobs(static, hidden, head.weight, head.bias, wanted), targets.shape[-1])


def token_statistics(
    hidden: Array, head: Head, targets: Array, *, max_logits: int = 2**25
) -> TokenStatistics:
    """All but the KL of `TokenStatistics` of each target; shapes as `token_logprobs`.

    For evaluation: meant to be called without differentiation.
    """

    def one(part):
        logits = logits_of(part[0], head)
        logprobs = jax.nn.log_softmax(logits, axis=-1)
        target = jnp.take_along_axis(logprobs, part[1][..., None], axis=-1)[..., 0]
        return TokenStatistics(
            target,
            -jnp.sum(jnp.exp(logprobs) * logprobs, axis=-1),
            jnp.mean(logits, axis=-1),
            (jnp.argmax(logits, axis=-1) == part[1]).astype(jnp.float32),
            jax.nn.logsumexp(2 * logprobs, axis=-1),
        )

    return _by_chunks(one, (hidden, targets), targets, head, max_logits)


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


def _shape_logits(z: Array, head: Head, bias: Array | None) -> Array:
    z = z if head.scale is None else z * head.scale
    z = z if bias is None else z + bias.astype(jnp.float32)
    return z if head.softcap is None else head.softcap * jnp.tanh(z / head.softcap)


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _logprobs(static, hidden, weight, bias, targets):
    return _forward(static, hidden, weight, bias, targets)[0]


def _forward(static, hidden, weight, bias, targets):
    """hidden [chunks, ..., tokens, width], targets [chunks, ..., tokens]; one log-prob a target."""
    head = Head(weight.astype(hidden.dtype), bias, *static)

    def one(part):
        h, target = part
        logits = logits_of(h, head)
        z = jnp.einsum("...d,...d->...", h, head.weight[target], preferred_element_type=jnp.float32)
        z = _shape_logits(z, head, None if bias is None else bias[target])
        logsumexp = jax.nn.logsumexp(logits, axis=-1)
        return z - logsumexp, logsumexp, logits if len(targets) == 1 else None

    logprobs, logsumexp, logits = _walk(one, (hidden, targets))
    return logprobs, (hidden, weight, bias, targets, logsumexp, logits)


def _backward(static, saved, cotangent):
    """d logits = cotangent (one-hot target - softmax), for a part of the vocabulary at a time.

    The gradient of a part of the head is then final, and written once: over tokens it would have to
    be added up, and between devices at every turn. Parts are taken in strides, so that each has the
    same share of every device's vocabulary.
    """
    hidden, weight, bias, targets, logsumexp, kept = saved
    head = Head(weight.astype(hidden.dtype), bias, *static)
    if kept is not None:
        hidden, targets, logsumexp, cotangent, kept = (
            x[0] for x in (hidden, targets, logsumexp, cotangent, kept)
        )
        every = jnp.arange(len(weight))
        d_hidden, *d_head = _pull(head, hidden, targets, logsumexp, cotangent, every, kept)
        d_hidden = d_hidden[None]
    else:
        tokens = (targets, logsumexp, cotangent)
        whole = [_join(x) for x in tokens]
        d_hidden, *d_head = _pull_by_parts(head, _join(hidden, axis=-2), *whole, len(targets))
        d_hidden = _split(d_hidden, len(targets), axis=-2)
    d_weight, d_bias = jax.tree.map(lambda d, x: d.astype(x.dtype), tuple(d_head), (weight, bias))
    return d_hidden.astype(hidden.dtype), d_weight, d_bias, None


def _pull(head: Head, hidden, targets, logsumexp, cotangent, ids, logits=None):
    """Float32 gradients of `hidden` and of the part of the vocabulary `ids` that `head` holds.

    An id of -1 is padding: no token, whose logit means nothing.
    """
    logits = logits_of(hidden, head) if logits is None else logits
    ids = ids[(None,) * targets.ndim]
    probability = jnp.where(ids < 0, 0, jnp.exp(logits - logsumexp[..., None]))
    dz = cotangent[..., None] * ((targets[..., None] == ids) - probability)
    if head.softcap is not None:
        dz = dz * (1 - (logits / head.softcap) ** 2)
    d_bias = None if head.bias is None else jnp.sum(dz, axis=range(dz.ndim - 1))
    dz = (dz if head.scale is None else dz * head.scale).astype(hidden.dtype)
    d_hidden = jnp.einsum("...v,vd->...d", dz, head.weight, preferred_element_type=jnp.float32)
    flat = lambda a: a.reshape(-1, a.shape[-1])
    return d_hidden, weight_gradient(flat(dz), flat(hidden)), d_bias


def _pull_by_parts(head: Head, hidden, targets, logsumexp, cotangent, parts: int):
    """`_pull` of the whole vocabulary in so many parts: ids j, j + parts, j + 2 parts, ..."""
    vocabulary = len(head.weight)
    size = -(-vocabulary // parts)
    size += -size % 128  # of which any usual number of devices takes an equal share
    parts = -(-vocabulary // size)
    padded = lambda x: jnp.pad(x, [(0, parts * size - vocabulary)] + [(0, 0)] * (x.ndim - 1))
    strided = lambda x: padded(x).reshape(size, parts, *x.shape[1:])
    weight, bias = jax.tree.map(strided, (head.weight, head.bias))
    take = lambda x, j: jax.lax.dynamic_index_in_dim(x, j, axis=1, keepdims=False)
    put = lambda xs, x, j: jax.lax.dynamic_update_index_in_dim(xs, x, j, axis=1)

    def one(j, carried):
        d_hidden, *d_head = carried
        part = Head(take(weight, j), None if bias is None else take(bias, j), *head[2:])
        ids = jnp.arange(size) * parts + j
        ids = jnp.where(ids < vocabulary, ids, -1)
        more, *own = _pull(part, hidden, targets, logsumexp, cotangent, ids)
        d_head = jax.tree.map(lambda xs, x: put(xs, x, j), tuple(d_head), tuple(own))
        return d_hidden + more, *d_head

    zeros = lambda x: jnp.zeros(x.shape, jnp.float32)
    carried = jax.tree.map(zeros, (hidden, weight, bias))
    d_hidden, *d_head = jax.lax.fori_loop(0, parts, one, carried)
    joined = lambda x: x.reshape(size * parts, *x.shape[2:])[:vocabulary]
    return d_hidden, *jax.tree.map(joined, tuple(d_head))


def _walk(one, parts):
    """lax.map, but without a loop around a single chunk."""
    if len(parts[0]) > 1:
        return jax.lax.map(one, parts)
    return jax.tree.map(lambda x: x[None], one(jax.tree.map(lambda x: x[0], parts)))


_logprobs.defvjp(_forward, _backward)
