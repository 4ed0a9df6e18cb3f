"""f-DPO: the pair losses under another divergence than the reverse KL."""

from __future__ import annotations

from typing import Literal

import jax
import jax.numpy as jnp
from jax import Array
from jax.typing import ArrayLike

from dpojax.losses.pair import Pair, log_ratios


def divergence_scores(
    policy: Pair,
    reference: Pair,
    kind: Literal["reverse_kl", "forward_kl", "js", "alpha"],
    *,
    alpha: ArrayLike | None = None,
) -> Pair:
    """Turn log-ratios d into the scores f'(exp d) that take their place under a divergence f.

    Wang et al. 2023 (f-DPO), with constants dropped as in TRL:
      reverse_kl: d
      forward_kl: 1 - exp(-d)
      js:         log 2 + log sigmoid(d)
      alpha:      (exp((a - 1) d) - 1) / (a - 1), and d at a = 1

    Any loss that sees only the margin then takes the scores with no reference:
    `dpo(scores, NO_REFERENCE, beta=...)`. Losses that look at the level of a reward (nca, bco, apo,
    sppo) are not defined with it: their unknown normaliser does not cancel.

    TRL's alpha is a since 1.0; its older coefficient is 1 - a. As there, exponents are clamped from
    above at 80 (11 in float16), so values and gradients stay finite, and the gradient is 0 beyond;
    forward_kl is clamped likewise here, where TRL overflows. A loss that squares its margin (ipo)
    still overflows float32 near the clamp.

    Args:
      policy, reference: sequence log-probs, nats, any shape.
      kind: the divergence.
      alpha: a, wanted by "alpha" and by no other.

    Raises:
      ValueError: another `kind`, "alpha" without `alpha`, or `alpha` with another kind.

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
    return jax.tree.map(lambda d: score(d, alpha), ratio)


def _alpha_score(ratio: Array, alpha: ArrayLike) -> Array:
    power = jnp.asarray(alpha, ratio.dtype) - 1
    is_kl = jnp.abs(power) < 1e-6
    power = jnp.where(is_kl, 1.0, power)
    limit = 11.0 if ratio.dtype == jnp.float16 else 80.0
    return jnp.where(is_kl, ratio, jnp.expm1(jnp.minimum(power * ratio, limit)) / power)


_SCORES = {
    "reverse_kl": lambda d, _: d,
    "forward_kl": lambda d, _: _alpha_score(d, 0.0),
    "js": lambda d, _: jnp.log(2.0) + jax.nn.log_sigmoid(d),
    "alpha": _alpha_score,
}
