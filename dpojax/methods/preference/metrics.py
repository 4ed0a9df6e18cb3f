"""What a preference stage reports, as sums and weights under TRL's names."""

from __future__ import annotations

import jax.numpy as jnp
from jax import Array

from dpojax import losses
from dpojax.data.rows import Rows
from dpojax.logprobs import of_response
from dpojax.losses import Pair
from dpojax.methods.preference.views import LabelledView
from dpojax.training.metrics import Metric


def pair_metrics(policy: Pair, reference: Pair, mask: Array, beta: Array) -> dict[str, Metric]:
    """Sums and weights over the pairs of `mask`; rewards are beta times log-ratios, in nats.

    Without a reference (zeros) they are beta times log-probs. `rewards/accuracies` counts strictly
    larger chosen rewards, so it is 0 where policy == reference; `logps/accuracies` compares the
    policy's own log-probs. `displacement` is the share of pairs whose chosen response became less
    likely than under the reference.
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


def labelled_metrics(view: LabelledView, beta: Array) -> dict[str, Metric]:
    """Rewards and log-probs of desirable (chosen) and undesirable (rejected) responses apart.

    `rewards/accuracies` is the share of responses whose implicit reward has the sign of its label.
    """
    reward = beta * (view.policy - view.reference)
    good, bad = view.mask & view.desirable, view.mask & ~view.desirable
    metric = lambda values, mask: Metric(jnp.where(mask, values, 0.0), mask)
    right = jnp.where(view.desirable, reward > 0, reward < 0)
    return {
        "rewards/chosen": metric(reward, good),
        "rewards/rejected": metric(reward, bad),
        "rewards/accuracies": metric(right, view.mask),
        "logps/chosen": metric(view.policy, good),
        "logps/rejected": metric(view.policy, bad),
        "displacement": metric(view.policy < view.reference, good),
    }


def token_kl_estimate(policy: Array, rows: Rows) -> Metric:
    """log reference - log policy, averaged over the answers' tokens, in nats.

    It estimates the per-token KL(reference || policy) without bias if the responses were drawn
    from the reference; on other data it can be negative.
    """
    answers = (rows.rank >= 0).reshape(*rows.rank.shape[:-2], -1)
    scored = (rows.response >= 0) & of_response(answers, rows.response)
    return Metric(jnp.where(scored, rows.reference - policy, 0.0), scored)
