"""Counts the updates that rounding swallows: param - rate * update == param."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax import Array

from dpojax.training.metrics import Metric
from dpojax.training.state import State, descend

LOST_UPDATES = "updates/lost"  # the metric's name


def lost_updates(
    direction: Callable[[Any, Any, Any], tuple[Any, Any]],
    optimizer: optax.GradientTransformation,
    gradient: dict,
    new: State,
    *,
    rate: Array,
    taken: Array,
) -> Metric:
    """Count the updates that are too small to change the weight that they are added to.

    Only the matrices of the first layer are looked at. They stand for all of them, and the first
    slice of a stacked array costs nothing, however the array is sharded. The update is the one
    that the same gradient makes from the new state. Reading the donated old state would force a
    copy.

    Args:
      direction: (gradient, opt_state, params) -> (updates, opt_state), one number at a time.
      optimizer: what made `new.opt_state`.
      gradient: as `direction` takes it.
      new: the state after the step.
      rate: the step's learning rate.
      taken: bool scalar, whether the state was changed; both counts are zero where it is False.

    Returns:
      How many updates changed nothing, and how many were not 0.
    """
    gradient, params = _first_layer((gradient, new.params))
    opt_state = optax.tree.map_params(optimizer, _first_layer, new.opt_state)
    updates, _ = direction(gradient, opt_state, params)
    nonzero = jax.tree.map(lambda update: update != 0, updates)
    lost = jax.tree.map(
        lambda there, param, update: there & (descend(param, update, rate) == param),
        nonzero,
        params,
        updates,
    )
    return Metric(jnp.where(taken, _count(lost), 0), jnp.where(taken, _count(nonzero), 0))


def _first_layer(tree: Any) -> Any:
    """The first layer of every stacked matrix [layers, ., .]; empty arrays for all else."""
    return jax.tree.map(lambda x: x[0] if x.ndim > 2 else jnp.zeros(0, x.dtype), tree)


def _count(tree: Any) -> Array:
    """How many booleans of a tree are True, float32."""
    return sum(jnp.sum(x, dtype=jnp.float32) for x in jax.tree.leaves(tree))
