"""What a loss keeps over the batches in the train state: running means, a logarithm.

Each takes the number so far and the view of a whole batch, and returns the new number. The loss of
the same batch reads it as `view.delta()`.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from dpojax.losses import RunningMean, update_baseline
from dpojax.methods.preference.views import PairView


def mean_reward(baseline: RunningMean, view: Any) -> RunningMean:
    """BCO's shift: the mean of all implicit rewards so far, this batch's included."""
    beta = view.hyper["beta"]
    rewards = jax.tree.map(
        lambda policy, reference: beta * (policy - reference), view.policy(), view.reference()
    )
    return update_baseline(baseline, rewards, view.counts())


def mean_gap(baseline: RunningMean, view: PairView) -> RunningMean:
    """beta-DPO's M_0: an exponential moving average of the batches' mean gaps, from 0 on."""
    momentum, count = view.hyper["momentum"], view.counts().sum()
    new = momentum * baseline.mean + (1 - momentum) * view.batch_gap()
    return RunningMean(jnp.where(count > 0, new, baseline.mean), baseline.count + count)


def log_beta_factor(baseline: RunningMean, view: PairView) -> RunningMean:
    """epsilon-DPO's change of beta so far, as a logarithm: from 0 on, this batch's included."""
    return RunningMean(baseline.mean + view.log_beta_change(), baseline.count + view.counts().sum())
