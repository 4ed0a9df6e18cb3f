"""AOT: losses that couple a batch by sorting it.

They compare distributions and not pairs, so they must see the whole optimiser batch at once, along
the last axis; a micro-batch alone gives another loss. Leading axes are independent batches.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax import Array
from jax.typing import ArrayLike

from dpojax.losses.pair import NO_REFERENCE, Pair, dpo, log_ratios


def aot(
    policy: Pair,
    reference: Pair,
    *,
    beta: ArrayLike,
    mask: ArrayLike | None = None,
    label_smoothing: ArrayLike = 0.0,
) -> Array:
    """Loss of a batch's chosen-rejected gaps, policy against reference at equal quantiles.

    With u and v the differences log p(chosen) - log p(rejected) of policy and reference, each
    sorted over the batch: -log sigmoid(beta (u_(k) - v_(k))), smoothed as in `dpo`. Melnyk et al.
    2024 (alignment via optimal transport), paired form with the logistic loss.

    Args:
      policy, reference: sequence log-probs, nats, [..., batch]; the last axis is sorted.
      beta: strength of the KL penalty, > 0; a scalar.
      mask: which pairs exist, [..., batch]; all if None. The others neither count nor sort.
      label_smoothing: as in `dpo`; a scalar.

    Returns:
      [..., batch]: pair i carries the term of the quantile that its u has; 0 where masked.

    >>> policy = Pair(jnp.array([-12.0, -20.5]), jnp.array([-14.0, -18.0]))
    >>> reference = Pair(jnp.array([-12.5, -19.0]), jnp.array([-13.0, -18.5]))
    >>> [f"{loss:.3f}" for loss in aot(policy, reference, beta=0.1).tolist()]
    ['0.621', '0.798']
    """
    gap = Pair(policy.chosen - policy.rejected, reference.chosen - reference.rejected)
    return _coupled(gap, beta, mask, label_smoothing)


def aot_unpaired(
    policy: Pair,
    reference: Pair,
    *,
    beta: ArrayLike,
    mask: ArrayLike | None = None,
    label_smoothing: ArrayLike = 0.0,
) -> Array:
    """Loss of a batch's chosen against its rejected log-ratios at equal quantiles.

    With a and b the log-ratios of chosen and rejected responses, each sorted over the batch:
    -log sigmoid(beta (a_(k) - b_(k))). Melnyk et al. 2024, unpaired form: which chosen belongs to
    which rejected response does not matter, only that there are as many. Arguments as in `aot`;
    item i carries the term of the quantile that its chosen log-ratio has.

    >>> policy = Pair(jnp.array([-12.0, -20.5]), jnp.array([-14.0, -18.0]))
    >>> reference = Pair(jnp.array([-12.5, -19.0]), jnp.array([-13.0, -18.5]))
    >>> [f"{loss:.3f}" for loss in aot_unpaired(policy, reference, beta=0.1).tolist()]
    ['0.693', '0.718']
    """
    return _coupled(log_ratios(policy, reference), beta, mask, label_smoothing)


def _coupled(values: Pair, beta: ArrayLike, mask: ArrayLike | None, smoothing: ArrayLike) -> Array:
    """The DPO loss of every value in `chosen` against the one of the same rank in `rejected`."""
    shape = jnp.shape(values.chosen)
    mask = jnp.ones(shape, bool) if mask is None else jnp.asarray(mask, bool)
    # Absent pairs sort behind all others, so ranks and quantiles of the present ones agree.
    above, below = jax.tree.map(lambda x: jnp.where(mask, x, jnp.inf), values)
    rank = jnp.argsort(jnp.argsort(above, axis=-1), axis=-1)
    partner = jnp.take_along_axis(jnp.sort(below, axis=-1), rank, axis=-1)
    gap = Pair(jnp.where(mask, values.chosen, 0.0), jnp.where(mask, partner, 0.0))
    return jnp.where(mask, dpo(gap, NO_REFERENCE, beta=beta, label_smoothing=smoothing), 0.0)
