"""Bytes: what a train step will want of a device, what a program does want, and what there is."""

from __future__ import annotations

import ctypes
import math
import sys
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from dpojax.data.packing import Shape
from dpojax.logprobs import logits_at_once
from dpojax.models.attention import XLA, Kernel, scores_of
from dpojax.models.config import DecoderConfig
from dpojax.sharding import row_shards
from dpojax.training import host_memory

SHARE = 0.9  # of the memory that may be planned with; the rest is for what nobody foresees


class Footprint(NamedTuple):
    """Predicted bytes of one device during a train step, by what they hold."""

    weights: int
    optimizer: int  # its moments
    gradient: int  # twice where micro-batches are added up; of adapted kernels once, on the way
    frozen: int  # weights beside the state: a live reference, the base of adapters
    activations: int  # stored for the backward pass, and one layer's own
    logits: int  # those that exist at once, the head's gradient, and over fsdp the head gathered

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
    adapted: Any = None,
    remat: str = "dots",
    dtype: str = "float32",
    kernel: Kernel = XLA,
    max_logits: int,
) -> Footprint:
    """What a step will want, from shapes alone; within a third of what XLA reports on a CPU.

    Args:
      shape: of a batch.
      state: shapes and shardings of the train state.
      frozen: those of a live reference, or of adapters' base and the merged weights; None without.
      adapted: those of the kernels that adapters change, whose gradient exists until it is
        contracted to the adapters'.
      remat, dtype, kernel: as `models.decoder.build` takes them.
      max_logits: float32 logits that may exist at once on all devices together.
    """
    weights = bytes_per_device(state.params)
    rows = -(-shape.rows // row_shards(mesh))
    tensor = mesh.shape["tensor"]
    tokens = rows * shape.length
    inner = _inner(config, tensor)
    scores = _scores(config, kernel, shape.length) // tensor
    stored = stored_of(config, remat, tensor=tensor, kernel=kernel, length=shape.length)
    size = jnp.dtype(dtype).itemsize
    own = 4 * tokens * (3 * inner + scores)  # of the layer under way, in float32
    vocabulary = config.vocab_size if not config.scalar_head else 0
    scored = rows * row_shards(mesh) * shape.scored
    logits = logits_at_once(scored, vocabulary, max_logits=max_logits, mesh=mesh)
    # A vocabulary that `tensor` does not divide lies whole on every device of it.
    ways = 1 if vocabulary % tensor else tensor
    sharers = row_shards(mesh) * ways
    head, fsdp = vocabulary * config.width // ways, mesh.shape["fsdp"]
    head = 4 * head // fsdp + (size * head if fsdp > 1 else 0)
    return Footprint(
        weights=weights,
        optimizer=bytes_per_device(state.opt_state),
        gradient=weights * (2 if shape.micro_batches > 1 else 1) + bytes_per_device(adapted),
        frozen=bytes_per_device(frozen),
        activations=size * config.layers * tokens * stored + own,
        logits=4 * logits // sharers + head,
    )


def stored_of(
    config: DecoderConfig, remat: str, *, tensor: int = 1, kernel: Kernel = XLA, length: int = 0
) -> int:
    """How many numbers of a token a layer stores for its backward pass, in a row of `length`."""
    inner, heads = _inner(config, tensor), config.heads * config.head_dim // tensor
    keys = 2 * config.kv_heads * config.head_dim // tensor
    # A kernel that has no scores keeps what it made of the heads.
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
    """How many tokens' stored activations, of all devices together, take a gradient's memory.

    Scores, which only remat `none` stores, are left out: how many a token has is the length of its
    row, and that is chosen by this number.
    """
    stored = stored_of(config, remat, tensor=mesh.shape["tensor"], kernel=kernel)
    of_token = jnp.dtype(dtype).itemsize * config.layers * stored
    return row_shards(mesh) * bytes_per_device(params) / of_token


def _scores(config: DecoderConfig, kernel: Kernel, length: int) -> int:
    """That a token of a row has, of all heads; 0 where a kernel holds none of them."""
    return config.heads * scores_of(length) // length if kernel.scores and length else 0


def _inner(config: DecoderConfig, tensor: int) -> int:
    return config.mlp_width // tensor * (2 if config.gated_mlp else 1)


def bytes_per_device(tree: Any) -> int:
    """Of arrays, or of their shapes: what the fullest device holds; 0 for None."""
    total = 0
    for leaf in jax.tree.leaves(tree):
        shape = leaf.shape if leaf.sharding is None else leaf.sharding.shard_shape(leaf.shape)
        total += math.prod(shape) * leaf.dtype.itemsize
    return total


def temporary_bytes(compiled: jax.stages.Compiled) -> int:
    """What a compiled program needs of a device beside what goes in and comes out."""
    return int(compiled.memory_analysis().temp_size_in_bytes)


def needed(compiled: jax.stages.Compiled) -> str:
    """What a compiled program needs of each device, as the compiler counts it."""
    found = compiled.memory_analysis()
    if found is None:
        return "what its compiler does not say"
    given = found.argument_size_in_bytes
    beside = found.temp_size_in_bytes + found.output_size_in_bytes - found.alias_size_in_bytes
    return f"{gib(given + beside)} of each device ({gib(given)} given, {gib(beside)} beside that)"


def lean(jitted: Callable, *, say: Callable[[str], None] | None = None) -> Callable:
    """The same function; before it first runs, what compiling it has freed is given back.

    Args:
      say: is told then what the program needs (`needed`).
    """
    compiled = False

    def run(*args):
        nonlocal compiled
        if not compiled:
            program = jitted.lower(*args).compile()  # which the call below finds
            if say is not None:
                say(needed(program))
            give_back()
            compiled = True
        return jitted(*args)

    return run


def give_back() -> None:
    """To the system, what this process has freed.

    Compiling GPT-2 small's step frees 0.25 GiB, which glibc keeps in pieces; they would add to the
    most that the process ever holds. Elsewhere than in glibc nothing is done.
    """
    library = ctypes.CDLL(None) if sys.platform == "linux" else None
    if hasattr(library, "malloc_trim"):
        library.malloc_trim(ctypes.c_size_t(0))


def limit_bytes() -> int:
    """What one device of this process may hold: its own limit, or its part of the memory that the
    host has to give."""
    devices = jax.local_devices()
    stats = devices[0].memory_stats() or {}
    if "bytes_limit" in stats:
        return int(SHARE * stats["bytes_limit"])
    return int(min(SHARE * host_memory.available() / len(devices), 2**62))


def gib(size: float) -> str:
    """1.5 GiB, or 20 MiB."""
    return f"{size / 2**30:.1f} GiB" if size >= 2**29 else f"{size / 2**20:.0f} MiB"
