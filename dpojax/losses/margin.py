"""Log-ratios, implicit rewards, and the losses that see only the margin of the two rewards."""

from __future__ import annotations

from typing import Literal

import jax
import jax.numpy as jnp
from jax import Array
from jax.typing import ArrayLike

from dpojax.losses.checks import checked
from dpojax.losses.pair import NO_REFERENCE, Pair


@checked
def log_ratios(policy: Pair[ArrayLike], reference: Pair[ArrayLike]) -> Pair[Array]:
    """Subtract the reference's log-prob of each response from the policy's, nats, any shape.

    >>> ratio = log_ratios(Pair(-12.0, -14.0), Pair(-12.5, -13.0))
    >>> print(ratio.chosen, ratio.rejected)
    0.5 -1.0
    """
    return jax.tree.map(jnp.subtract, policy, reference)


@checked
def implicit_rewards(
    policy: Pair[ArrayLike], reference: Pair[ArrayLike], beta: ArrayLike
) -> Pair[Array]:
    """Compute beta (log policy - log reference) of each response, nats, any shape.

    Rafailov et al. 2023, eq. 5, without beta log Z(x). This constant of the prompt cancels in every
    margin.

    >>> implicit_rewards(Pair(-12.0, -14.0), Pair(-12.5, -13.0), beta=2.0)
    Pair(chosen=1.0, rejected=-2.0)
    """
    return jax.tree.map(lambda p, r: beta * (p - r), policy, reference)


@checked
def per_token(values: Pair[ArrayLike], lengths: Pair[ArrayLike]) -> Pair[Array]:
    """Divide sums over tokens by the lengths of the responses (at least 1); any shape.

    >>> mean = per_token(Pair(-12.0, -14.0), Pair(5, 0))
    >>> print(f"{mean.chosen:.2f} {mean.rejected:.2f}")
    -2.40 -14.00
    """
    return jax.tree.map(lambda x, n: x / jnp.maximum(n, 1), values, lengths)


@checked
def dpo(
    policy: Pair[ArrayLike],
    reference: Pair[ArrayLike],
    *,
    beta: ArrayLike,
    label_smoothing: ArrayLike = 0.0,
) -> Array:
    """Per-pair loss -log sigmoid(r_chosen - r_rejected) with r the implicit rewards.

    Rafailov et al. 2023, eq. 7. With label smoothing e it is the conservative form
    (1 - e) * -log sigmoid(m) + e * -log sigmoid(-m) of the margin m (Mitchell 2023, "cDPO").

    Args:
      policy, reference: sequence log-probs, nats, any shape.
      beta: strength of the KL penalty, > 0.
      label_smoothing: assumed share of flipped labels, in [0, 0.5).

    Returns:
      The loss of each pair, the shape of `policy.chosen`; log 2 wherever policy == reference.

    >>> zero = Pair(jnp.zeros(2), jnp.zeros(2))
    >>> [f"{loss:.3f}" for loss in dpo(zero, zero, beta=0.1).tolist()]
    ['0.693', '0.693']
    """
    reward = implicit_rewards(policy, reference, beta)
    margin = reward.chosen - reward.rejected
    # log_sigmoid(x) stays exact for very negative x, where log(sigmoid(x)) would be -inf.
    as_labelled = -(1 - label_smoothing) * jax.nn.log_sigmoid(margin)
    return as_labelled - label_smoothing * jax.nn.log_sigmoid(-margin)


@checked
def dpo_norm(
    policy: Pair[ArrayLike],
    reference: Pair[ArrayLike],
    *,
    beta: ArrayLike,
    lengths: Pair[ArrayLike],
    label_smoothing: ArrayLike = 0.0,
) -> Array:
    """Per-pair DPO loss of per-token log-ratios: -log sigmoid(beta (d_w / |w| - d_l / |l|)).

    Length-normalised DPO of Lambert et al. 2024 (Tulu 3); TRL calls it sigmoid_norm. Its beta is
    much larger than that of `dpo`: 5 in the paper. Arguments as in `dpo`; `lengths` counts the
    tokens of each response.

    >>> policy, reference = Pair(-12.0, -14.0), Pair(-12.5, -13.0)
    >>> print(f"{dpo_norm(policy, reference, beta=0.5, lengths=Pair(5, 4)):.3f}")
    0.609
    """
    mean = per_token(log_ratios(policy, reference), lengths)
    return dpo(mean, NO_REFERENCE, beta=beta, label_smoothing=label_smoothing)


@checked
def ipo(
    policy: Pair[ArrayLike],
    reference: Pair[ArrayLike],
    *,
    beta: ArrayLike,
    length_norm: Literal["sum", "mean"],
    lengths: Pair[ArrayLike] | None = None,
) -> Array:
    """Per-pair loss (h - 1 / (2 beta))^2 with h the difference of the two log-ratios.

    Azar et al. 2023, eq. 17 (their tau is beta). Systems differ in what a log-ratio is. So the
    choice has a name and no default: the "sum" over the response's tokens (the paper; emdpo,
    OpenRLHF), or their "mean" (TRL, HALOs, LLaMA-Factory).

    Args:
      policy, reference: sequence log-probs, nats, any shape.
      beta: the regularisation tau, > 0.
      length_norm: "sum" or "mean".
      lengths: tokens of each response, needed by "mean" (clamped to at least 1).

    Raises:
      ValueError: an unknown `length_norm`, or "mean" without `lengths`.

    >>> zero = Pair(jnp.zeros(1), jnp.zeros(1))
    >>> ipo(zero, zero, beta=0.1, length_norm="sum").tolist()
    [25.0]
    """
    if length_norm not in ("sum", "mean"):
        raise ValueError(f"ipo: length_norm must be 'sum' or 'mean', got {length_norm!r}")
    ratio = log_ratios(policy, reference)
    if length_norm == "mean":
        if lengths is None:
            raise ValueError("ipo: length_norm='mean' needs lengths=Pair(chosen, rejected)")
        ratio = per_token(ratio, lengths)
    return (ratio.chosen - ratio.rejected - 1 / (2 * jnp.asarray(beta))) ** 2


@checked
def hinge(policy: Pair[ArrayLike], reference: Pair[ArrayLike], *, beta: ArrayLike) -> Array:
    """Per-pair loss max(0, 1 - (r_chosen - r_rejected)) with r the implicit rewards.

    The hinge-norm loss of Liu et al. 2023 (RSO). Arguments as in `dpo`. Where the margin is 1 or
    more, the gradient is exactly 0. The loss is 1 wherever policy == reference.

    >>> policy, reference = Pair(-12.0, -14.0), Pair(-12.5, -13.0)
    >>> print(f"{hinge(policy, reference, beta=0.1):.2f}")
    0.85
    """
    reward = implicit_rewards(policy, reference, beta)
    return jax.nn.relu(1 - (reward.chosen - reward.rejected))  # relu: gradient 0 at the kink


@checked
def discopop(
    policy: Pair[ArrayLike], reference: Pair[ArrayLike], *, beta: ArrayLike, tau: ArrayLike
) -> Array:
    """Per-pair loss (1 - g) * -log sigmoid(m) + g * exp(-m), g = sigmoid(m / tau), of margin m.

    The log-ratio modulated loss of Lu et al. 2024 (DiscoPOP), who use tau = 0.05. Arguments as in
    `dpo`.

    >>> policy, reference = Pair(-12.0, -14.0), Pair(-12.5, -13.0)
    >>> print(f"{discopop(policy, reference, beta=0.1, tau=0.05):.3f}")
    0.849
    """
    reward = implicit_rewards(policy, reference, beta)
    margin = reward.chosen - reward.rejected
    logistic = -jax.nn.log_sigmoid(margin)
    # g exp(-m) in logarithms: exp(-m) alone overflows for very negative margins, and the product
    # does not if tau <= 1.
    exponential = jnp.exp(jax.nn.log_sigmoid(margin / tau) - margin)
    return jax.nn.sigmoid(-margin / tau) * logistic + exponential


@checked
def gpo(
    policy: Pair[ArrayLike],
    reference: Pair[ArrayLike],
    *,
    beta: ArrayLike,
    convex: Literal["logistic", "hinge", "squared", "exponential", "truncated_quadratic"],
) -> Array:
    """Per-pair loss f(m) of the margin m = r_w - r_l, for a convex function f.

    Generalised preference optimisation, Tang et al. 2024:
      logistic:            log(1 + exp(-m)), which is `dpo`
      hinge:               max(0, 1 - m), which is `hinge`
      squared:             (1 - m)^2, which is 4 tau^2 times `ipo` of sums with tau = beta / 2
      exponential:         exp(-m)
      truncated_quadratic: max(0, 1 - m)^2

    The exponent is at most 80, so that value and gradient stay finite; beyond it the gradient is 0.
    For an f of your own, apply it to the difference of `implicit_rewards`.

    Args:
      policy, reference: sequence log-probs, nats, any shape.
      beta: strength of the KL penalty, > 0.
      convex: which f.

    Raises:
      ValueError: an unknown `convex`.

    >>> policy, reference = Pair(-12.0, -14.0), Pair(-12.5, -13.0)
    >>> print(f"{gpo(policy, reference, beta=0.1, convex='exponential'):.3f}")
    0.861
    """
    if convex not in _CONVEX:
        raise ValueError(f"gpo: convex must be one of {list(_CONVEX)}, got {convex!r}")
    reward = implicit_rewards(policy, reference, beta)
    return _CONVEX[convex](jnp.asarray(reward.chosen - reward.rejected))


def _logistic(margin: Array) -> Array:
    return -jax.nn.log_sigmoid(margin)


def _hinge(margin: Array) -> Array:
    return jax.nn.relu(1 - margin)


def _squared(margin: Array) -> Array:
    return (1 - margin) ** 2


def _exponential(margin: Array) -> Array:
    return jnp.exp(jnp.minimum(-margin, 80.0))


def _truncated_quadratic(margin: Array) -> Array:
    return jax.nn.relu(1 - margin) ** 2


_CONVEX = {
    "logistic": _logistic,
    "hinge": _hinge,
    "squared": _squared,
    "exponential": _exponential,
    "truncated_quadratic": _truncated_quadratic,
}
