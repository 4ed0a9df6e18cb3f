"""The batches of a stage: in which order its examples come, and as rows of which shape."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from functools import partial

import numpy as np
from jax.sharding import Mesh

from dpojax import sharding
from dpojax.config.errors import config_errors
from dpojax.data.packing import Shape, plan
from dpojax.data.pipeline import fixed_batches, in_order, order, train_batches
from dpojax.data.rows import Rows
from dpojax.models.lora import Adapters
from dpojax.stages.data import StageData
from dpojax.stages.setup import Setup
from dpojax.training.costs import packing_costs
from dpojax.watchdog import beat

Attach = Callable[[Rows], Rows]  # fills in the reference's log-probs


@dataclasses.dataclass(frozen=True)
class Batches:
    """What a stage trains and evaluates on.

    Attributes:
      data: the examples.
      batch_size: examples of an optimiser step.
      steps: optimiser steps of the whole stage.
      seed: of the order.
      score_prompt: whether the prompt's tokens are trained on.
      shape: of the rows of every batch; None until `choose_shape` has chosen it.
    """

    data: StageData
    batch_size: int
    steps: int
    seed: int
    score_prompt: bool = False
    shape: Shape | None = None

    def with_shape(self, shape: Shape) -> Batches:
        return dataclasses.replace(self, shape=shape)

    @property
    def order(self):
        """The batches of the whole training, each a list of indices of examples."""
        how = {"batch_size": self.batch_size, "steps": self.steps, "seed": self.seed}
        mixture = self.data.mixture
        return order(self.data.train, **how) if mixture is None else mixture.order(**how)

    def training(self, attach: Attach | None = None):
        """The rows to train on, an iterator whose position can be saved."""
        return train_batches(
            self.data.examples,
            self.order,
            self.shape,
            score_prompt=self.score_prompt,
            attach=attach,
        )

    def held_out(self, attach: Attach | None = None) -> Iterator[Rows]:
        """The held-out examples in order, as NumPy rows; no batch has those of two sources."""
        return self._fixed(self.held_out_batches, attach)

    @property
    def held_out_batches(self) -> list[range]:
        """The indices in every batch of `held_out`."""
        parts = self.data.held_out_by_source.values() or (self.data.held_out,)
        return [batch for part in parts for batch in self.split(part)]

    @property
    def held_out_sources(self) -> list[str]:
        """The source of every batch of `held_out`; [] where there is one source."""
        parts = self.data.held_out_by_source.items()
        return [name for name, part in parts for _ in self.split(part)]

    def rows(self, indices: range, attach: Attach | None = None) -> Iterator[Rows]:
        """The examples at `indices` in order, as NumPy rows."""
        return self._fixed(self.split(indices), attach)

    def _fixed(self, batches: Sequence[range], attach: Attach | None) -> Iterator[Rows]:
        return fixed_batches(
            self.data.examples,
            batches,
            self.shape,
            score_prompt=self.score_prompt,
            attach=attach,
        )

    def split(self, indices: range) -> list[range]:
        """`indices` as batches, without shuffling."""
        return in_order(indices, self.batch_size)


def choose_shape(
    setup: Setup,
    every: Sequence[Batches],
    *,
    adapters: Adapters | None,
    coupled: bool,
    mesh: Mesh | None = None,
) -> Shape:
    """The shape that all batches fit into: of training in each order, and of evaluation.

    Args:
      every: the same data in one or more orders.
      adapters: shapes of what is trained, where that is not the whole model.
      coupled: whether the objective needs the whole batch at once.
      mesh: of the steps, which decides costs; by default the setup's. Evaluation always runs on the
        setup's mesh, and micro-batches have a multiple of its row shards.

    Raises:
      DataError, ConfigError: see `packing.plan`.
    """
    beat("batches are planned")
    config, first = setup.config, every[0]
    training = [np.asarray(batch, np.int32) for batches in every for batch in batches.order]
    plan_with = partial(
        plan,
        first.data.examples,
        [*training, *first.split(first.data.training), *first.held_out_batches],
        length=config.row_length or None,
        micro_rows=config.micro_rows or None,
        multiple=sharding.row_shards(setup.mesh),
        score_prompt=first.score_prompt,
        costs=packing_costs(
            setup.model.config,
            setup.abstract_params,
            setup.mesh if mesh is None else mesh,
            trained=adapters,
            remat=config.model.remat,
            dtype=config.model.compute_dtype,
            kernel=setup.model.kernel,
        ),
    )
    with config_errors("micro_rows"):
        if coupled:  # a batch of one micro-batch needs one pass, several need two
            one_bucket = plan_with(max_buckets=1)
            if one_bucket.micro_batches == 1:
                return one_bucket
        return plan_with(max_buckets=config.max_buckets)
