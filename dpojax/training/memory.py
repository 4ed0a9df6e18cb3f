"""Bytes: what arrays take of a device, what a program needs beside them, and what there is."""

from __future__ import annotations

import math
import os
from typing import Any

import jax

SHARE = 0.9  # of the memory that may be planned with; the rest is for what nobody foresees


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


def limit_bytes() -> int:
    """What one device of this process may hold: its own limit, or its part of the host's memory
    that is free now."""
    devices = jax.local_devices()
    stats = devices[0].memory_stats() or {}
    if "bytes_limit" in stats:
        return int(SHARE * stats["bytes_limit"])
    free = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return int(SHARE * free / len(devices))
