"""Direct preference optimisation of rankings of K responses."""

from __future__ import annotations

from jax import Array
from jax.typing import ArrayLike

from dpojax.losses.baselines import plackett_luce_scores


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
    eq. 20. Two responses give `dpo`.

    Args:
      policy, reference: sequence log-probs, nats, [..., K], the best response first.
      beta: strength of the KL penalty, > 0; a scalar.
      mask: which responses exist, [..., K]; all if None. An absent one is in no choice.
      top: how many places, counted from the best, are ordered at all (a partial ranking); the
        responses behind them only lose. All if None; a scalar.
      ranks: place of each response, 0 for the best, [..., K]; equal numbers are ties (Breslow
        1974: a tied response is chosen from all that are not ahead of it). The order on the last
        axis if None.

    Returns:
      The loss per ranking, [...]. The sum of log n over its choices among n responses wherever
      policy == reference; 0 for fewer than two responses.

    >>> import jax.numpy as jnp
    >>> policy, reference = jnp.array([-12.0, -14.0]), jnp.array([-12.5, -13.0])
    >>> print(f"{plackett_luce(policy, reference, beta=0.1):.3f}")
    0.621
    """
    return plackett_luce_scores(beta * (policy - reference), mask=mask, top=top, ranks=ranks)
