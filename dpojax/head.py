"""A language-model head, applied to the whole vocabulary or to one chunk of it at a time.

Shapes in comments: T scored tokens, behind any leading axes; D width of the model; V vocabulary;
C tokens of the vocabulary in one chunk.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array
from jax.sharding import AbstractMesh, Mesh, PartitionSpec

from dpojax.mesh_axes import shared_axes

CPU_CACHE_LOGITS = 2**21  # float32 logits of one chunk that stay in a CPU's caches
MIN_CPU_CHUNK = 1024  # smallest chunk on a CPU: thinner matrix products are slower
CHUNK_MULTIPLE = 128  # any usual number of devices divides this, so each takes an equal share


class Head(NamedTuple):
    """A language-model head: logits = softcap(scale * (hidden @ weight.T) + bias).

    It is the last matrix product of a model: `weight` [V, D] has one row for each token of the
    vocabulary, and `hidden` is what the model multiplies with it, behind the final norm. `softcap`
    c maps a logit z to c * tanh(z / c). `scale` and `softcap` are Python numbers.

    Where the weight is:

    - Flax NNX: `Head(model.lm_head.kernel[...].T)`, as the kernel of a Linear is [D, V]; tied, the
      embedding `Head(model.embed.embedding[...])`.
    - Flax Linen: `Head(params["lm_head"]["kernel"].T)`; tied, `Head(params["embed"]["embedding"])`.
    - Hugging Face: `lm_head.weight` as it is, as torch keeps [V, D]; where the file has none, the
      head is tied to the embedding (`model.embed_tokens.weight`, of GPT-2 `wte.weight`).

    Make it inside of the function that is differentiated: then the weight gets its gradient.

    >>> kernel = jax.random.normal(jax.random.key(0), (16, 8))  # [D, V], of nnx.Linear or nn.Dense
    >>> hidden = jax.random.normal(jax.random.key(1), (2, 4, 16))  # [B, T, D]
    >>> bool(jnp.allclose(logits_of(hidden, Head(kernel.T)), hidden @ kernel, atol=1e-5))
    True
    """

    weight: Array  # [V, D]
    bias: Array | None = None  # [V]
    scale: float | None = None
    softcap: float | None = None


class VocabularyChunks(NamedTuple):
    """How a vocabulary is cut into `count` chunks of `size` tokens each.

    Contiguous chunks: chunk j starts at token j * size. The last one starts earlier where the sizes
    do not divide, so it repeats tokens of the chunk before it.

    Strided chunks, where devices share the vocabulary: chunk j holds the tokens j, j + count,
    j + 2 * count, ... So every chunk takes the same share from each device. The last entries of a
    chunk may lie beyond the vocabulary.
    """

    count: int
    size: int
    strided: bool


class ChunkTokens(NamedTuple):
    """Which tokens of the vocabulary a chunk holds, [C] each."""

    ids: Array
    counted: Array  # False: a repeated token, or one beyond the vocabulary; it must not count


def logits_of(hidden: Array, head: Head) -> Array:
    """Compute the logits [..., V] of hidden states [..., D], in `sum_dtype(hidden)`."""
    weight, dtype = head.weight.astype(hidden.dtype), sum_dtype(hidden)
    logits = jnp.einsum("...d,vd->...v", hidden, weight, preferred_element_type=dtype)
    bias = None if head.bias is None else head.bias[(None,) * (logits.ndim - 1)]
    return _shape_logits(logits, head, bias)


def sum_dtype(x: Array) -> jnp.dtype:
    """The dtype of sums of products with `x`: float32, or float64 where `x` is of that."""
    return jnp.promote_types(x.dtype, jnp.float32)


def target_logits(hidden: Array, head: Head, targets: Array) -> Array:
    """Compute the logit of each target alone, in `sum_dtype(hidden)`.

    This is one dot product per token. The logits of the other tokens are never computed.

    Args:
      hidden: [..., T, D].
      head: the language-model head.
      targets: [..., T], token ids.

    Returns:
      [..., T].
    """
    target_weight = gather_width(head.weight)[targets]  # [..., T, D]
    dtype = sum_dtype(hidden)
    logits = jnp.einsum("...d,...d->...", hidden, target_weight, preferred_element_type=dtype)
    return _shape_logits(logits, head, None if head.bias is None else head.bias[targets])


def vocabulary_chunks(
    tokens: int, vocabulary: int, max_logits: int, mesh: Mesh | AbstractMesh | None = None
) -> VocabularyChunks:
    """Choose as few chunks as the memory limit and, on a CPU, its cache allow.

    A chunk has at most `max_logits` logits of all tokens together. A strided chunk may have more:
    its size is rounded up to a multiple of 128.

    Args:
      tokens: scored tokens, of all leading axes together.
      vocabulary: size of the vocabulary.
      max_logits: how many float32 logits of one chunk may exist at once.
      mesh: where the program will run: the ambient mesh by default; without one, JAX's default
        backend.
    """
    mesh = jax.sharding.get_abstract_mesh() if mesh is None else mesh.abstract_mesh
    tokens = max(1, tokens)
    size = max(1, min(vocabulary, int(_chunk_logits(tokens, max_logits, mesh) // tokens)))
    strided = size < vocabulary and shared_axes(mesh).get("tensor", 1) > 1
    if strided:
        size = min(vocabulary, size + -size % CHUNK_MULTIPLE)
    count = -(-vocabulary // size)
    return VocabularyChunks(count, size if strided else -(-vocabulary // count), strided)


def scan_vocabulary(function: Callable, carry, head: Head, chunks: VocabularyChunks, inputs=None):
    """Scan `function` over the chunks of a head, as `jax.lax.scan` does.

    A single chunk is computed without a loop.

    Args:
      function: (carry, head of the chunk, its ChunkTokens, inputs[chunk]) -> (carry, output).
      carry: the first carry.
      head: the whole head.
      chunks: how it is cut.
      inputs: arrays with a leading axis of chunks, or None.

    Returns:
      The last carry, and the outputs, stacked over chunks.
    """
    vocabulary = len(head.weight)
    if chunks.count == 1:
        every_token = ChunkTokens(jnp.arange(vocabulary), jnp.ones(vocabulary, bool))
        head = head._replace(weight=gather_width(head.weight))
        carry, output = function(carry, head, every_token, jax.tree.map(lambda x: x[0], inputs))
        return carry, jax.tree.map(lambda x: x[None], output)
    weight = _chunk_view(chunks, gather_width(head.weight))
    bias = None if head.bias is None else _chunk_view(chunks, head.bias)

    def scan_body(carry, index_and_input):
        j, chunk_input = index_and_input
        chunk_head = head._replace(
            weight=_take_chunk(chunks, j, vocabulary, weight),
            bias=None if bias is None else _take_chunk(chunks, j, vocabulary, bias),
        )
        return function(carry, chunk_head, _chunk_tokens(chunks, j, vocabulary), chunk_input)

    return jax.lax.scan(scan_body, carry, (jnp.arange(chunks.count), inputs))


def scan_vocabulary_gradients(
    pull: Callable, hidden: Array, head: Head, chunks: VocabularyChunks, inputs=None
):
    """Sum gradients over the chunks of a head.

    The loop runs over the vocabulary, not over tokens. So the gradient of each chunk of the head is
    final and written once. A loop over tokens would add to the whole head's gradient, and devices
    would have to exchange it, in every turn.

    Args:
      pull: (head of the chunk, its ChunkTokens, inputs[chunk]) -> gradients of `hidden`, and of the
        chunk's weight and bias (None without a bias), in `sum_dtype(hidden)`.
      hidden: [..., T, D].
      head: the whole head.
      chunks: how it is cut.
      inputs: arrays with a leading axis of chunks, or None.

    Returns:
      Gradients of hidden states [..., T, D], weight [V, D], and bias [V] or None, in that dtype.
    """
    vocabulary = len(head.weight)
    if chunks.count == 1:
        _, gradients = scan_vocabulary(
            lambda carry, *chunk: (carry, pull(*chunk)), (), head, chunks, inputs
        )
        return jax.tree.map(lambda x: x[0], gradients)

    def zeros(x: Array) -> Array:
        return jnp.zeros_like(x, sum_dtype(hidden))

    def scan_body(sums, chunk_head: Head, tokens: ChunkTokens, index_and_input):
        j, chunk_input = index_and_input
        d_hidden, *d_head = sums
        more_hidden, *d_chunk = pull(chunk_head, tokens, chunk_input)
        add_chunk = partial(_add_chunk, chunks, j, vocabulary)
        return (
            d_hidden + more_hidden,
            *jax.tree.map(add_chunk, tuple(d_head), tuple(d_chunk)),
        ), None

    d_head = jax.tree.map(lambda x: _chunk_view(chunks, zeros(x)), (head.weight, head.bias))
    sums = zeros(hidden), *d_head
    indexed_inputs = jnp.arange(chunks.count), inputs
    (d_hidden, *d_head), _ = scan_vocabulary(scan_body, sums, head, chunks, indexed_inputs)
    if chunks.strided:  # [size, count, ...] back to [V, ...], without the padding
        d_head = jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:])[:vocabulary], d_head)
    return d_hidden, *d_head


def _chunk_logits(tokens: int, max_logits: int, mesh: AbstractMesh) -> int:
    """How many logits a chunk may have; a lone CPU gets fewer, which stay in its cache."""
    device = None if mesh.empty else mesh.abstract_device
    if device is None:
        platform = jax.default_backend()
    else:
        # Some versions of JAX have no name of the platform here; a CPU's kind is "cpu" in all.
        platform = getattr(device, "platform", device.device_kind)
    # Members of a sweep do not share a model, so that axis does not count.
    devices_of_model = math.prod(n for axis, n in shared_axes(mesh).items() if axis != "sweep")
    if platform != "cpu" or devices_of_model > 1:
        return max_logits
    return min(max_logits, max(CPU_CACHE_LOGITS, MIN_CPU_CHUNK * tokens))


def gather_width(weight: Array) -> Array:
    """Gather the weight over `fsdp` at once.

    Else XLA gathers it in every turn of a loop. Where the axes of the mesh have another order in
    the hidden states, it exchanges parts between devices first, and CPUs that do so beside the
    collectives of the layers wait for each other for ever.
    """
    if shared_axes(jax.sharding.get_abstract_mesh()).get("fsdp", 1) == 1:
        return weight
    spec = PartitionSpec(PartitionSpec.UNCONSTRAINED, None)
    return jax.lax.with_sharding_constraint(weight, spec)


def _shape_logits(logits: Array, head: Head, bias: Array | None) -> Array:
    """Apply scale, bias and softcap, in this order, in the dtype of the logits."""
    logits = logits if head.scale is None else logits * head.scale
    logits = logits if bias is None else logits + bias.astype(logits.dtype)
    return logits if head.softcap is None else head.softcap * jnp.tanh(logits / head.softcap)


def _chunk_tokens(chunks: VocabularyChunks, j: Array, vocabulary: int) -> ChunkTokens:
    within = jnp.arange(chunks.size)
    if chunks.strided:
        ids = within * chunks.count + j
        return ChunkTokens(ids, ids < vocabulary)
    ids = _chunk_start(chunks, j, vocabulary) + within
    return ChunkTokens(ids, ids >= j * chunks.size)


def _chunk_start(chunks: VocabularyChunks, j: Array, vocabulary: int) -> Array:
    return jnp.minimum(j * chunks.size, vocabulary - chunks.size)


def _chunk_view(chunks: VocabularyChunks, x: Array) -> Array:
    """Lay [V, ...] out so that `_take_chunk` can slice it: padded [size, count, ...] if strided."""
    if not chunks.strided:
        return x
    padding = [(0, chunks.size * chunks.count - len(x))] + [(0, 0)] * (x.ndim - 1)
    return jnp.pad(x, padding).reshape(chunks.size, chunks.count, *x.shape[1:])


def _take_chunk(chunks: VocabularyChunks, j: Array, vocabulary: int, view: Array) -> Array:
    """Chunk j of a view, [C, ...]."""
    if chunks.strided:
        return jax.lax.dynamic_index_in_dim(view, j, axis=1, keepdims=False)
    return jax.lax.dynamic_slice_in_dim(view, _chunk_start(chunks, j, vocabulary), chunks.size)


def _add_chunk(
    chunks: VocabularyChunks, j: Array, vocabulary: int, view: Array, chunk: Array
) -> Array:
    """Add `chunk` to chunk j of the view, which is still zero there unless tokens repeat."""
    if chunks.strided:  # no token repeats, so writing is adding
        return jax.lax.dynamic_update_index_in_dim(view, chunk, j, axis=1)
    chunk = chunk + _take_chunk(chunks, j, vocabulary, view)
    start = _chunk_start(chunks, j, vocabulary)
    return jax.lax.dynamic_update_slice_in_dim(view, chunk, start, axis=0)
