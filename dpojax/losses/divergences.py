"""f-DPO: the pair losses with another divergence in the place of the reverse KL."""

from __future__ import annotations

from typing import Literal

import jax
import jax.numpy as jnp
from jax import Array
from jax.typing import ArrayLike

from dpojax.losses.checks import checked
from dpojax.losses.margin import log_ratios
from dpojax.losses.pair import Pair


@checked
def divergence_scores(
    policy: Pair,
    reference: Pair,
    kind: Literal["reverse_kl", "forward_kl", "js", "alpha"],
    *,
    alpha: ArrayLike | None = None,
) -> Pair:
    """Compute the scores f'(exp d) that replace the log-ratios d under a divergence f.

    Wang et al. 2023 (f-DPO). Additive constants are dropped, as in TRL:
      reverse_kl: d
      forward_kl: 1 - exp(-d)
      js:         log 2 + log sigmoid(d)
      alpha:      (exp((a - 1) d) - 1) / (a - 1), and d at a = 1

    Give the scores to a loss that depends only on the margin, with no reference:
    `dpo(scores, NO_REFERENCE, beta=...)`. Losses that look at the level of a reward (nca, bco, apo,
    sppo) are not defined with them: the unknown normaliser of each prompt does not cancel.

    The alpha of TRL 1.0 and later is a; that of older versions is 1 - a. As in TRL, exponents are
    at most 80 (11 in float16). So values and gradients stay finite, and beyond the limit the
    gradient is 0. Departure from TRL: forward_kl has the same limit here; in TRL it overflows. A
    loss that squares its margin (ipo) still overflows float32 near the limit.

    Args:
      policy, reference: sequence log-probs, nats, any shape.
      kind: the divergence.
      alpha: a. Kind "alpha" needs it, and the other kinds refuse it.

    Returns:
      The scores, nats, the pairs' shape.

    Raises:
      ValueError: an unknown `kind`, "alpha" without `alpha`, or `alpha` with another kind.

    >>> policy, reference = Pair(-12.0, -14.0), Pair(-12.5, -13.0)
    >>> scores = divergence_scores(policy, reference, "alpha", alpha=0.5)
    >>> print(f"{scores.chosen:.3f} {scores.rejected:.3f}")
    0.442 -1.297
    """
    if kind not in _SCORES:
        raise ValueError(f"divergence_scores: kind must be one of {list(_SCORES)}, got {kind!r}")
    if (kind == "alpha") != (alpha is not None):
        raise ValueError("divergence_scores: kind 'alpha' takes alpha=..., and no other kind does")
    score = _SCORES[kind]
    ratio = jax.tree.map(jnp.asarray, log_ratios(policy, reference))
    return Pair(score(ratio.chosen, alpha), score(ratio.rejected, alpha))


def _reverse_kl_score(ratio: Array, alpha: None) -> Array:
    del alpha
    return ratio


def _forward_kl_score(ratio: Array, alpha: None) -> Array:
    del alpha
    return _alpha_score(ratio, 0.0)


def _js_score(ratio: Array, alpha: None) -> Array:
    del alpha
    return jnp.log(2.0) + jax.nn.log_sigmoid(ratio)


def _alpha_score(ratio: Array, alpha: ArrayLike) -> Array:
    power = jnp.asarray(alpha, ratio.dtype) - 1
    # At a = 1 the formula is 0 / 0. The power is replaced there, so that no gradient is NaN.
    is_kl = jnp.abs(power) < 1e-6
    power = jnp.where(is_kl, 1.0, power)
    limit = 11.0 if ratio.dtype == jnp.float16 else 80.0  # exp of more overflows
    # expm1 keeps the digits of small exponents, which exp(x) - 1 would lose.
    return jnp.where(is_kl, ratio, jnp.expm1(jnp.minimum(power * ratio, limit)) / power)


_SCORES = {
    "reverse_kl": _reverse_kl_score,
    "forward_kl": _forward_kl_score,
    "js": _js_score,
    "alpha": _alpha_score,
}
