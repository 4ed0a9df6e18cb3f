"""A language-model head, applied to its whole vocabulary or to a part of it at a time."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array
from jax.sharding import AbstractMesh, Mesh, PartitionSpec

CACHED = 2**21  # float32 logits of a part that stay in a CPU's caches
NARROWEST = 1024  # tokens of the vocabulary in such a part: thinner products are slower
ALIGNED = 128  # of such sizes any usual number of devices takes an equal share


class Head(NamedTuple):
    """A language-model head: logits = softcap(scale * (hidden @ weight.T) + bias).

    weight: [vocabulary, width]; bias: [vocabulary] or None; scale and softcap: numbers or None
    (softcap c maps a logit z to c * tanh(z / c)).
    """

    weight: Array
    bias: Array | None = None
    scale: float | None = None
    softcap: float | None = None


class Parts(NamedTuple):
    """How a vocabulary is walked, a part of equal size at a time.

    A part is a stretch, the last of which repeats some of the one before; or, where the vocabulary
    is divided among devices, every count-th token, so that each part has the same share of every
    device's.
    """

    count: int
    size: int
    strided: bool


class Ids(NamedTuple):
    """The tokens of a part: their numbers, and whether they stand in no other; [size] each."""

    number: Array
    fresh: Array


def logits_of(hidden: Array, head: Head) -> Array:
    """Float32 logits [..., vocabulary] of hidden states [..., width]."""
    weight = head.weight.astype(hidden.dtype)
    z = jnp.einsum("...d,vd->...v", hidden, weight, preferred_element_type=jnp.float32)
    bias = None if head.bias is None else head.bias[(None,) * (z.ndim - 1)]
    return _shape_logits(z, head, bias)


def logit_of_target(hidden: Array, head: Head, targets: Array) -> Array:
    """Each target's own logit, [..., tokens], of hidden states [..., tokens, width]; float32."""
    own = head.weight[targets]
    z = jnp.einsum("...d,...d->...", hidden, own, preferred_element_type=jnp.float32)
    return _shape_logits(z, head, None if head.bias is None else head.bias[targets])


def parts_of(
    tokens: int, vocabulary: int, max_logits: int, mesh: Mesh | AbstractMesh | None = None
) -> Parts:
    """As few parts as memory and, on a CPU, its cache ask for.

    A part has at most `max_logits` logits of all tokens, but where it is strided its size is
    rounded up to a multiple of 128. The mesh, by default the ambient one, says on what the program
    will run; without one it is jax's default backend.
    """
    mesh = jax.sharding.get_abstract_mesh() if mesh is None else mesh.abstract_mesh
    tokens = max(1, tokens)
    size = max(1, min(vocabulary, int(_most_of_a_part(tokens, max_logits, mesh) // tokens)))
    strided = size < vocabulary and mesh.shape.get("tensor", 1) > 1
    if strided:
        size = min(vocabulary, size + -size % ALIGNED)
    count = -(-vocabulary // size)
    return Parts(count, size if strided else -(-vocabulary // count), strided)


def over_parts(function: Callable, carried, head: Head, parts: Parts, given=None):
    """(carried, part of the head, its ids, given[part]) -> (carried, more), over all parts.

    `more` comes out stacked; there is no loop around a single part.
    """
    vocabulary = len(head.weight)
    if parts.count == 1:
        every = Ids(jnp.arange(vocabulary), jnp.ones(vocabulary, bool))
        first = jax.tree.map(lambda x: x[0], given)
        carried, more = function(carried, head, every, first)
        return carried, jax.tree.map(lambda x: x[None], more)
    weight, bias = jax.tree.map(partial(_view, parts), (_whole_width(head.weight), head.bias))

    def one(carried, index_and_given):
        j, own = index_and_given
        take = partial(_take, parts, j, vocabulary)
        part = Head(take(weight), None if bias is None else take(bias), *head[2:])
        return function(carried, part, _ids(parts, j, vocabulary), own)

    return jax.lax.scan(one, carried, (jnp.arange(parts.count), given))


def pulled_over_parts(pull: Callable, hidden: Array, head: Head, parts: Parts, given=None):
    """Gradients of hidden states, weight and bias (or None), float32.

    (part of the head, its ids, given[part]) -> gradients of `hidden`, and of the part's weight and
    bias. Those of a part are final, and written once: over tokens they would have to be added up,
    and between devices at every turn.
    """
    vocabulary = len(head.weight)
    if parts.count == 1:
        _, found = over_parts(lambda _, *part: ((), pull(*part)), (), head, parts, given)
        return jax.tree.map(lambda x: x[0], found)

    def one(carried, part: Head, ids: Ids, index_and_given):
        j, own = index_and_given
        d_hidden, *d_head = carried
        more, *d_part = pull(part, ids, own)
        add = partial(_add, parts, j, vocabulary)
        return (d_hidden + more, *jax.tree.map(add, tuple(d_head), tuple(d_part))), None

    zeros = lambda x: jnp.zeros(x.shape, jnp.float32)
    d_head = jax.tree.map(lambda x: _view(parts, zeros(x)), (head.weight, head.bias))
    given = jnp.arange(parts.count), given
    (d_hidden, *d_head), _ = over_parts(one, (zeros(hidden), *d_head), head, parts, given)
    if parts.strided:
        whole = lambda x: x.reshape(-1, *x.shape[2:])[:vocabulary]
        d_head = jax.tree.map(whole, d_head)
    return d_hidden, *d_head


def _most_of_a_part(tokens: int, max_logits: int, mesh: AbstractMesh) -> int:
    device = None if mesh.empty else mesh.abstract_device
    platform = jax.default_backend() if device is None else device.platform
    sharing = math.prod(n for axis, n in mesh.shape.items() if axis != "sweep")
    if platform != "cpu" or sharing > 1:
        return max_logits
    return min(max_logits, max(CACHED, NARROWEST * tokens))


def _whole_width(weight: Array) -> Array:
    """Gathered over `fsdp` where that divides it: in a loop that would be done in every turn."""
    if jax.sharding.get_abstract_mesh().shape.get("fsdp", 1) == 1:
        return weight
    spec = PartitionSpec(PartitionSpec.UNCONSTRAINED, None)
    return jax.lax.with_sharding_constraint(weight, spec)


def _shape_logits(z: Array, head: Head, bias: Array | None) -> Array:
    z = z if head.scale is None else z * head.scale
    z = z if bias is None else z + bias.astype(jnp.float32)
    return z if head.softcap is None else head.softcap * jnp.tanh(z / head.softcap)


def _ids(parts: Parts, j: Array, vocabulary: int) -> Ids:
    within = jnp.arange(parts.size)
    if parts.strided:
        number = within * parts.count + j
        return Ids(number, number < vocabulary)
    number = _start(parts, j, vocabulary) + within
    return Ids(number, number >= j * parts.size)


def _start(parts: Parts, j: Array, vocabulary: int) -> Array:
    return jnp.minimum(j * parts.size, vocabulary - parts.size)


def _view(parts: Parts, x: Array) -> Array:
    """What `_take` takes parts of: [vocabulary, ...], or [size, count, ...] of a padded one."""
    if not parts.strided:
        return x
    padding = [(0, parts.size * parts.count - len(x))] + [(0, 0)] * (x.ndim - 1)
    return jnp.pad(x, padding).reshape(parts.size, parts.count, *x.shape[1:])


def _take(parts: Parts, j: Array, vocabulary: int, x: Array) -> Array:
    if parts.strided:
        return jax.lax.dynamic_index_in_dim(x, j, axis=1, keepdims=False)
    return jax.lax.dynamic_slice_in_dim(x, _start(parts, j, vocabulary), parts.size)


def _add(parts: Parts, j: Array, vocabulary: int, xs: Array, x: Array) -> Array:
    """The view `xs` with `x` added to one of its parts."""
    if parts.strided:
        return jax.lax.dynamic_update_index_in_dim(xs, x, j, axis=1)
    x = x + _take(parts, j, vocabulary, xs)  # not zero where the last part repeats the one before
    return jax.lax.dynamic_update_slice_in_dim(xs, x, _start(parts, j, vocabulary), axis=0)
