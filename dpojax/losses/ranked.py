"""Direct preference optimisation of rankings of K responses, and of distributions over them."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax import Array
from jax.typing import ArrayLike

from dpojax.losses.baselines import plackett_luce_scores
from dpojax.losses.checks import checked


@checked
def plackett_luce(
    policy: Array,
    reference: Array,
    *,
    beta: ArrayLike,
    mask: ArrayLike | None = None,
    top: ArrayLike | None = None,
    ranks: ArrayLike | None = None,
) -> Array:
    """Negative log-likelihood of a ranking of K responses under their implicit rewards r.

    -sum_k (r_k - log sum_{j ranked k or behind} exp r_j). Rafailov et al. 2023, appendix A.3,
    eq. 20. For two responses it is `dpo`; with top=1 it is S-DPO (Chen et al. 2024).

    Args:
      policy, reference: sequence log-probs, nats, [..., K], the best response first.
      beta: strength of the KL penalty, > 0; a scalar.
      mask: which responses exist, [..., K]; all if None. An absent response does not count.
      top: a scalar: how many places, counted from the best, have an order (a partial ranking). The
        responses behind them only count as worse. All if None.
      ranks: the place of each response, 0 for the best, [..., K]. Equal numbers are ties: a tied
        response is chosen from all that are not ahead of it (Breslow 1974). If None, the order on
        the last axis.

    Returns:
      The loss of each ranking, [...]. Wherever policy == reference, each choice among n responses
      adds log n. The loss is 0 for fewer than two responses.

    >>> import jax.numpy as jnp
    >>> policy, reference = jnp.array([-12.0, -14.0]), jnp.array([-12.5, -13.0])
    >>> print(f"{plackett_luce(policy, reference, beta=0.1):.3f}")
    0.621
    """
    return plackett_luce_scores(beta * (policy - reference), mask=mask, top=top, ranks=ranks)


@checked
def lambda_dpo(
    policy: Array,
    reference: Array,
    targets: Array,
    *,
    beta: ArrayLike,
    mask: ArrayLike | None = None,
) -> Array:
    """Cross-entropy of a target distribution over K responses and softmax of their rewards r.

    -sum_k targets_k (r_k - log sum_j exp r_j) of the implicit rewards r = beta d. Listwise DPO with
    mixed preferences (lambda-DPO), Sun et al. 2025. A mixture of several targets' losses with
    weights lambda is the loss of the mixed target, so one call serves any number of aspects. For
    two responses it is `dpo_soft`; where one response has all of the target, it is S-DPO
    (`plackett_luce` with top=1).

    Args:
      policy, reference: sequence log-probs, nats, [..., K], in any order. The authors' code takes
        means over tokens: then divide both by the lengths.
      targets: how much each response is preferred, [..., K], >= 0, with sum 1 over the responses
        that exist: in the authors' code softmax(ratings).
      beta: strength of the KL penalty, > 0; a scalar.
      mask: which responses exist, [..., K]; all if None. An absent response does not count.

    Returns:
      The loss of each list, [...]: log K wherever policy == reference; 0 for fewer than two
      responses.

    >>> policy, reference = jnp.array([-12.0, -14.0]), jnp.array([-12.5, -13.0])
    >>> print(f"{lambda_dpo(policy, reference, jnp.array([0.7, 0.3]), beta=0.1):.3f}")
    0.666
    """
    mask = jnp.ones(jnp.shape(policy), bool) if mask is None else jnp.asarray(mask, bool)
    reward = jnp.where(mask, beta * (policy - reference), 0.0)  # an absent one may be NaN
    # The log of an empty sum would give NaN gradients.
    summed = mask | ~mask.any(-1, keepdims=True)
    log_share = reward - jax.nn.logsumexp(reward, -1, where=summed, keepdims=True)
    loss = -jnp.where(mask, targets * log_share, 0.0).sum(-1)
    return jnp.where(mask.sum(-1) > 1, loss, 0.0)
