"""Pair losses that look at each implicit reward by itself.

Other than for the losses of `pair`, the level of the rewards matters, not only their margin.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array
from jax.typing import ArrayLike

from dpojax.losses.checks import checked
from dpojax.losses.margin import implicit_rewards, log_ratios
from dpojax.losses.pair import Pair
from dpojax.mesh_axes import AxisName, require_axis_name, sum_over_batch


@checked
def nca(policy: Pair[ArrayLike], reference: Pair[ArrayLike], *, beta: ArrayLike) -> Array:
    """Per-pair loss -log sigmoid(r_w) - log sigmoid(-r_w) / 2 - log sigmoid(-r_l) / 2.

    Noise contrastive alignment, Chen et al. 2024, with two responses; r are the implicit rewards.
    The first term keeps the chosen response from losing probability. The loss is 2 log 2 wherever
    policy == reference.

    Args:
      policy, reference: sequence log-probs, nats, any shape.
      beta: strength of the KL penalty, > 0.

    >>> policy, reference = Pair(-12.0, -14.0), Pair(-12.5, -13.0)
    >>> print(f"{nca(policy, reference, beta=0.1):.3f}")
    1.350
    """
    reward = implicit_rewards(policy, reference, beta)
    noise = jax.nn.log_sigmoid(-reward.chosen) + jax.nn.log_sigmoid(-reward.rejected)
    return -jax.nn.log_sigmoid(reward.chosen) - 0.5 * noise


@checked
def bco(
    policy: Pair[ArrayLike], reference: Pair[ArrayLike], *, beta: ArrayLike, delta: ArrayLike
) -> Array:
    """Per-pair loss -log sigmoid(r_w - delta) - log sigmoid(-(r_l - delta)).

    Binary classifier optimisation, Jung et al. 2024. A logistic classifier tells chosen from
    rejected responses by their implicit reward r minus a shift delta. Systems differ in the shift:
    the running mean of all rewards so far (TRL 0.24, LLaMA-Factory; see `update_baseline`), or 0
    (TRL 1).

    Args:
      policy, reference: sequence log-probs, nats, any shape.
      beta: strength of the KL penalty, > 0.
      delta: the shift of the rewards, nats; no gradient flows into it.

    >>> policy, reference = Pair(-12.0, -14.0), Pair(-12.5, -13.0)
    >>> print(f"{bco(policy, reference, beta=0.1, delta=0.0):.3f}")
    1.313
    """
    reward = implicit_rewards(policy, reference, beta)
    delta = jax.lax.stop_gradient(delta)
    chosen, rejected = reward.chosen - delta, reward.rejected - delta
    return -jax.nn.log_sigmoid(chosen) - jax.nn.log_sigmoid(-rejected)


class RunningMean(NamedTuple):
    """The running mean that is BCO's shift; it starts with both at `jnp.zeros(())`."""

    mean: Array  # scalar, nats
    count: Array  # scalar, float: how many responses were seen


def update_baseline(
    baseline: RunningMean,
    rewards: Pair[ArrayLike] | Array,
    mask: ArrayLike | None = None,
    *,
    axis_name: AxisName | None = None,
) -> RunningMean:
    """Update the running mean with the implicit rewards of a batch; no gradient flows through it.

    TRL 0.24 updates the mean first and uses the new mean as `delta` for the same batch.

    Args:
      baseline: mean and count so far.
      rewards: implicit rewards of the whole batch, nats, any shape: of pairs or single responses.
      mask: which pairs or responses exist, or their weights, in their shape; all if None.
      axis_name: in `jax.shard_map` or `jax.vmap`: the axes of shards that share the batch; ()
        where each shard has a batch of its own.

    >>> start = RunningMean(jnp.zeros(()), jnp.zeros(()))
    >>> state = update_baseline(start, Pair(jnp.array([1.0, 9.0]), jnp.array([0.0, 9.0])),
    ...                         mask=jnp.array([True, False]))
    >>> state.mean.item(), state.count.item()
    (0.5, 2.0)
    """
    rewards = jax.lax.stop_gradient(rewards)
    parts = jax.tree.leaves(rewards)
    require_axis_name("update_baseline", parts[0], axis_name)
    weight = jnp.ones(jnp.shape(parts[0])) if mask is None else jnp.asarray(mask, jnp.float32)
    # Differences from the old mean, not the rewards themselves: the mean keeps its digits when the
    # count is large. Masked entries may be NaN, so they are replaced and not multiplied by 0.
    differences = (jnp.where(weight > 0, part - baseline.mean, 0.0) for part in parts)
    difference = sum((difference * weight).sum() for difference in differences)
    sums = difference, len(parts) * weight.sum()
    difference, more = sum_over_batch(sums, axis_name)
    count = baseline.count + more
    return RunningMean(baseline.mean + difference / jnp.maximum(count, 1), count)


@checked
def sppo(policy: Pair[ArrayLike], reference: Pair[ArrayLike], *, beta: ArrayLike) -> Array:
    """Per-pair loss (d_w - 1 / (2 beta))^2 + (d_l + 1 / (2 beta))^2 of the log-ratios d.

    Self-play preference optimisation, Wu et al. 2024, with winning probabilities 1 and 0, as in
    TRL's sppo_hard. Their eta is 1 / beta. The loss is 1 / (2 beta^2) wherever policy == reference.

    Args:
      policy, reference: sequence log-probs, nats, any shape.
      beta: > 0; the target of each log-ratio is +-1 / (2 beta) nats.

    >>> policy, reference = Pair(-12.0, -14.0), Pair(-12.5, -13.0)
    >>> print(f"{sppo(policy, reference, beta=0.1):.2f}")
    36.25
    """
    ratio = log_ratios(policy, reference)
    target = 1 / (2 * jnp.asarray(beta))
    return (ratio.chosen - target) ** 2 + (ratio.rejected + target) ** 2


@checked
def apo_zero(policy: Pair[ArrayLike], reference: Pair[ArrayLike], *, beta: ArrayLike) -> Array:
    """Per-pair loss sigmoid(-r_w) + sigmoid(r_l) of the implicit rewards r.

    It makes chosen responses more likely and rejected ones less. Anchored preference optimisation,
    D'Oosterlinck et al. 2024, for chosen responses that are better than the policy's own. The loss
    is 1 wherever policy == reference. Arguments as in `nca`.

    >>> policy, reference = Pair(-12.0, -14.0), Pair(-12.5, -13.0)
    >>> print(f"{apo_zero(policy, reference, beta=0.1):.3f}")
    0.963
    """
    reward = implicit_rewards(policy, reference, beta)
    return jax.nn.sigmoid(-reward.chosen) + jax.nn.sigmoid(reward.rejected)


@checked
def apo_down(policy: Pair[ArrayLike], reference: Pair[ArrayLike], *, beta: ArrayLike) -> Array:
    """Per-pair loss sigmoid(r_w) + sigmoid(-(r_w - r_l)) of the implicit rewards r.

    It makes both responses less likely, the rejected one more so. Anchored preference optimisation,
    D'Oosterlinck et al. 2024, for a policy that is already better than the chosen responses. The
    loss is 1 wherever policy == reference. Arguments as in `nca`.

    >>> policy, reference = Pair(-12.0, -14.0), Pair(-12.5, -13.0)
    >>> print(f"{apo_down(policy, reference, beta=0.1):.3f}")
    0.975
    """
    reward = implicit_rewards(policy, reference, beta)
    return jax.nn.sigmoid(reward.chosen) + jax.nn.sigmoid(reward.rejected - reward.chosen)
