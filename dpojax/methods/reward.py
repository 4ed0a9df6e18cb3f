"""Reward models: preferences and rankings fitted by a scalar head."""

from __future__ import annotations

import jax.numpy as jnp
from jax import Array

from dpojax import losses
from dpojax.data.rows import Rows
from dpojax.losses import Pair
from dpojax.training.metrics import Metric
from dpojax.training.objective import Hyper, Objective, OptionError, Terms, masked_metric
from dpojax.training.responses import all_pairs

LOSSES = ("bradley_terry", "plackett_luce_scores")
ACCURACY, MEAN = "rewards/accuracies", "rewards/mean"


def objective(loss: str) -> Objective:
    """The mean of a reward model's loss over all pairs, or all rankings, of the optimiser batch.

    `bradley_terry` (Rafailov et al. 2023, eq. 2) takes every pair of a better and a worse response,
    without ties. Its margin is hyper["margin_scale"] times the gap of the data's scores (Touvron et
    al. 2023). hyper["centring"] weighs the squared sum of a pair's scores (Eisenstein et al. 2023).
    `plackett_luce_scores` (eq. 18) takes whole rankings, and centres them in the same way.

    The outputs that it reads are scores [..., R, E, K], of `training.forward.reward_model`.

    Args:
      loss: one of `LOSSES`.

    Raises:
      OptionError: another loss.
    """
    if loss not in LOSSES:
        raise OptionError("loss", f"must be one of {', '.join(LOSSES)}, got {loss!r}")

    def terms(scores: Array, rows: Rows, hyper: Hyper) -> Terms:
        pair, gap = all_pairs(scores), all_pairs(rows.scores)  # [..., R, E, P]
        present, rank = all_pairs(rows.present), all_pairs(rows.rank)
        mask = present.chosen & present.rejected & (rank.chosen < rank.rejected)
        if loss == "bradley_terry":
            margin = hyper["margin_scale"] * (gap.chosen - gap.rejected)
            value = losses.bradley_terry(pair, margin=margin, centring=hyper["centring"])
            value, weight = jnp.where(mask, value, 0.0).sum(-1), mask.sum(-1)
        else:
            value = losses.plackett_luce_scores(scores, mask=rows.present, ranks=rows.rank)
            total = jnp.where(rows.present, scores, 0.0).sum(-1)  # [..., R, E]
            value += hyper["centring"] * total**2
            weight = rows.present.sum(-1) > 1
            value = jnp.where(weight, value, 0.0)
        weight = weight.astype(jnp.float32) * rows.weight
        metrics = _metrics(scores, rows, pair, mask * rows.weight[..., None])
        return Terms(value * rows.weight, weight, metrics)

    return Objective(terms, needs_reference=False)


def _metrics(scores: Array, rows: Rows, pair: Pair, weight: Array) -> dict[str, Metric]:
    """Metrics of all pairs with their weights [..., R, E, P], and of all scores."""
    each = rows.present * rows.weight[..., None]
    return {
        "rewards/chosen": masked_metric(pair.chosen, weight),
        "rewards/rejected": masked_metric(pair.rejected, weight),
        "rewards/margins": masked_metric(pair.chosen - pair.rejected, weight),
        ACCURACY: masked_metric(pair.chosen > pair.rejected, weight),
        MEAN: masked_metric(scores, each),
        "rewards/squares": masked_metric(scores**2, each),
    }
