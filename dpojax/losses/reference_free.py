"""Pair losses without a reference. Several add a likelihood term, whose normalisation differs
between systems: it is the argument `nll`, per pair.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax import Array
from jax.typing import ArrayLike

from dpojax.losses.pair import NO_REFERENCE, Pair, dpo, per_token


def simpo(
    policy: Pair,
    *,
    beta: ArrayLike,
    gamma: ArrayLike,
    lengths: Pair,
    label_smoothing: ArrayLike = 0.0,
) -> Array:
    """Per-pair loss -log sigmoid(beta (l_w / |w| - l_l / |l|) - gamma) of the log-probs l.

    Meng et al. 2024. Some systems are configured by the ratio gamma / beta (open-instruct, HALOs)
    and others by gamma (TRL): here it is gamma, so pass ratio * beta.

    Args:
      policy: sequence log-probs, nats, any shape.
      beta: scale of the per-token rewards, > 0, around 2.
      gamma: wanted margin, nats after the scaling by beta.
      lengths: tokens of each response, clamped to at least 1.
      label_smoothing: as in `dpo`.

    >>> print(f"{simpo(Pair(-12.0, -14.0), beta=2.0, gamma=0.5, lengths=Pair(5, 4)):.3f}")
    0.168
    """
    reward = jax.tree.map(lambda x: beta * x, per_token(policy, lengths))
    return _shifted(reward, gamma, label_smoothing)


def alphapo(
    policy: Pair,
    *,
    beta: ArrayLike,
    gamma: ArrayLike,
    alpha: ArrayLike,
    lengths: Pair,
    label_smoothing: ArrayLike = 0.0,
) -> Array:
    """Per-pair SimPO loss of the bent rewards beta (1 - exp(-alpha l / |y|)) / alpha.

    Gupta et al. 2025 (AlphaPO). At alpha = 0 it is `simpo`. The exponent is clamped at 80, so
    that very unlikely tokens cannot overflow. Arguments as in `simpo`.

    >>> policy, lengths = Pair(-12.0, -14.0), Pair(5, 4)
    >>> print(f"{alphapo(policy, beta=2.0, gamma=0.5, alpha=0.25, lengths=lengths):.4f}")
    0.0162
    """
    straight = jnp.abs(jnp.asarray(alpha)) < 1e-6
    power = jnp.where(straight, 1.0, alpha)
    bend = lambda x: jnp.where(straight, x, -jnp.expm1(jnp.minimum(-power * x, 80.0)) / power)
    reward = jax.tree.map(lambda x: beta * bend(x), per_token(policy, lengths))
    return _shifted(reward, gamma, label_smoothing)


def _shifted(reward: Pair, gamma: ArrayLike, smoothing: ArrayLike) -> Array:
    moved = Pair(reward.chosen - gamma, reward.rejected)
    return dpo(moved, NO_REFERENCE, beta=1.0, label_smoothing=smoothing)


def cpo(
    policy: Pair,
    *,
    beta: ArrayLike,
    alpha: ArrayLike,
    nll: ArrayLike,
    label_smoothing: ArrayLike = 0.0,
) -> Array:
    """Per-pair loss -log sigmoid(beta (l_w - l_l)) + alpha nll of the log-probs l.

    Contrastive preference optimisation, Xu et al. 2024: DPO under a uniform reference, and the
    chosen response's likelihood as an anchor.

    Args:
      policy: sequence log-probs, nats, any shape.
      beta: scale of the log-probs, > 0.
      alpha: weight of the likelihood term.
      nll: the chosen responses' negative log-likelihood, summed (the paper) or divided by tokens
        (TRL, prompt included), the pairs' shape or a scalar.
      label_smoothing: as in `dpo`.

    >>> print(f"{cpo(Pair(-12.0, -14.0), beta=0.1, alpha=1.0, nll=12.0):.3f}")
    12.598
    """
    return dpo(policy, NO_REFERENCE, beta=beta, label_smoothing=label_smoothing) + alpha * nll


def orpo(policy: Pair, *, beta: ArrayLike, lengths: Pair, nll: ArrayLike) -> Array:
    """Per-pair loss nll - beta log sigmoid(log odds_w - log odds_l) of per-token likelihoods.

    odds = p / (1 - p) with p = exp(l / |y|). Hong et al. 2024 (their lambda is beta). Mean
    log-probs are kept below 0 by the dtype's epsilon, where the odds would be infinite.

    Args:
      policy: sequence log-probs, nats, any shape.
      beta: weight of the odds-ratio term.
      lengths: tokens of each response, clamped to at least 1.
      nll: the chosen responses' negative log-likelihood, per token in the paper: the pairs' shape
        or a scalar.

    >>> print(f"{orpo(Pair(-12.0, -14.0), beta=0.1, lengths=Pair(5, 4), nll=2.4):.3f}")
    2.427
    """
    odds = jax.tree.map(_log_odds, per_token(policy, lengths))
    return nll - beta * jax.nn.log_sigmoid(odds.chosen - odds.rejected)


def _log_odds(mean: Array) -> Array:
    """log(p / (1 - p)) of p = exp(mean), by whichever form of log(1 - p) is exact there."""
    mean = jnp.minimum(mean, -jnp.finfo(mean.dtype).eps)
    unlikely = mean < -jnp.log(2.0)
    far = jnp.log1p(-jnp.exp(jnp.where(unlikely, mean, -1.0)))
    near = jnp.log(-jnp.expm1(jnp.where(unlikely, -1.0, mean)))
    return mean - jnp.where(unlikely, far, near)


def slic(policy: Pair, *, margin: ArrayLike, alpha: ArrayLike, nll: ArrayLike) -> Array:
    """Per-pair loss max(0, margin - l_w + l_l) + alpha nll of the log-probs l.

    Sequence likelihood calibration, Zhao et al. 2023 (SLiC-HF). For per-token log-probs pass
    `per_token(policy, lengths)`.

    Args:
      policy: sequence log-probs, nats, any shape.
      margin: wanted gap in nats; their delta, HALOs' beta.
      alpha: weight of the regulariser; their lambda.
      nll: negative log-likelihood of the regulariser's targets, the SFT data in the paper and the
        chosen responses in HALOs: the pairs' shape or a scalar.

    >>> print(f"{slic(Pair(-12.0, -14.0), margin=5.0, alpha=0.1, nll=12.0):.2f}")
    4.20
    """
    return jax.nn.relu(margin - policy.chosen + policy.rejected) + alpha * nll
