"""What a loss may be given: checked by name when it is called, which costs nothing under jit.

NumPy's broadcasting turns a wrong shape into a wrong loss: log-probs [3] against [3, 1] would give
nine losses. So every argument of a loss has the shape of its examples, or is a scalar.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Iterator
from typing import Any, ParamSpec, TypeVar

import jax
import jax.numpy as jnp
import numpy as np

from dpojax.losses.pair import Pair

P = ParamSpec("P")
R = TypeVar("R")

LOG_PROBS = ("policy", "reference", "logprobs", "log_ratio", "log_collision")
LOW_PRECISION = (jnp.bfloat16, jnp.float16)


def checked(loss: Callable[P, R]) -> Callable[P, R]:
    """Refuse what would give a wrong loss, and compute in float32 what is in less.

    The first argument sets the shape of the examples. Every other one, and each half of a `Pair`,
    has this shape or is a scalar. An argument that is annotated as a `Pair` is one, and not another
    tuple; one that is annotated as an array is no tuple and no text. Log-probs are floats, and
    `desirable` is boolean. bfloat16 and float16 become float32.

    Raises:
      TypeError, ValueError: naming the loss and the argument.

    >>> @checked
    ... def gap(policy: Pair[jax.Array]) -> jax.Array:
    ...     return policy.chosen - policy.rejected
    >>> gap((-12.0, -14.0))
    Traceback (most recent call last):
    TypeError: gap: policy must be a Pair(chosen=..., rejected=...), got tuple
    """
    parameters = inspect.signature(loss).parameters
    names = list(parameters)
    annotations = {name: str(its.annotation) for name, its in parameters.items()}
    pairs = {name for name, its in annotations.items() if its.startswith("Pair")}
    single = {name for name, its in annotations.items() if its.startswith("Array")}

    @functools.wraps(loss)
    def with_checks(*args: P.args, **kwargs: P.kwargs) -> R:
        in_order = [name for name in names[len(args) :] if name in kwargs]
        arguments = dict(zip(names, args)) | {name: kwargs[name] for name in in_order}
        for name, value in arguments.items():
            if name in pairs:
                _require_pair(loss.__name__, name, value)
            elif name in single:
                _require_array(loss.__name__, name, value)
        shape = None
        for name, value in arguments.items():
            for part in _arrays(value):
                _check_kind(loss.__name__, name, part)
                shape = np.shape(part) if shape is None else shape
                _check_shape(loss.__name__, name, part, shape)
        args = tuple(_in_float32(value) for value in args)
        return loss(*args, **{name: _in_float32(value) for name, value in kwargs.items()})

    return with_checks


def _require_pair(loss: str, name: str, value: Any) -> None:
    if value is not None and not isinstance(value, Pair):
        raise TypeError(
            f"{loss}: {name} must be a Pair(chosen=..., rejected=...), got {type(value).__name__}"
        )


def _require_array(loss: str, name: str, value: Any) -> None:
    if isinstance(value, tuple | str):
        raise TypeError(
            f"{loss}: {name} must be one array or number, got {type(value).__name__}"
            + ("; call it once for each half" if isinstance(value, Pair) else "")
        )


def _arrays(value: Any) -> Iterator[Any]:
    """The numbers and arrays of an argument; none of an option, which is a word or None."""
    if isinstance(value, tuple):
        for part in value:
            yield from _arrays(part)
    elif value is not None and not isinstance(value, str):
        yield value


def _check_kind(loss: str, name: str, x: Any) -> None:
    if not isinstance(x, jax.Array | np.ndarray | np.generic | bool | int | float):
        raise TypeError(f"{loss}: {name} must hold arrays or numbers, got {type(x).__name__}")
    dtype = jax.dtypes.result_type(x)
    if name in LOG_PROBS and not jnp.issubdtype(dtype, jnp.floating):
        raise TypeError(f"{loss}: {name} must hold log-probs, which are floats; got {dtype}")
    if name == "desirable" and not jnp.issubdtype(dtype, jnp.bool_):
        raise TypeError(
            f"{loss}: desirable must be boolean, got {dtype}; of labels 1 and -1 or 0, pass "
            "labels > 0"
        )


def _check_shape(loss: str, name: str, x: Any, shape: tuple[int, ...]) -> None:
    if np.shape(x) not in ((), shape):
        raise ValueError(
            f"{loss}: {name} has shape {np.shape(x)}, and the first argument {shape}; it must have "
            "the same shape or be a scalar (for several values of an option use jax.vmap)"
        )


def _in_float32(value: Any) -> Any:
    def widen(x: Any) -> Any:
        return jnp.asarray(x, jnp.float32) if getattr(x, "dtype", None) in LOW_PRECISION else x

    return jax.tree.map(widen, value)
