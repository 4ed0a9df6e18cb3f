"""Pair losses without a reference.

Several add a likelihood term. Systems normalise it in different ways, so the caller computes it: it
is the argument `nll`, one number per pair.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax import Array
from jax.typing import ArrayLike

from dpojax.losses.checks import checked
from dpojax.losses.margin import dpo, per_token
from dpojax.losses.pair import NO_REFERENCE, Pair


@checked
def simpo(
    policy: Pair[ArrayLike],
    *,
    beta: ArrayLike,
    gamma: ArrayLike,
    lengths: Pair[ArrayLike],
    label_smoothing: ArrayLike = 0.0,
) -> Array:
    """Per-pair loss -log sigmoid(beta (l_w / |w| - l_l / |l|) - gamma) of the log-probs l.

    Meng et al. 2024. Some systems set gamma (TRL), as here, and others the ratio gamma / beta
    (open-instruct, HALOs): then pass ratio * beta.

    Args:
      policy: sequence log-probs, nats, any shape.
      beta: scale of the per-token rewards, > 0, around 2.
      gamma: target margin of the scaled rewards, nats.
      lengths: tokens of each response, clamped to at least 1.
      label_smoothing: as in `dpo`.

    >>> print(f"{simpo(Pair(-12.0, -14.0), beta=2.0, gamma=0.5, lengths=Pair(5, 4)):.3f}")
    0.168
    """
    reward = jax.tree.map(lambda x: beta * x, per_token(policy, lengths))
    return _logistic_with_margin(reward, gamma, label_smoothing)


@checked
def alphapo(
    policy: Pair[ArrayLike],
    *,
    beta: ArrayLike,
    gamma: ArrayLike,
    alpha: ArrayLike,
    lengths: Pair[ArrayLike],
    label_smoothing: ArrayLike = 0.0,
) -> Array:
    """Per-pair SimPO loss of the curved rewards beta (1 - exp(-alpha l / |y|)) / alpha.

    Gupta et al. 2025 (AlphaPO). At alpha = 0 it is `simpo`. Arguments as in `simpo`; alpha is the
    curvature of the reward.

    >>> policy, lengths = Pair(-12.0, -14.0), Pair(5, 4)
    >>> print(f"{alphapo(policy, beta=2.0, gamma=0.5, alpha=0.25, lengths=lengths):.4f}")
    0.0162
    """
    mean = per_token(policy, lengths)
    reward = jax.tree.map(lambda x: curved_reward(x, beta=beta, alpha=alpha), mean)
    return _logistic_with_margin(reward, gamma, label_smoothing)


def curved_reward(mean_logprob: Array, *, beta: ArrayLike, alpha: ArrayLike) -> Array:
    """`alphapo`'s reward beta (1 - exp(-alpha m)) / alpha of a log-prob m per token, any shape."""
    # At alpha = 0 the formula is 0 / 0. Alpha is replaced there, so that no gradient is NaN.
    is_linear = jnp.abs(jnp.asarray(alpha)) < 1e-6
    curvature = jnp.where(is_linear, 1.0, alpha)
    # At most 80: the exponential of very unlikely tokens would overflow float32.
    exponent = jnp.minimum(-curvature * mean_logprob, 80.0)
    return beta * jnp.where(is_linear, mean_logprob, -jnp.expm1(exponent) / curvature)


def _logistic_with_margin(reward: Pair, gamma: ArrayLike, label_smoothing: ArrayLike) -> Array:
    """The logistic loss of r_w - r_l - gamma, smoothed as `dpo` is."""
    shifted = Pair(reward.chosen - gamma, reward.rejected)
    return dpo(shifted, NO_REFERENCE, beta=1.0, label_smoothing=label_smoothing)


@checked
def cpo(
    policy: Pair[ArrayLike],
    *,
    beta: ArrayLike,
    alpha: ArrayLike,
    nll: ArrayLike,
    label_smoothing: ArrayLike = 0.0,
) -> Array:
    """Per-pair loss -log sigmoid(beta (l_w - l_l)) + alpha nll of the log-probs l.

    Contrastive preference optimisation, Xu et al. 2024: DPO with a uniform reference, and a term
    that keeps the chosen response likely.

    Args:
      policy: sequence log-probs, nats, any shape.
      beta: scale of the log-probs, > 0.
      alpha: weight of the likelihood term.
      nll: negative log-likelihood of the chosen responses: summed over tokens (the paper), or
        divided by their number, that of the prompt included (TRL). The pairs' shape or a scalar.
      label_smoothing: as in `dpo`.

    >>> print(f"{cpo(Pair(-12.0, -14.0), beta=0.1, alpha=1.0, nll=12.0):.3f}")
    12.598
    """
    return dpo(policy, NO_REFERENCE, beta=beta, label_smoothing=label_smoothing) + alpha * nll


@checked
def orpo(
    policy: Pair[ArrayLike], *, beta: ArrayLike, lengths: Pair[ArrayLike], nll: ArrayLike
) -> Array:
    """Per-pair loss nll - beta log sigmoid(log odds_w - log odds_l) of per-token likelihoods.

    odds = p / (1 - p) with p = exp(l / |y|). Hong et al. 2024 (their lambda is beta).

    Args:
      policy: sequence log-probs, nats, any shape.
      beta: weight of the odds-ratio term.
      lengths: tokens of each response, clamped to at least 1.
      nll: negative log-likelihood of the chosen responses, per token in the paper. The pairs'
        shape or a scalar.

    >>> print(f"{orpo(Pair(-12.0, -14.0), beta=0.1, lengths=Pair(5, 4), nll=2.4):.3f}")
    2.427
    """
    odds = jax.tree.map(log_odds, per_token(policy, lengths))
    return nll - beta * jax.nn.log_sigmoid(odds.chosen - odds.rejected)


def log_odds(mean: Array) -> Array:
    """log(p / (1 - p)) of the likelihood per token p = exp(mean), nats, any shape."""
    # At p = 1 the odds are infinite, so the mean log-prob stays below 0 by the dtype's epsilon.
    mean = jnp.minimum(mean, -jnp.finfo(mean.dtype).eps)
    # p < 1/2: log(1 - p) = log1p(-p) is exact. p > 1/2: 1 - p = -expm1(mean) is. Each form gets a
    # harmless number where it is not chosen, as a NaN gradient there would reach the result.
    is_unlikely = mean < -jnp.log(2.0)
    if_unlikely = jnp.log1p(-jnp.exp(jnp.where(is_unlikely, mean, -1.0)))
    if_likely = jnp.log(-jnp.expm1(jnp.where(is_unlikely, -1.0, mean)))
    return mean - jnp.where(is_unlikely, if_unlikely, if_likely)


@checked
def slic(policy: Pair[ArrayLike], *, margin: ArrayLike, alpha: ArrayLike, nll: ArrayLike) -> Array:
    """Per-pair loss max(0, margin - l_w + l_l) + alpha nll of the log-probs l.

    Sequence likelihood calibration, Zhao et al. 2023 (SLiC-HF). For per-token log-probs pass
    `per_token(policy, lengths)`.

    Args:
      policy: sequence log-probs, nats, any shape.
      margin: target gap, nats; their delta, HALOs' beta.
      alpha: weight of the likelihood term; their lambda.
      nll: negative log-likelihood of the SFT data (the paper) or of the chosen responses (HALOs).
        The pairs' shape or a scalar.

    >>> print(f"{slic(Pair(-12.0, -14.0), margin=5.0, alpha=0.1, nll=12.0):.2f}")
    4.20
    """
    return jax.nn.relu(margin - policy.chosen + policy.rejected) + alpha * nll


@checked
def tpo_l(
    policy: Pair[ArrayLike],
    *,
    beta: ArrayLike,
    gamma: ArrayLike,
    alpha: ArrayLike,
    nll: ArrayLike,
    lengths: Pair[ArrayLike],
    label_smoothing: ArrayLike = 0.0,
) -> Array:
    """Per-pair loss -log sigmoid(beta (l_w / |w| - l_l / |l|) - gamma) + alpha nll.

    The length-normalised triple preference optimisation of Saeidi et al. 2024 (TPO-L), as the
    authors' code and TRL compute it: `simpo` with the likelihood of a third response, the gold one.

    Args:
      policy: sequence log-probs, nats, any shape.
      beta: scale of the per-token rewards, > 0.
      gamma: target margin of the scaled rewards, nats.
      alpha: weight of the likelihood term.
      nll: negative log-likelihood of the gold response to each pair's prompt; divided by the tokens
        in TRL. The pairs' shape or a scalar.
      lengths: tokens of each response, clamped to at least 1.
      label_smoothing: as in `dpo`.

    >>> policy, lengths = Pair(-12.0, -14.0), Pair(5, 4)
    >>> loss = tpo_l(policy, beta=2.0, gamma=0.5, alpha=1.0, nll=2.0, lengths=lengths)
    >>> print(f"{loss:.3f}")
    2.168
    """
    preference = simpo(
        policy, beta=beta, gamma=gamma, lengths=lengths, label_smoothing=label_smoothing
    )
    return preference + alpha * nll


@checked
def simper(policy: Pair[ArrayLike], *, lengths: Pair) -> Array:
    """Per-pair loss exp(l_l / |l|) - exp(l_w / |w|) of the log-probs l; it lies in [-1, 1].

    The difference of the two inverse perplexities. It has no hyper-parameter. Xiao et al. 2025
    (SimPER), as in the authors' code.

    Args:
      policy: sequence log-probs, nats, any shape.
      lengths: tokens of each response, clamped to at least 1.

    >>> print(f"{simper(Pair(-12.0, -14.0), lengths=Pair(5, 4)):.4f}")
    -0.0605
    """
    mean = per_token(policy, lengths)
    return jnp.exp(mean.rejected) - jnp.exp(mean.chosen)
