"""Direct preference optimisation of rankings of K responses."""

from __future__ import annotations

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
