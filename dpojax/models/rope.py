"""Rotary position embeddings (Su et al. 2021, arXiv:2104.09864) and their context scalings."""

from __future__ import annotations

import math

import jax.numpy as jnp
import numpy as np
from jax import Array

from dpojax.models.config import Rope


def frequencies(rope: Rope, head_dim: int) -> np.ndarray:
    """Radians per position of every rotated pair, float32 [head_dim / 2], highest first."""
    frequency = rope.theta ** -(np.arange(0, head_dim, 2, dtype=np.float64) / head_dim)
    if rope.kind == "linear":
        frequency = frequency / rope.factor
    elif rope.kind == "llama3":
        frequency = _interpolate(frequency, rope.factor, _llama3_keep(rope, frequency))
    elif rope.kind == "yarn":
        frequency = _interpolate(frequency, rope.factor, _yarn_keep(rope, head_dim))
    return frequency.astype(np.float32)


def _interpolate(frequency: np.ndarray, factor: float, keep: np.ndarray) -> np.ndarray:
    """keep = 1 leaves a frequency alone, keep = 0 divides it by factor."""
    return keep * frequency + (1 - keep) * frequency / factor


def _llama3_keep(rope: Rope, frequency: np.ndarray) -> np.ndarray:
    """A ramp in turns over the original context, from low_freq_factor up to high_freq_factor."""
    turns = rope.original_max_positions * frequency / (2 * math.pi)
    ramp = (turns - rope.low_freq_factor) / (rope.high_freq_factor - rope.low_freq_factor)
    return np.clip(ramp, 0, 1)


def _yarn_keep(rope: Rope, head_dim: int) -> np.ndarray:
    """A ramp over the pair index between beta_fast and beta_slow turns (arXiv:2309.00071)."""

    def pair_that_turns(turns: float) -> float:
        span = rope.original_max_positions / (turns * 2 * math.pi)
        return head_dim * math.log(span) / (2 * math.log(rope.theta))

    low, high = pair_that_turns(rope.beta_fast), pair_that_turns(rope.beta_slow)
    if rope.truncate:
        low, high = math.floor(low), math.ceil(high)
    # head_dim - 1 and not head_dim / 2 - 1: what released checkpoints were trained with.
    low, high = max(low, 0), min(high, head_dim - 1)
    width = high - low if high != low else 1e-3
    return 1 - np.clip((np.arange(head_dim // 2) - low) / width, 0, 1)


def cos_sin(rope: Rope, head_dim: int, positions: Array) -> tuple[Array, Array]:
    """Cosines and sines, float32 [R, T, head_dim / 2], of positions [R, T]."""
    frequency = jnp.asarray(frequencies(rope, head_dim))
    angle = positions.astype(jnp.float32)[:, :, None] * frequency[None, None, :]
    return jnp.cos(angle) * rope.attention_factor, jnp.sin(angle) * rope.attention_factor


def rotate(x: Array, cos: Array, sin: Array) -> Array:
    """x [R, T, heads, head_dim] with pair (i, i + head_dim / 2) turned by its angle, in float32."""
    first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    cos, sin = cos[:, :, None, :], sin[:, :, None, :]
    turned = jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)
    return turned.astype(x.dtype)
