"""What a method is to the train step: sums and weights of per-token log-probs, no model."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

from jax import Array

from dpojax.data.rows import Rows
from dpojax.training.metrics import Metric

Hyper = dict[str, Array]  # traced scalars, float32: learning_rate, beta, label_smoothing, ...


class Terms(NamedTuple):
    """An objective on one micro-batch: sums and weights, never means.

    The batch's loss is sum(loss) / sum(weight) over all its micro-batches, so the gradient does
    not depend on how they were cut. Padding has weight and loss zero.
    """

    loss: Array  # [R, E]
    weight: Array  # [R, E]
    metrics: dict[str, Metric]  # totals and weights of any shape; they are summed


class Objective(NamedTuple):
    """A method, as the train step sees it."""

    terms: Callable[[Array, Rows, Hyper], Terms]  # of the policy's log-probs [R, S], nats
    needs_reference: bool
    at_reference: Callable[[Hyper], Array] | None = None  # the loss where policy == reference
