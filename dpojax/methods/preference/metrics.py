"""What a preference stage reports, as sums and weights under TRL's names; see docs/metrics.md."""

from __future__ import annotations

import jax.numpy as jnp

from dpojax.methods.preference.rewards import Reward
from dpojax.methods.preference.views import LabelledView, View
from dpojax.training.metrics import Metric
from dpojax.training.objective import masked_metric
from dpojax.training.responses import all_pairs

# Of log-ratios to the reference: absent where the rows carry no log-probs of a reference.
DISPLACEMENT, LOG_RATIO_CHOSEN = "displacement", "log_ratio/chosen"
LOG_RATIO_REJECTED = "log_ratio/rejected"


def pair_metrics(view: View, reward: Reward) -> dict[str, Metric]:
    """Metrics of all pairs that state a preference.

    `rewards/accuracies` counts strictly larger chosen rewards, so it is 0 where policy ==
    reference. `logps/accuracies` compares the policy's own log-probs. `displacement` is the share
    of pairs whose chosen response is less likely than under the reference. `log_ratio/chosen` is
    log policy - log reference of a chosen response, nats.
    """
    policy, reference = all_pairs(view.logprobs), all_pairs(view.reference_logprobs)
    present, rank = all_pairs(view.rows.present), all_pairs(view.rows.rank)
    mask = present.chosen & present.rejected & (rank.chosen != rank.rejected)
    weight = mask * view.rows.weight[..., None]  # [..., R, E, P]
    rewards = reward.of(view)
    margin = rewards.chosen - rewards.rejected
    metrics = {
        "rewards/chosen": masked_metric(rewards.chosen, weight),
        "rewards/rejected": masked_metric(rewards.rejected, weight),
        "rewards/margins": masked_metric(margin, weight),
        "rewards/accuracies": masked_metric(margin > 0, weight),
        "logps/chosen": masked_metric(policy.chosen, weight),
        "logps/rejected": masked_metric(policy.rejected, weight),
        "logps/accuracies": masked_metric(policy.chosen > policy.rejected, weight),
    }
    if view.rows.reference is not None:
        metrics |= {
            LOG_RATIO_CHOSEN: masked_metric(policy.chosen - reference.chosen, weight),
            LOG_RATIO_REJECTED: masked_metric(policy.rejected - reference.rejected, weight),
            DISPLACEMENT: masked_metric(policy.chosen < reference.chosen, weight),
        }
    return metrics


def labelled_metrics(view: LabelledView, reward: Reward) -> dict[str, Metric]:
    """Metrics of desirable responses ("chosen") and of undesirable ones ("rejected").

    `rewards/accuracies` is the share of responses whose reward has the sign of its label. It is
    absent where the reward has no reference, and so nothing to change its sign at.
    """
    policy, reference = view.logprobs[..., 0], view.reference_logprobs[..., 0]
    weight, desirable = view.counts(), view.desirable()
    rewards = reward.of(view)
    good, bad = weight * desirable, weight * ~desirable
    metrics = {
        "rewards/chosen": masked_metric(rewards, good),
        "rewards/rejected": masked_metric(rewards, bad),
        "logps/chosen": masked_metric(policy, good),
        "logps/rejected": masked_metric(policy, bad),
    }
    if reward.needs_reference:
        right = jnp.where(desirable, rewards > 0, rewards < 0)
        metrics["rewards/accuracies"] = masked_metric(right, weight)
    if view.rows.reference is not None:
        metrics |= {
            LOG_RATIO_CHOSEN: masked_metric(policy - reference, good),
            LOG_RATIO_REJECTED: masked_metric(policy - reference, bad),
            DISPLACEMENT: masked_metric(policy < reference, good),
        }
    return metrics
