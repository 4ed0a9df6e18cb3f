"""Memory of a device: what a step is predicted to need, what a program needs, what there is."""

from __future__ import annotations

import ctypes
import itertools
import math
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding

from dpojax import display
from dpojax.data.packing import Shape
from dpojax.logprobs import logits_at_once
from dpojax.models.attention import XLA, Kernel, scores_of
from dpojax.models.config import DecoderConfig
from dpojax.sharding import row_shards
from dpojax.training import host_memory

SHARE = 0.9  # of the memory that plans may use; the rest is for what nobody foresees


class Footprint(NamedTuple):
    """Predicted bytes of one device during a train step."""

    weights: int
    optimizer: int  # its moments
    gradient: int  # twice under gradient accumulation, and on TPUs three times
    # Weights beside the state: a live reference, the base of adapters; and one layer's kernels of
    # them in the compute dtype, which `gathered` counts over fsdp.
    frozen: int
    activations: int  # stored for the backward pass, and those of the layer being computed
    logits: int  # that exist at once, with the head's gradient and, over fsdp, the gathered head
    # Over fsdp: two layers' weights and one's gradient, the table of embeddings, and on GPUs the
    # kernels that are copied into the layout in which they are gathered. Of members of a sweep that
    # a device computes at once, all weights in the compute dtype, with the layers outside.
    gathered: int
    # On TPUs, where the compute dtype is float32: the layers' kernels in bfloat16.
    rounded: int = 0

    @property
    def total(self) -> int:
        return sum(self)

    def __str__(self) -> str:
        parts = ", ".join(f"{name} {gib(size)}" for name, size in self._asdict().items() if size)
        return f"{gib(self.total)} ({parts})"


def predict(
    config: DecoderConfig,
    shape: Shape,
    mesh: Mesh,
    *,
    state: Any,
    frozen: Any = None,
    remat: str = "dots",
    dtype: str = "float32",
    kernel: Kernel = XLA,
    max_logits: int,
    members: int = 1,
) -> Footprint:
    """Predict what a step needs from shapes alone; docs/plans.md says how near it comes.

    Args:
      config: of the model.
      shape: of a batch.
      mesh: of the run.
      state: shapes and shardings of the train state.
      frozen: those of a live reference, or of the base of adapters; None without.
      remat, dtype, kernel: as `models.decoder.build` takes them.
      max_logits: float32 logits that may exist at once on all devices together.
      members: of a sweep, whose steps a device computes at once; `state` holds them all.
    """
    weights = bytes_per_device(state.params)
    rows = -(-shape.rows // row_shards(mesh))
    tensor = mesh.shape["tensor"]
    tokens = rows * shape.length
    inner = _inner(config, tensor)
    scores = _scores(config, kernel, shape.length) // tensor
    stored = stored_of(config, remat, tensor=tensor, kernel=kernel, length=shape.length)
    size = jnp.dtype(dtype).itemsize
    layer = 4 * tokens * (3 * inner + scores)  # of the layer being computed, in float32
    vocabulary = config.vocab_size if not config.scalar_head else 0
    scored = rows * row_shards(mesh) * shape.scored
    logits = logits_at_once(scored, vocabulary, max_logits=max_logits, mesh=mesh)
    # A vocabulary that `tensor` does not divide lies whole on every device of it.
    ways = 1 if vocabulary % tensor else tensor
    sharers = row_shards(mesh) * ways
    head, fsdp = vocabulary * config.width // ways, mesh.shape["fsdp"]
    head_gradient = 4 * head // fsdp if _trains_table(config, state.params) else 0
    head = head_gradient + (size * head if fsdp > 1 else 0)
    has_frozen = bool(jax.tree.leaves(frozen))
    turned = size * weights // 4 if members > 1 else 0
    used = size * _layer_weights(config, tensor) if has_frozen and fsdp == 1 else 0
    return Footprint(
        weights=weights,
        optimizer=bytes_per_device(state.opt_state),
        gradient=weights * _gradients(shape, mesh),
        frozen=bytes_per_device(frozen) + used,
        activations=members * (size * config.layers * tokens * stored + layer),
        logits=members * (4 * logits // sharers + head),
        gathered=(members * _gathered(config, mesh, size, ways) if fsdp > 1 else 0) + turned,
        rounded=members * _rounded(config, mesh, dtype),
    )


def _gradients(shape: Shape, mesh: Mesh) -> int:
    """How many gradients a step takes the room of.

    Those are a micro-batch's and the sum so far. Under gradient accumulation, XLA's programs for
    TPUs are larger by two gradients, not by one: GPT-2 medium on v5p:2x2x1 has temporary arrays of
    2,602 MiB for one micro-batch of 384 tokens a chip and of 5,453 MiB for two, and its gradient
    has 1,353 MiB.
    """
    if shape.micro_batches == 1:
        return 1
    return 3 if _platform(mesh) == "tpu" else 2


def _rounded(config: DecoderConfig, mesh: Mesh, dtype: str) -> int:
    """Bytes of the kernels that XLA for TPUs rounds to bfloat16 before its loop over layers.

    A TPU multiplies float32 numbers in bfloat16 by default. The kernels of all layers are rounded
    at once: the rounding does not depend on what the loop computes.
    """
    if _platform(mesh) != "tpu" or jnp.dtype(dtype) != jnp.float32:
        return 0
    return 2 * config.layers * _layer_weights(config, mesh.shape["tensor"]) // mesh.shape["fsdp"]


def _gathered(config: DecoderConfig, mesh: Mesh, size: int, ways: int) -> int:
    """Bytes of the whole weights that a device of fsdp gathers for a layer, and for the next one.

    Args:
      size: bytes of a number of the compute dtype.
      ways: devices that the table of embeddings is spread over, besides fsdp.
    """
    layer = _layer_weights(config, mesh.shape["tensor"])
    # A tied table is the head's, which counts with the logits.
    table = 0 if config.tied_head else size * config.vocab_size * config.width // ways
    return (2 * size + 4) * layer + table + _relaid(config, mesh)


def _relaid(config: DecoderConfig, mesh: Mesh) -> int:
    """Bytes of the kernels that XLA for GPUs copies before its loop over layers.

    An array is gathered along its first axis. The kernels whose last axis lies over fsdp (the
    attention's output, and the one that leads down from the MLP) are turned round for that, in
    float32, those of all layers at once.
    """
    if _platform(mesh) != "gpu":
        return 0
    rows = config.heads * config.head_dim + config.mlp_width
    return 4 * config.layers * config.width * rows // (mesh.shape["fsdp"] * mesh.shape["tensor"])


def _trains_table(config: DecoderConfig, params: Any) -> bool:
    """Whether a table with a row for each token is trained: not by adapters."""
    sizes = {config.vocab_size, config.width}
    return any(set(x.shape[-2:]) == sizes for x in jax.tree.leaves(params) if x.ndim > 1)


def _layer_weights(config: DecoderConfig, tensor: int) -> int:
    """Count the numbers in a layer's kernels, on each of `tensor` devices."""
    heads = 2 * (config.heads + config.kv_heads) * config.head_dim
    mlp = (3 if config.gated_mlp else 2) * config.mlp_width
    return config.width * (heads + mlp) // tensor


def stored_of(
    config: DecoderConfig, remat: str, *, tensor: int = 1, kernel: Kernel = XLA, length: int = 0
) -> int:
    """Count the numbers that a layer stores of a token for its backward pass.

    The token is in a row of `length`.
    """
    inner, heads = _inner(config, tensor), config.heads * config.head_dim // tensor
    keys = 2 * config.kv_heads * config.head_dim // tensor
    # A kernel that stores no scores stores the heads' output.
    scores = _scores(config, kernel, length) // tensor
    products = 2 * config.width + heads + keys + inner + (0 if kernel.scores else heads)
    return {
        "full": config.width,
        "dots": products,
        "none": products + 12 * config.width + 3 * inner + 3 * scores,
    }[remat]


def gradient_in_tokens(
    config: DecoderConfig, params: Any, mesh: Mesh, *, remat: str, dtype: str, kernel: Kernel = XLA
) -> float:
    """How many tokens' stored activations take as much memory as a gradient, on all devices.

    Attention scores, which only remat `none` stores, are left out. Their number depends on the
    length of the row, which is chosen by this number.
    """
    stored = stored_of(config, remat, tensor=mesh.shape["tensor"], kernel=kernel)
    of_token = jnp.dtype(dtype).itemsize * config.layers * stored
    return row_shards(mesh) * bytes_per_device(params) / of_token


def _scores(config: DecoderConfig, kernel: Kernel, length: int) -> int:
    """Attention scores of a token, of all heads; 0 where the kernel stores none."""
    return config.heads * scores_of(length) // length if kernel.scores and length else 0


def _inner(config: DecoderConfig, tensor: int) -> int:
    return config.mlp_width // tensor * (2 if config.gated_mlp else 1)


def bytes_per_device(tree: Any) -> int:
    """Bytes of arrays, or of their shapes, on the fullest device; 0 for None.

    On TPUs with the padding of their tiles (`tiled_bytes`).
    """
    total = 0
    for leaf in jax.tree.leaves(tree):
        shape = leaf.shape if leaf.sharding is None else leaf.sharding.shard_shape(leaf.shape)
        size = leaf.dtype.itemsize
        on_tpu = isinstance(leaf.sharding, NamedSharding) and _platform(leaf.sharding.mesh) == "tpu"
        total += tiled_bytes(shape, size) if on_tpu else size * math.prod(shape)
    return total


def tiled_bytes(shape: Sequence[int], size: int) -> int:
    """Bytes of an array of numbers of `size` bytes on a TPU.

    Its two innermost axes lie in tiles of 8 x 128 numbers. XLA orders the axes so that the least is
    padded. The padding of arrays of one axis is left out.

    Source: https://openxla.org/xla/tiled_layout.
    """
    total = size * math.prod(shape)
    if len(shape) < 2 or not total:
        return total

    def padded(innermost: tuple[int, int]) -> float:
        """How many times as large the array is with these axes innermost."""
        rows, columns = innermost
        return -(-rows // 8) * 8 * -(-columns // 128) * 128 / (rows * columns)

    return round(total * min(map(padded, itertools.permutations(shape, 2))))


def _platform(mesh: Mesh) -> str:
    return mesh.devices.flat[0].platform


def temporary_bytes(compiled: jax.stages.Compiled) -> int:
    """Bytes that a compiled program needs on a device besides its arguments and results."""
    return int(compiled.memory_analysis().temp_size_in_bytes)


def needed(compiled: jax.stages.Compiled) -> str:
    """Say what a compiled program needs on each device, as the compiler counts it."""
    sizes = compiled.memory_analysis()
    if sizes is None:
        return "an amount that its compiler does not report"
    arguments = sizes.argument_size_in_bytes
    more = sizes.temp_size_in_bytes + sizes.output_size_in_bytes - sizes.alias_size_in_bytes
    return (
        f"{gib(arguments + more)} on each device ({gib(arguments)} for arguments, {gib(more)} for "
        "results and temporary arrays)"
    )


def lean(jitted: Callable, *, say: Callable[[str], None] | None = None) -> Callable:
    """Compile a function at its first call, and return the freed memory before it runs.

    Args:
      jitted: the function.
      say: is told how long that took, and what memory the program needs (`needed`).
    """
    compiled = False

    def run(*args):
        nonlocal compiled
        if not compiled:
            began = time.perf_counter()
            with display.doing("compiling the step"):
                program = jitted.lower(*args).compile()  # the call below finds it in jit's cache
            if say is not None:
                seconds = time.perf_counter() - began
                say(f"compiled in {seconds:.0f} s; the step needs {needed(program)}")
            give_back()
            compiled = True
        return jitted(*args)

    return run


def give_back() -> None:
    """Return to the system the memory that this process has freed.

    Compiling GPT-2 small's step frees 0.25 GiB. glibc keeps it in pieces, and they would add to the
    process's peak. Without glibc nothing is done.
    """
    library = ctypes.CDLL(None) if sys.platform == "linux" else None
    if hasattr(library, "malloc_trim"):
        library.malloc_trim(ctypes.c_size_t(0))


def limit_bytes() -> int:
    """Bytes that one device of this process may hold.

    That is the device's own limit, or else its share of the memory that the host has available.
    """
    devices = jax.local_devices()
    stats = devices[0].memory_stats() or {}
    if "bytes_limit" in stats:
        return int(SHARE * stats["bytes_limit"])
    return int(min(SHARE * host_memory.available() / len(devices), 2**62))


def gib(size: float) -> str:
    """1.5 GiB, or 20 MiB."""
    return f"{size / 2**30:.1f} GiB" if size >= 2**29 else f"{size / 2**20:.0f} MiB"
