"""AOT: losses that sort a batch and compare two distributions, not the two responses of a pair.

So they must see the whole optimiser batch at once, along the last axis: a micro-batch alone has
another loss, and so has a shard (see `axis_name`). Leading axes are independent batches.
"""

from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp
from jax import Array
from jax.typing import ArrayLike

from dpojax.losses.checks import checked
from dpojax.losses.margin import dpo, log_ratios
from dpojax.losses.pair import NO_REFERENCE, Pair
from dpojax.mesh_axes import AxisName, require_axis_name, spec_of, with_auto_axes


@checked
def aot(
    policy: Pair[ArrayLike],
    reference: Pair[ArrayLike],
    *,
    beta: ArrayLike,
    mask: ArrayLike | None = None,
    label_smoothing: ArrayLike = 0.0,
    axis_name: AxisName | None = None,
) -> Array:
    """Loss that compares the policy's gaps with the reference's gaps at equal quantiles.

    u and v are the gaps log p(chosen) - log p(rejected) of policy and reference, each sorted over
    the batch. The loss is -log sigmoid(beta (u_(k) - v_(k))), smoothed as in `dpo`. Alignment via
    optimal transport, Melnyk et al. 2024, paired form with the logistic loss.

    Args:
      policy, reference: sequence log-probs, nats, [..., batch]; the last axis is sorted.
      beta: strength of the KL penalty, > 0; a scalar.
      mask: which pairs exist, [..., batch]; all if None. The others change nothing.
      label_smoothing: as in `dpo`; a scalar.
      axis_name: in `jax.shard_map` or `jax.vmap`: the axes of shards that share the batch. Each
        shard has a part of it, and gets the losses of this part. () where each shard has a batch.

    Raises:
      ValueError: in a shard without `axis_name`.

    Returns:
      [..., batch]. The loss of pair i is the term of the quantile at which its u stands; 0 where
      the mask is false.

    >>> policy = Pair(jnp.array([-12.0, -20.5]), jnp.array([-14.0, -18.0]))
    >>> reference = Pair(jnp.array([-12.5, -19.0]), jnp.array([-13.0, -18.5]))
    >>> [f"{loss:.3f}" for loss in aot(policy, reference, beta=0.1).tolist()]
    ['0.621', '0.798']
    """
    require_axis_name("aot", policy.chosen, axis_name)
    gap = Pair(policy.chosen - policy.rejected, reference.chosen - reference.rejected)
    return _loss_at_equal_quantiles(gap, beta, mask, label_smoothing, axis_name)


@checked
def aot_unpaired(
    policy: Pair[ArrayLike],
    reference: Pair[ArrayLike],
    *,
    beta: ArrayLike,
    mask: ArrayLike | None = None,
    label_smoothing: ArrayLike = 0.0,
    axis_name: AxisName | None = None,
) -> Array:
    """Loss that compares chosen with rejected log-ratios at equal quantiles.

    a and b are the log-ratios of chosen and rejected responses, each sorted over the batch. The
    loss is -log sigmoid(beta (a_(k) - b_(k))). Melnyk et al. 2024, unpaired form: there must be as
    many rejected as chosen responses, but it does not matter which belong together. Arguments as in
    `aot`. The loss of item i is the term of the quantile at which its chosen log-ratio stands.

    >>> policy = Pair(jnp.array([-12.0, -20.5]), jnp.array([-14.0, -18.0]))
    >>> reference = Pair(jnp.array([-12.5, -19.0]), jnp.array([-13.0, -18.5]))
    >>> [f"{loss:.3f}" for loss in aot_unpaired(policy, reference, beta=0.1).tolist()]
    ['0.693', '0.718']
    """
    require_axis_name("aot_unpaired", policy.chosen, axis_name)
    ratio = log_ratios(policy, reference)
    return _loss_at_equal_quantiles(ratio, beta, mask, label_smoothing, axis_name)


def _loss_at_equal_quantiles(
    values: Pair[Array],
    beta: ArrayLike,
    mask: ArrayLike | None,
    label_smoothing: ArrayLike,
    axis_name: AxisName | None,
) -> Array:
    """DPO's loss of every `chosen` value with the `rejected` value of equal rank, [..., batch]."""
    shape = jnp.shape(values.chosen)
    mask = jnp.ones(shape, bool) if mask is None else jnp.asarray(mask, bool)

    def partners(chosen: Array, rejected: Array, mask: Array) -> Array:
        # Absent values sort behind all others, so they do not change the ranks of present ones.
        chosen, rejected = (jnp.where(mask, x, jnp.inf) for x in (chosen, rejected))
        rank = jnp.argsort(jnp.argsort(chosen, axis=-1), axis=-1)
        return jnp.take_along_axis(jnp.sort(rejected, axis=-1), rank, axis=-1)

    batch = values.chosen, values.rejected, jnp.broadcast_to(mask, shape)
    if not axis_name:
        partner = with_auto_axes(partners, *batch, out=spec_of(values.chosen))
    else:
        gather = partial(jax.lax.all_gather, axis_name=axis_name, axis=len(shape) - 1, tiled=True)
        first = jax.lax.axis_index(axis_name) * shape[-1]
        of_all = partners(*(gather(x) for x in batch))
        partner = jax.lax.dynamic_slice_in_dim(of_all, first, shape[-1], axis=-1)
    # Zeros in the place of infinities: inf - inf would give NaN gradients.
    gap = Pair(jnp.where(mask, values.chosen, 0.0), jnp.where(mask, partner, 0.0))
    loss = dpo(gap, NO_REFERENCE, beta=beta, label_smoothing=label_smoothing)
    return jnp.where(mask, loss, 0.0)
