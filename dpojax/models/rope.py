"""Rotary position embeddings (Su et al. 2021, arXiv:2104.09864) and their context scalings.

Letters of shapes: see `dpojax.models`; F is the number of rotated pairs of a head.
"""

from __future__ import annotations

import math

import jax.numpy as jnp
import numpy as np
from jax import Array

from dpojax.models.config import Rope


def frequencies(rope: Rope, head_dim: int) -> np.ndarray:
    """Compute the radians per position of every rotated pair, float32 [F], highest first."""
    dim = rope.dim or head_dim
    # In float64: the rounding error of a frequency is multiplied by the position.
    frequency = rope.theta ** -(np.arange(0, dim, 2, dtype=np.float64) / dim)
    if rope.kind == "linear":
        frequency = frequency / rope.factor
    elif rope.kind == "llama3":
        frequency = _interpolate(frequency, rope.factor, _llama3_keep(rope, frequency))
    elif rope.kind == "yarn":
        frequency = _interpolate(frequency, rope.factor, _yarn_keep(rope, dim))
    return frequency.astype(np.float32)


def _interpolate(frequency: np.ndarray, factor: float, keep: np.ndarray) -> np.ndarray:
    """Divide frequencies by `factor` where keep is 0, not where it is 1, and mix between."""
    return keep * frequency + (1 - keep) * frequency / factor


def _llama3_keep(rope: Rope, frequency: np.ndarray) -> np.ndarray:
    """A ramp from 0 to 1 between low_freq_factor and high_freq_factor turns over the context."""
    turns = rope.original_max_positions * frequency / (2 * math.pi)
    ramp = (turns - rope.low_freq_factor) / (rope.high_freq_factor - rope.low_freq_factor)
    return np.clip(ramp, 0, 1)


def _yarn_keep(rope: Rope, dim: int) -> np.ndarray:
    """A ramp over the pair index from beta_fast to beta_slow turns (arXiv:2309.00071)."""

    def pair_that_turns(turns: float) -> float:
        """The index, with a fraction, of the pair with so many turns over the original context."""
        radius = rope.original_max_positions / (turns * 2 * math.pi)
        return dim * math.log(radius) / (2 * math.log(rope.theta))

    low, high = pair_that_turns(rope.beta_fast), pair_that_turns(rope.beta_slow)
    if rope.truncate:
        low, high = math.floor(low), math.ceil(high)
    # The last pair is dim / 2 - 1, but released checkpoints were trained with dim - 1.
    low, high = max(low, 0), min(high, dim - 1)
    width = high - low if high != low else 1e-3
    return 1 - np.clip((np.arange(dim // 2) - low) / width, 0, 1)


def cos_sin(rope: Rope, head_dim: int, positions: Array) -> tuple[Array, Array]:
    """Compute cosines and sines, float32 [R, T, F], at positions [R, T]."""
    frequency = jnp.asarray(frequencies(rope, head_dim))
    angle = positions.astype(jnp.float32)[:, :, None] * frequency[None, None, :]  # [R, T, F]
    return jnp.cos(angle) * rope.attention_factor, jnp.sin(angle) * rope.attention_factor


def rotate(x: Array, cos: Array, sin: Array, *, interleaved: bool = False) -> Array:
    """Rotate the first F pairs of every head by their angles, in float32.

    Args:
      x: [R, T, H, E]; dimensions after the first 2 F stay as they are.
      cos, sin: [R, T, F].
      interleaved: pair i is (2i, 2i + 1); otherwise it is (i, i + F).

    Returns:
      [R, T, H, E] in the dtype of x.
    """
    dim = 2 * cos.shape[-1]
    part, rest = x[..., :dim].astype(jnp.float32), x[..., dim:]
    pair_axis = -1 if interleaved else -2
    pairs = part.reshape(*part.shape[:-1], *((dim // 2, 2) if interleaved else (2, dim // 2)))
    first, second = jnp.moveaxis(pairs, pair_axis, 0)  # [R, T, H, F] each
    cos, sin = cos[:, :, None, :], sin[:, :, None, :]
    rotated = jnp.stack([first * cos - second * sin, second * cos + first * sin], axis=pair_axis)
    return jnp.concatenate([rotated.reshape(part.shape).astype(x.dtype), rest], axis=-1)
