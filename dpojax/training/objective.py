"""What the train step knows of a method: sums and weights from a model's outputs."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

from dpojax.data.rows import Rows
from dpojax.losses import RunningMean
from dpojax.training.metrics import Metric

Hyper = dict[str, Array]  # traced float32 numbers: learning_rate, beta, label_smoothing, ...


class OptionError(ValueError):
    """An option of a method has a value that it cannot have.

    Attributes:
      option: its name, as the method knows it.
      reason: what is wrong, and what to do.
    """

    def __init__(self, option: str, reason: str):
        super().__init__(f"{option}: {reason}")
        self.option, self.reason = option, reason

    def __reduce__(self):
        return type(self), (self.option, self.reason)


class Terms(NamedTuple):
    """An objective on one micro-batch: sums and weights, never means.

    The batch's loss is sum(loss) / sum(weight) over all its micro-batches. So the gradient does
    not depend on how the batch is divided. Padding has weight 0 and loss 0. An example of weight w
    (`Rows.weight`) is counted as w equal examples: it multiplies loss, weight and metrics.
    """

    loss: Array  # [..., R, E]
    weight: Array  # [..., R, E]
    metrics: dict[str, Metric]  # totals and weights of any shape; the step sums them


class Objective(NamedTuple):
    """A method, as the train step sees it.

    Attributes:
      terms: (outputs, rows, hyper) -> Terms. The rows have any leading axes. The outputs are those
        of the forward pass; a language model gives `TokenStatistics` [..., R, S].
      needs_reference: the rows need the reference's log-probs.
      at_reference: the loss where policy == reference, if it does not depend on data.
      statistics: what the forward pass has to compute besides the log-prob: `log_collision`, `kl`,
        `perturbed`.
      sync_every: every how many steps the reference becomes the policy of the step; 0 is never. The
        step then computes the reference's log-probs itself, from `State.reference`.
      coupled: the examples of a batch interact, so `terms` needs the whole optimiser batch
        [M, R, ...] at once. The step then computes all outputs first and their gradient after.
      baseline: takes a whole batch's outputs into a running mean. `terms` of the same batch reads
        its value as hyper["delta"]. An objective with a baseline is coupled, too.
    """

    terms: Callable[[Any, Rows, Hyper], Terms]
    needs_reference: bool
    at_reference: Callable[[Hyper], Array] | None = None
    statistics: tuple[str, ...] = ()
    sync_every: int = 0
    coupled: bool = False
    baseline: Callable[[RunningMean, Any, Rows, Hyper], RunningMean] | None = None

    @property
    def reads_live_reference(self) -> bool:
        """Whether the forward pass of training reads the weights of a live reference."""
        return bool({"kl", "perturbed"} & set(self.statistics))


def masked_metric(values: Array, weight: Array) -> Metric:
    """The metric of `values` with their weights, or a mask; arrays, not yet summed.

    Values of weight 0 may be NaN.
    """
    return Metric(jnp.where(weight > 0, values, 0) * weight, weight)


def summed_metrics(metrics: Mapping[str, Metric]) -> dict[str, Metric]:
    """Sum the arrays of every metric to float32 scalars."""
    return jax.tree.map(lambda x: jnp.sum(x, dtype=jnp.float32), dict(metrics))
