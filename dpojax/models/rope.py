"""Rotary position embeddings (Su et al. 2021, arXiv:2104.09864) and their context scalings."""

from __future__ import annotations

import math

import jax.numpy as jnp
import numpy as np
from jax import Array

from dpojax.models.config import Rope


def frequencies(rope: Rope, head_dim: int) -> np.ndarray:
    """Radians per position of every rotated pair, float32 [dim / 2], highest first.

    dim is `rope.dim`, or head_dim where all of it is rotated.
    """
    dim = rope.dim or head_dim
    frequency = rope.theta ** -(np.arange(0, dim, 2, dtype=np.float64) / dim)
    if rope.kind == "linear":
        frequency = frequency / rope.factor
    elif rope.kind == "llama3":
        frequency = _interpolate(frequency, rope.factor, _llama3_keep(rope, frequency))
    elif rope.kind == "yarn":
        frequency = _interpolate(frequency, rope.factor, _yarn_keep(rope, dim))
    return frequency.astype(np.float32)


def _interpolate(frequency: np.ndarray, factor: float, keep: np.ndarray) -> np.ndarray:
    """keep = 1 leaves a frequency alone, keep = 0 divides it by factor."""
    return keep * frequency + (1 - keep) * frequency / factor


def _llama3_keep(rope: Rope, frequency: np.ndarray) -> np.ndarray:
    """A ramp in turns over the original context, from low_freq_factor up to high_freq_factor."""
    turns = rope.original_max_positions * frequency / (2 * math.pi)
    ramp = (turns - rope.low_freq_factor) / (rope.high_freq_factor - rope.low_freq_factor)
    return np.clip(ramp, 0, 1)


def _yarn_keep(rope: Rope, dim: int) -> np.ndarray:
    """A ramp over the pair index between beta_fast and beta_slow turns (arXiv:2309.00071)."""

    def pair_that_turns(turns: float) -> float:
        span = rope.original_max_positions / (turns * 2 * math.pi)
        return dim * math.log(span) / (2 * math.log(rope.theta))

    low, high = pair_that_turns(rope.beta_fast), pair_that_turns(rope.beta_slow)
    if rope.truncate:
        low, high = math.floor(low), math.ceil(high)
    # dim - 1 and not dim / 2 - 1: what released checkpoints were trained with.
    low, high = max(low, 0), min(high, dim - 1)
    width = high - low if high != low else 1e-3
    return 1 - np.clip((np.arange(dim // 2) - low) / width, 0, 1)


def cos_sin(rope: Rope, head_dim: int, positions: Array) -> tuple[Array, Array]:
    """Cosines and sines, float32 [R, T, pairs], of positions [R, T]."""
    frequency = jnp.asarray(frequencies(rope, head_dim))
    angle = positions.astype(jnp.float32)[:, :, None] * frequency[None, None, :]
    return jnp.cos(angle) * rope.attention_factor, jnp.sin(angle) * rope.attention_factor


def rotate(x: Array, cos: Array, sin: Array, *, interleaved: bool = False) -> Array:
    """x [R, T, heads, head_dim] with its first pairs turned by their angles, in float32.

    cos, sin: [R, T, pairs]; dimensions beyond 2 * pairs stay. Pair i is (i, i + pairs), or
    (2i, 2i + 1) where interleaved.
    """
    dim = 2 * cos.shape[-1]
    part, rest = x[..., :dim].astype(jnp.float32), x[..., dim:]
    pair_axis = -1 if interleaved else -2
    pairs = part.reshape(*part.shape[:-1], *((dim // 2, 2) if interleaved else (2, dim // 2)))
    first, second = jnp.moveaxis(pairs, pair_axis, 0)
    cos, sin = cos[:, :, None, :], sin[:, :, None, :]
    turned = jnp.stack([first * cos - second * sin, second * cos + first * sin], axis=pair_axis)
    return jnp.concatenate([turned.reshape(part.shape).astype(x.dtype), rest], axis=-1)
