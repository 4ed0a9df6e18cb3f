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

CACHED = 2**21  # float32 logits of a part that stay in a CPU's caches
NARROWEST = 1024  # tokens of the vocabulary in such a part: thinner products are slower


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
    correct: Array | None = None  # 1.0 where no token is more probable than the target
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
    logsumexp, which is gathered over parts of the vocabulary (Milakov and Gimelshein 2018,
    algorithm 3). If all logits fit into `max_logits` they are kept for the backward pass; otherwise
    each part's are computed again.

    Args:
      hidden: [..., tokens, width], any float dtype; products run in it, sums in float32.
      head: the language-model head; a float32 master weight is cast to hidden's dtype here.
      targets: [..., tokens], int.
      max_logits: how many float32 logits may exist at once. On a CPU a part has fewer: what stays
        in its cache.

    Returns:
      [..., tokens].
    """
    static = head.scale, head.softcap, _parts(targets, head, max_logits), max_logits
    return _logprobs(static, hidden, head.weight, head.bias, targets)


def token_statistics(
    hidden: Array, head: Head, targets: Array, *, max_logits: int = 2**25
) -> TokenStatistics:
    """All but the KL of `TokenStatistics` of each target; shapes as `token_logprobs`.

    For evaluation: meant to be called without differentiation.
    """
    parts = _parts(targets, head, max_logits)
    head = head._replace(weight=head.weight.astype(hidden.dtype))

    def one(sums: _Moments, part: Head, ids: _Ids, _) -> tuple[_Moments, None]:
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
    sums, _ = _over_parts(one, none, head, parts)
    log_total = jnp.log(sums.total)
    return TokenStatistics(
        _logit_of_target(hidden, head, targets) - (sums.top + log_total),
        log_total - sums.distance / sums.total,
        sums.logits / len(head.weight),
        (sums.target >= sums.top).astype(jnp.float32),
        jnp.log(sums.squares) - 2 * log_total,
    )


def logits_at_once(tokens: int, vocabulary: int, *, max_logits: int, devices: int = 1) -> int:
    """How many float32 numbers `token_logprobs` holds in the place of logits, on all devices.

    Those that it keeps, if it does, and those of a part under way, with their gradient.
    """
    every = tokens * vocabulary
    part = min(every, _most_of_a_part(tokens, max_logits, devices))
    return part + (every if every <= max_logits else part)


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


def _shape_logits(z: Array, head: Head, bias: Array | None) -> Array:
    z = z if head.scale is None else z * head.scale
    z = z if bias is None else z + bias.astype(jnp.float32)
    return z if head.softcap is None else head.softcap * jnp.tanh(z / head.softcap)


class _Parts(NamedTuple):
    """How a vocabulary is walked, a part of equal size at a time.

    A part is a stretch, the last of which repeats some of the one before; or, where the vocabulary
    is divided among devices, every count-th token, so that each part has the same share of every
    device's.
    """

    count: int
    size: int
    strided: bool


class _Ids(NamedTuple):
    """The tokens of a part: their numbers, and whether they stand in no other; [size] each."""

    number: Array
    fresh: Array


class _Moments(NamedTuple):
    """Sums over the vocabulary as far as it was walked, of logits z and their largest, `top`."""

    top: Array
    total: Array  # of exp(z - top)
    distance: Array  # of exp(z - top) (z - top)
    squares: Array  # of exp(2 (z - top))
    logits: Array
    target: Array  # the target's logit


def _parts(targets: Array, head: Head, max_logits: int) -> _Parts:
    """As few parts as memory and, on a CPU, its cache ask for."""
    mesh, vocabulary = jax.sharding.get_abstract_mesh(), len(head.weight)
    tokens = max(1, math.prod(targets.shape))
    most = _most_of_a_part(tokens, max_logits, 1 if mesh.empty else mesh.size)
    size = max(1, min(vocabulary, int(most // tokens)))
    strided = size < vocabulary and mesh.shape.get("tensor", 1) > 1
    if strided:
        size += -size % 128  # of which any usual number of devices takes an equal share
    count = -(-vocabulary // size)
    return _Parts(count, size if strided else -(-vocabulary // count), strided)


def _most_of_a_part(tokens: int, max_logits: int, devices: int) -> int:
    if devices > 1 or jax.default_backend() != "cpu":
        return max_logits
    return min(max_logits, max(CACHED, NARROWEST * tokens))


def _over_parts(function, carried, head: Head, parts: _Parts, given=None):
    """(carried, part of the head, its ids, given[part]) -> (carried, more), over all parts.

    `more` comes out stacked; there is no loop around a single part.
    """
    vocabulary = len(head.weight)
    if parts.count == 1:
        every = _Ids(jnp.arange(vocabulary), jnp.ones(vocabulary, bool))
        first = jax.tree.map(lambda x: x[0], given)
        carried, more = function(carried, head, every, first)
        return carried, jax.tree.map(lambda x: x[None], more)
    weight, bias = jax.tree.map(partial(_view, parts), (head.weight, head.bias))

    def one(carried, index_and_given):
        j, own = index_and_given
        take = partial(_take, parts, j, vocabulary)
        part = Head(take(weight), None if bias is None else take(bias), *head[2:])
        return function(carried, part, _ids(parts, j, vocabulary), own)

    return jax.lax.scan(one, carried, (jnp.arange(parts.count), given))


def _ids(parts: _Parts, j: Array, vocabulary: int) -> _Ids:
    within = jnp.arange(parts.size)
    if parts.strided:
        number = within * parts.count + j
        return _Ids(number, number < vocabulary)
    number = _start(parts, j, vocabulary) + within
    return _Ids(number, number >= j * parts.size)


def _start(parts: _Parts, j: Array, vocabulary: int) -> Array:
    return jnp.minimum(j * parts.size, vocabulary - parts.size)


def _view(parts: _Parts, x: Array) -> Array:
    """What `_take` takes parts of: [vocabulary, ...], or [size, count, ...] of a padded one."""
    if not parts.strided:
        return x
    padding = [(0, parts.size * parts.count - len(x))] + [(0, 0)] * (x.ndim - 1)
    return jnp.pad(x, padding).reshape(parts.size, parts.count, *x.shape[1:])


def _take(parts: _Parts, j: Array, vocabulary: int, x: Array) -> Array:
    if parts.strided:
        return jax.lax.dynamic_index_in_dim(x, j, axis=1, keepdims=False)
    return jax.lax.dynamic_slice_in_dim(x, _start(parts, j, vocabulary), parts.size)


def _add(parts: _Parts, j: Array, vocabulary: int, xs: Array, x: Array) -> Array:
    """The view `xs` with `x` added to one of its parts."""
    if parts.strided:
        return jax.lax.dynamic_update_index_in_dim(xs, x, j, axis=1)
    x = x + _take(parts, j, vocabulary, xs)  # not zero where the last part repeats the one before
    return jax.lax.dynamic_update_slice_in_dim(xs, x, _start(parts, j, vocabulary), axis=0)


def _leading(targets: Array) -> tuple:
    return (None,) * targets.ndim


def _logit_of_target(hidden: Array, head: Head, targets: Array) -> Array:
    own = head.weight[targets]
    z = jnp.einsum("...d,...d->...", hidden, own, preferred_element_type=jnp.float32)
    return _shape_logits(z, head, None if head.bias is None else head.bias[targets])


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _logprobs(static, hidden, weight, bias, targets):
    return _forward(static, hidden, weight, bias, targets)[0]


def _forward(static, hidden, weight, bias, targets):
    """hidden [..., tokens, width], targets [..., tokens]; one log-prob a target."""
    *shaping, parts, max_logits = static
    head = Head(weight.astype(hidden.dtype), bias, *shaping)
    kept = parts.count == 1 or math.prod(targets.shape) * len(weight) <= max_logits

    def one(carried, part: Head, ids: _Ids, _):
        top, total = carried
        logits = jnp.where(ids.fresh[_leading(targets)], logits_of(hidden, part), -jnp.inf)
        higher = jnp.maximum(top, logits.max(-1))
        total = total * jnp.exp(top - higher) + jnp.exp(logits - higher[..., None]).sum(-1)
        return (higher, total), logits if kept else None

    none = jnp.full(targets.shape, -jnp.inf), jnp.zeros(targets.shape, jnp.float32)
    (top, total), logits = _over_parts(one, none, head, parts)
    logsumexp = top + jnp.log(total)
    found = _logit_of_target(hidden, head, targets) - logsumexp
    return found, (hidden, weight, bias, targets, logsumexp, logits)


def _backward(static, saved, cotangent):
    """d logits = cotangent (one-hot target - softmax), for a part of the vocabulary at a time.

    The gradient of a part of the head is then final, and written once: over tokens it would have to
    be added up, and between devices at every turn.
    """
    hidden, weight, bias, targets, logsumexp, kept = saved
    *shaping, parts, _ = static
    head = Head(weight.astype(hidden.dtype), bias, *shaping)
    pull = partial(_pull, hidden, targets, logsumexp, cotangent)
    if parts.count == 1:
        _, found = _over_parts(lambda _, *part: ((), pull(*part)), (), head, parts, kept)
        d_hidden, *d_head = jax.tree.map(lambda x: x[0], found)
    else:

        def one(carried, part: Head, ids: _Ids, index_and_logits):
            j, logits = index_and_logits
            d_hidden, *d_head = carried
            more, *own = pull(part, ids, logits)
            add = partial(_add, parts, j, len(weight))
            return (d_hidden + more, *jax.tree.map(add, tuple(d_head), tuple(own))), None

        zeros = lambda x: jnp.zeros(x.shape, jnp.float32)
        d_head = jax.tree.map(lambda x: _view(parts, zeros(x)), (weight, bias))
        given = jnp.arange(parts.count), kept
        (d_hidden, *d_head), _ = _over_parts(one, (zeros(hidden), *d_head), head, parts, given)
        if parts.strided:
            whole = lambda x: x.reshape(-1, *x.shape[2:])[: len(weight)]
            d_head = jax.tree.map(whole, d_head)
    d_weight, d_bias = jax.tree.map(lambda d, x: d.astype(x.dtype), tuple(d_head), (weight, bias))
    return d_hidden.astype(hidden.dtype), d_weight, d_bias, None


def _pull(hidden, targets, logsumexp, cotangent, head: Head, ids: _Ids, logits=None):
    """Float32 gradients of `hidden` and of the part of the vocabulary that `head` holds."""
    logits = logits_of(hidden, head) if logits is None else logits
    number, fresh = (x[_leading(targets)] for x in ids)
    dz = cotangent[..., None] * (
        (targets[..., None] == number) - jnp.exp(logits - logsumexp[..., None])
    )
    if head.softcap is not None:
        dz = dz * (1 - (logits / head.softcap) ** 2)
    dz = jnp.where(fresh, dz, 0)
    d_bias = None if head.bias is None else jnp.sum(dz, axis=range(dz.ndim - 1))
    dz = (dz if head.scale is None else dz * head.scale).astype(hidden.dtype)
    d_hidden = jnp.einsum("...v,vd->...d", dz, head.weight, preferred_element_type=jnp.float32)
    flat = lambda a: a.reshape(-1, a.shape[-1])
    return d_hidden, weight_gradient(flat(dz), flat(hidden)), d_bias


_logprobs.defvjp(_forward, _backward)
