"""The exact KL of a policy from its reference, at the contexts of held-out responses.

A cache of the reference's log-probs cannot give it: that takes the whole distribution at every
context. So the reference's hidden states at these contexts are computed once, while its weights are
at hand, and stay on the host with its head. The reference itself need not stay.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import jax
import numpy as np

from dpojax import sharding
from dpojax.data.rows import Rows
from dpojax.head import Head
from dpojax.stages.example_stage import ExampleStage
from dpojax.stages.reference import MeasureKL
from dpojax.training.forward import Distributions, build_divergence, build_hidden
from dpojax.training.metrics import Metric

KL = "kl/per_token"  # the metric's name: nats per token
MOST_BYTES = 2**28  # of hidden states; further held-out batches do without a KL


class KLPrograms(NamedTuple):
    """Two jitted programs. Equal weights give equal hidden states, so their KL is exactly 0.

    Attributes:
      head: params -> the model's head.
      hidden: see `build_hidden`.
      divergence: see `build_divergence`.
    """

    head: Callable[[dict], Head]
    hidden: Callable[[dict, Rows], jax.Array]
    divergence: Callable[[Distributions, Distributions, Rows], Metric]

    def distributions(self, params: dict, rows: Rows) -> Distributions:
        """Of a model's params on rows that lie on the mesh."""
        head = self.head(params)
        return Distributions(sharding.settle(self.hidden(params, rows)), head.weight, head.bias)


class HeldOutKL(NamedTuple):
    """KL(policy || reference) per token, of the first held-out batches.

    Attributes:
      programs: that compute it.
      hidden: the reference's hidden states on each of these batches, NumPy.
      head: the reference's weight and bias, NumPy; the bias may be None.
      head_shardings: of both on the mesh.
    """

    programs: KLPrograms
    hidden: list[np.ndarray]
    head: tuple[np.ndarray, np.ndarray | None]
    head_shardings: tuple[jax.sharding.Sharding | None, ...]

    def begin(self) -> MeasureKL:
        """Put the reference's head on the mesh for one evaluation.

        Returns:
          What measures the KL on a batch; {} for a batch without hidden states. The head stays on
          the mesh as long as this function is held.
        """
        head = [
            x if x is None else sharding.put(x, how)
            for x, how in zip(self.head, self.head_shardings)
        ]

        def measure(index: int, params: dict, rows: Rows) -> dict[str, Metric]:
            if index >= len(self.hidden):
                return {}
            hidden = sharding.put(self.hidden[index], rows.response.sharding)
            of_policy = self.programs.distributions(params, rows)
            return {KL: self.programs.divergence(of_policy, Distributions(hidden, *head), rows)}

        return measure


def kl_programs(stage: ExampleStage) -> KLPrograms:
    """The programs of a stage, compiled at first use."""
    model, max_logits = stage.setup.model, stage.setup.max_logits
    divergence = build_divergence(model, max_logits=max_logits)
    return KLPrograms(model.head, jax.jit(build_hidden(model)), jax.jit(divergence))


def open_held_out_kl(stage: ExampleStage, reference: dict) -> HeldOutKL:
    """Compute the reference's hidden states on held-out batches, at least one, up to `MOST_BYTES`.

    Args:
      stage: with its data.
      reference: params.
    """
    programs, total = kl_programs(stage), 0
    head = programs.head(reference)[:2]
    of_batches: list[np.ndarray] = []
    for rows in stage.batches.held_out():
        placed = sharding.put_rows(rows, stage.setup.mesh)
        hidden = np.asarray(sharding.to_host(sharding.settle(programs.hidden(reference, placed))))
        total += hidden.nbytes
        if of_batches and total > MOST_BYTES:
            break
        of_batches.append(hidden)
    shardings = tuple(x if x is None else x.sharding for x in head)
    return HeldOutKL(programs, of_batches, sharding.to_host(head), shardings)
