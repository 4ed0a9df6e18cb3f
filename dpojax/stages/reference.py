"""How rows come to their reference log-probs."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

from jax.sharding import Mesh

from dpojax import sharding
from dpojax.data.rows import Rows
from dpojax.logprobs import TokenStatistics
from dpojax.training.metrics import Metric

# (number of a held-out batch, params, its rows on the mesh) -> the policy's KL from the reference
MeasureKL = Callable[[int, dict, Rows], dict[str, Metric]]


class Reference(NamedTuple):
    """How rows come to their reference log-probs. `Reference()` changes no rows.

    Attributes:
      attach: on NumPy rows, from the cache; None for a live reference.
      score_on_mesh: on rows that lie on the mesh, by computing them; None for a cached one.
      params: a live reference's weights, for an objective that needs more of it than log-probs.
      tolerance: by how many nats a token's log-prob may differ from what the same weights give now.
      first_scores: what the policy that the stage starts from scores on the first held-out batch,
        where the check of the cache has computed it.
      begin_kl: called once for each evaluation, see `held_out_kl.HeldOutKL.begin`; None where
        nothing is compared.
    """

    attach: Callable[[Rows], Rows] | None = None
    score_on_mesh: Callable[[Rows], Rows] | None = None
    params: dict | None = None
    tolerance: float = 0.0
    first_scores: TokenStatistics | None = None
    begin_kl: Callable[[], MeasureKL] | None = None

    def to_device(self, rows: Rows, mesh: Mesh) -> Rows:
        """NumPy rows (attached already) on the mesh, with reference log-probs."""
        placed = sharding.put_rows(rows, mesh)
        return placed if self.score_on_mesh is None else self.score_on_mesh(placed)


NO_REFERENCE = Reference()
