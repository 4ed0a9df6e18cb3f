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
    policy: Pair[ArrayLike],
    reference: Pair[ArrayLike],
    kind: Literal["reverse_kl", "forward_kl", "js", "alpha", "chi_squared"],
    *,
    alpha: ArrayLike | None = None,
) -> Pair[Array]:
    """Compute the scores f'(exp d) that replace the log-ratios d under a divergence f.

    Wang et al. 2023 (f-DPO). Additive constants are dropped, as in TRL:
      reverse_kl: d
      forward_kl: 1 - exp(-d)
      js:         log 2 + log sigmoid(d)
      alpha:      (exp((a - 1) d) - 1) / (a - 1), and d at a = 1
      chi_squared: exp(d) + d, the mixture of chi-squared and KL of Huang et al. 2024 (chi-PO)

    Give the scores to a loss that depends only on the margin, with no reference:
    `dpo(scores, NO_REFERENCE, beta=...)`. Losses that look at the level of a reward (nca, bco, apo,
    sppo) are not defined with them: the unknown normaliser of each prompt does not cancel.

    The alpha of TRL 1.0 and later is a; that of older versions is 1 - a. As in TRL, exponents are
    at most 80 (11 in float16). So values and gradients stay finite, and beyond the limit the
    gradient is 0; that of chi_squared is then 1. Departure from TRL: forward_kl has the same limit
    here; in TRL it overflows. A loss that squares its margin (ipo) still overflows float32 near the
    limit.

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
    # expm1 keeps the digits of small exponents, which exp(x) - 1 would lose.
    return jnp.where(is_kl, ratio, jnp.expm1(jnp.minimum(power * ratio, _limit(ratio))) / power)


def _chi_squared_score(ratio: Array, alpha: None) -> Array:
    del alpha
    return jnp.exp(jnp.minimum(ratio, _limit(ratio))) + ratio


def _limit(ratio: Array) -> float:
    """The largest exponent; exp of more overflows."""
    return 11.0 if ratio.dtype == jnp.float16 else 80.0


_SCORES = {
    "reverse_kl": _reverse_kl_score,
    "forward_kl": _forward_kl_score,
    "js": _js_score,
    "alpha": _alpha_score,
    "chi_squared": _chi_squared_score,
}


@checked
def chipo(
    policy: Pair[ArrayLike], reference: Pair, *, beta: ArrayLike, max_reward: ArrayLike
) -> Array:
    """Per-pair loss -log sigmoid(clip(beta (phi(z_w) - phi(z_l)))), phi(z) = z + log z.

    z = exp(d) is the ratio of the policy's and the reference's probability of a response. The clip
    keeps the margin within +-2 R_max. Chi-squared preference optimisation, Huang et al. 2024,
    algorithm 1. Without the clip it is `dpo` of the `divergence_scores` of kind chi_squared.

    Args:
      policy, reference: sequence log-probs, nats, any shape.
      beta: strength of the regularisation, > 0.
      max_reward: R_max, the largest reward of a response, nats. Outside of the clip the gradient is
        0; infinity is no clip.

    >>> policy, reference = Pair(-12.0, -14.0), Pair(-12.5, -13.0)
    >>> print(f"{chipo(policy, reference, beta=0.1, max_reward=1.0):.3f}")
    0.564
    """
    score = divergence_scores(policy, reference, "chi_squared")
    margin = beta * (score.chosen - score.rejected)
    return -jax.nn.log_sigmoid(jnp.clip(margin, -2 * max_reward, 2 * max_reward))
