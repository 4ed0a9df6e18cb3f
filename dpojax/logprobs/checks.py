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


def check_reference(hidden: Array, head: Head, other_hidden: Array, other_head: Head) -> None:
    """Refuse two models whose next-token distributions cannot be compared.

    Raises:
      ValueError: other tokens, another vocabulary, or a head that does not fit its hidden states.
    """
    if hidden.shape[:-1] != other_hidden.shape[:-1]:
        raise ValueError(
            f"hidden {hidden.shape} and reference_hidden {other_hidden.shape} must be of the same "
            "tokens: all axes but the last one are equal"
        )
    if len(head.weight) != len(other_head.weight):
        raise ValueError(
            f"head and reference_head have vocabularies of {len(head.weight)} and "
            f"{len(other_head.weight)} tokens; their distributions cannot be compared"
        )
    for name, states, its in (
        ("head", hidden, head),
        ("reference_head", other_hidden, other_head),
    ):
        if its.weight.ndim != 2 or its.weight.shape[1] != states.shape[-1]:
            raise ValueError(
                f"{name}.weight: {its.weight.shape} must be [vocabulary, width], and the width of "
                f"its hidden states is {states.shape[-1]}"
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
