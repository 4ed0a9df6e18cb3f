"""What a preference stage reports, as sums and weights under TRL's names."""

from __future__ import annotations

import jax.numpy as jnp
from jax import Array

from dpojax import losses
from dpojax.data.rows import Rows
from dpojax.methods.preference.views import LabelledView, View
from dpojax.training.metrics import Metric
from dpojax.training.objective import masked_metric
from dpojax.training.responses import all_pairs, answer_tokens, token_weights


def pair_metrics(view: View, beta: Array) -> dict[str, Metric]:
    """Metrics of all pairs that state a preference.

    Rewards are beta times log-ratios, in nats; without a reference, beta times log-probs.
    `rewards/accuracies` counts strictly larger chosen rewards, so it is 0 where policy ==
    reference. `logps/accuracies` compares the policy's own log-probs. `displacement` is the share
    of pairs whose chosen response is less likely than under the reference.
    """
    policy, reference = all_pairs(view.logprobs), all_pairs(view.reference_logprobs)
    present, rank = all_pairs(view.rows.present), all_pairs(view.rows.rank)
    mask = present.chosen & present.rejected & (rank.chosen != rank.rejected)
    weight = mask * view.rows.weight[..., None]  # [..., R, E, P]
    reward = losses.implicit_rewards(policy, reference, beta)
    margin = reward.chosen - reward.rejected
    return {
        "rewards/chosen": masked_metric(reward.chosen, weight),
        "rewards/rejected": masked_metric(reward.rejected, weight),
        "rewards/margins": masked_metric(margin, weight),
        "rewards/accuracies": masked_metric(margin > 0, weight),
        "logps/chosen": masked_metric(policy.chosen, weight),
        "logps/rejected": masked_metric(policy.rejected, weight),
        "logps/accuracies": masked_metric(policy.chosen > policy.rejected, weight),
        "displacement": masked_metric(policy.chosen < reference.chosen, weight),
    }


def labelled_metrics(view: LabelledView, beta: Array) -> dict[str, Metric]:
    """Metrics of desirable responses ("chosen") and of undesirable ones ("rejected").

    `rewards/accuracies` is the share of responses whose implicit reward has the sign of its label.
    """
    policy, reference = view.logprobs[..., 0], view.reference_logprobs[..., 0]
    weight, desirable = view.counts(), view.desirable()
    reward = beta * (policy - reference)
    good, bad = weight * desirable, weight * ~desirable
    right = jnp.where(desirable, reward > 0, reward < 0)
    return {
        "rewards/chosen": masked_metric(reward, good),
        "rewards/rejected": masked_metric(reward, bad),
        "rewards/accuracies": masked_metric(right, weight),
        "logps/chosen": masked_metric(policy, good),
        "logps/rejected": masked_metric(policy, bad),
        "displacement": masked_metric(policy < reference, good),
    }


def token_kl_estimate(policy: Array, rows: Rows) -> Metric:
    """Estimate KL(reference || policy) per token: log reference - log policy of answers' tokens.

    In nats. It has no bias if the responses were drawn from the reference. On other data it can be
    negative.
    """
    return masked_metric(rows.reference - policy, answer_tokens(rows) * token_weights(rows))
