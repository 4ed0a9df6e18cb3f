"""What a method is to the train step: sums and weights of what a model says, no model."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

from jax import Array

from dpojax.data.rows import Rows
from dpojax.losses import RunningMean
from dpojax.training.metrics import Metric

Hyper = dict[str, Array]  # traced float32 numbers: learning_rate, beta, label_smoothing, ...


class Terms(NamedTuple):
    """An objective on one micro-batch: sums and weights, never means.

    The batch's loss is sum(loss) / sum(weight) over all its micro-batches, so the gradient does
    not depend on how they were cut. Padding has weight and loss zero.
    """

    loss: Array  # [..., R, E]
    weight: Array  # [..., R, E]
    metrics: dict[str, Metric]  # totals and weights of any shape; they are summed


class Objective(NamedTuple):
    """A method, as the train step sees it.

    terms: of the model's outputs on rows with any leading axes; a language model's outputs are
      `TokenStatistics` [..., R, S], of which training fills in the log-prob and `statistics`.
    coupled: examples of a batch see each other, so `terms` has to have the whole optimiser batch
      [M, R, ...] at once; the step then computes all outputs first and their gradient after.
    baseline: takes a whole batch's outputs into a running mean, whose value the same batch's
      `terms` find in hyper["delta"]; what it makes of an objective is coupled, too.
    at_reference: the loss where policy == reference, for those where it depends on no data.
    """

    terms: Callable[[Any, Rows, Hyper], Terms]
    needs_reference: bool
    at_reference: Callable[[Hyper], Array] | None = None
    statistics: tuple[str, ...] = ()  # of log_collision, kl
    coupled: bool = False
    baseline: Callable[[RunningMean, Any, Rows, Hyper], RunningMean] | None = None
