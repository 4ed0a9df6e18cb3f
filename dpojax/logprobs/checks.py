"""Checks of what log-probs are computed of, made when a function is called: free under jit."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from dpojax.head import Head


def check_tokens(hidden: Array, head: Head, targets: Array) -> None:
    """Refuse what would give wrong log-probs of [..., T] targets.

    Raises:
      TypeError: targets that are no integers.
      ValueError: shapes that would broadcast, or targets that are no tokens of the vocabulary.
    """
    if hidden.ndim == 0 or hidden.shape[:-1] != targets.shape:
        raise ValueError(
            f"hidden: {hidden.shape} must be the shape of targets, {targets.shape}, and the width"
        )
    if head.weight.ndim != 2 or head.weight.shape[1] != hidden.shape[-1]:
        raise ValueError(
            f"head.weight: {head.weight.shape} must be [vocabulary, width], and the width of "
            f"hidden is {hidden.shape[-1]}"
        )
    require_integers("targets", targets)
    known, vocabulary = values_if_known(targets), len(head.weight)
    if known is not None and known.size and not 0 <= known.min() <= known.max() < vocabulary:
        raise ValueError(
            f"targets hold {known.min()} to {known.max()}, and the vocabulary has tokens 0 to "
            f"{vocabulary - 1}; give ignored tokens (-100) any token and leave their log-probs out "
            "of the sum, as sequence_logprobs does with its mask"
        )


def require_integers(name: str, x: Array) -> None:
    """Raise TypeError unless `x` is an array of integers."""
    if not jnp.issubdtype(x.dtype, jnp.integer):
        raise TypeError(f"{name} must be integers, got {x.dtype}")


def values_if_known(x: Array) -> np.ndarray | None:
    """The values of an array; None in a traced program, or where other processes have some."""
    if isinstance(x, jax.core.Tracer) or not getattr(x, "is_fully_addressable", True):
        return None
    return np.asarray(x)
