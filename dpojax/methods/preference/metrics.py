"""Preference optimisation on rows: DPO and its relatives with a reference, pair by pair."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from dpojax import losses
from dpojax.data.rows import Rows
from dpojax.logprobs import sum_by_response
from dpojax.losses import Pair
from dpojax.training.metrics import Metric
from dpojax.training.objective import Hyper, Objective, Terms

SMOOTHED = ("dpo", "dpo_norm", "robust", "exo")  # these take label smoothing
LOSSES = (*SMOOTHED, "ipo", "hinge", "nca", "sppo", "apo_zero", "apo_down")


def objective(loss: str, *, length_norm: str | None = None) -> Objective:
    """The mean over all pairs of the optimiser batch of a loss of `dpojax.losses`, by its name.

    A prompt with K > 2 ranked responses gives all its K (K - 1) / 2 pairs. `hyper` holds `beta`
    and, for those that take it, `label_smoothing`.

    Raises:
      ValueError: an unknown loss, or ipo without a `length_norm`.
    """
    if loss not in LOSSES:
        raise ValueError(f"dpo.loss must be one of {', '.join(LOSSES)}; got {loss!r}")
    if loss == "ipo" and length_norm not in ("sum", "mean"):
        raise ValueError(f"dpo.length_norm must be 'sum' or 'mean' for ipo, got {length_norm!r}")
    function = getattr(losses, loss)

    def pair_loss(policy: Pair, reference: Pair, lengths: Pair, hyper: Hyper) -> Array:
        given = {"beta": hyper["beta"]}
        if loss in SMOOTHED:
            given["label_smoothing"] = hyper["label_smoothing"]
        if loss in ("dpo_norm", "ipo"):
            given["lengths"] = lengths
        if loss == "ipo":
            given["length_norm"] = length_norm
        return function(policy, reference, **given)

    def terms(policy: Array, rows: Rows, hyper: Hyper) -> Terms:
        tokens = (rows.response >= 0).astype(jnp.float32)
        sums = jax.tree.map(lambda x: pairs_of(x, rows), (policy, rows.reference, tokens))
        mask = pair_mask(rows)
        per_pair = jnp.where(mask, pair_loss(*sums, hyper), 0.0)
        metrics = pair_metrics(sums[0], sums[1], mask, hyper["beta"])
        metrics["kl/per_token"] = token_kl_estimate(policy, rows)
        return Terms(per_pair.sum(-1), mask.sum(-1, dtype=jnp.float32), metrics)

    def at_reference(hyper: Hyper) -> Array:
        zero, one = Pair(*jnp.zeros((2, 1))), Pair(*jnp.ones((2, 1)))
        return pair_loss(zero, zero, one, hyper)[0]

    return Objective(terms, needs_reference=True, at_reference=at_reference)


def pairs_of(values: Array, rows: Rows) -> Pair:
    """Sums by response of per-token values [R, S], paired better with worse: each [R, E, pairs]."""
    slots = rows.present.shape[-2] * rows.present.shape[-1]
    sums = sum_by_response(values, rows.response, slots).reshape(rows.present.shape)
    better, worse = np.triu_indices(rows.present.shape[-1], k=1)
    return Pair(sums[..., better], sums[..., worse])


def pair_mask(rows: Rows) -> Array:
    """Which pairs have both responses, bool [R, E, pairs]."""
    better, worse = np.triu_indices(rows.present.shape[-1], k=1)
    return rows.present[..., better] & rows.present[..., worse]


def pair_metrics(policy: Pair, reference: Pair, mask: Array, beta: Array) -> dict[str, Metric]:
    """Sums and weights under TRL's names; rewards are beta times log-ratios, in nats.

    `rewards/accuracies` counts strictly larger chosen rewards, so it is 0 where policy ==
    reference; `logps/accuracies` compares the policy's own log-probs. `displacement` is the share
    of pairs whose chosen response became less likely.
    """
    reward = losses.implicit_rewards(policy, reference, beta)
    margin = reward.chosen - reward.rejected
    metric = lambda values: Metric(jnp.where(mask, values, 0.0), mask)
    return {
        "rewards/chosen": metric(reward.chosen),
        "rewards/rejected": metric(reward.rejected),
        "rewards/margins": metric(margin),
        "rewards/accuracies": metric(margin > 0),
        "logps/chosen": metric(policy.chosen),
        "logps/rejected": metric(policy.rejected),
        "logps/accuracies": metric(policy.chosen > policy.rejected),
        "displacement": metric(policy.chosen < reference.chosen),
    }


def token_kl_estimate(policy: Array, rows: Rows) -> Metric:
    """log reference - log policy, averaged over the responses' tokens, in nats.

    It estimates the per-token KL(reference || policy) without bias if the responses were drawn
    from the reference; on other data it can be negative.
    """
    scored = rows.response >= 0
    return Metric(jnp.where(scored, rows.reference - policy, 0.0), scored)
