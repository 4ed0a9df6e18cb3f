"""The functions of a stage of examples that are compiled at first use."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax

from dpojax.data.rows import Rows
from dpojax.training.forward import Forward, build_outputs
from dpojax.training.objective import Hyper, Objective
from dpojax.training.step import build_evaluate


class Programs(NamedTuple):
    """The functions of a stage that are compiled at first use.

    Attributes:
      objective: what the stage minimises.
      forward: the forward pass to train with.
      score: jitted (params, rows on the mesh, reference=None) -> outputs of whole batches.
      metrics: jitted (outputs, rows on the mesh, hyper) -> sums and weights.
    """

    objective: Objective
    forward: Forward
    score: Callable[..., Any]
    metrics: Callable[[Any, Rows, Hyper], dict]


def make_programs(objective: Objective, forward: Forward, score: Callable) -> Programs:
    """Jits what a stage computes besides its step.

    Scoring is one program for rows with and without the reference's log-probs.
    """
    jitted = jax.jit(score)

    def score_rows(params: dict, rows: Rows, reference: dict | None = None) -> Any:
        return jitted(params, rows._replace(reference=None), reference=reference)

    return Programs(objective, forward, score_rows, jax.jit(build_evaluate(objective)))


def scores_of(forward: Forward) -> Callable[..., Any]:
    """`build_outputs(forward)` with the signature of `build_score`; there is no reference."""
    outputs = build_outputs(forward)

    def score(params: dict, rows: Rows, *, reference: dict | None = None) -> Any:
        del reference
        return outputs(params, rows)

    return score
