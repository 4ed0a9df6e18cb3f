"""Losses of pairs whose labels are flipped, uncertain or tied."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax import Array
from jax.typing import ArrayLike

from dpojax.losses.checks import checked
from dpojax.losses.margin import dpo, implicit_rewards
from dpojax.losses.pair import Pair


@checked
def robust(
    policy: Pair[ArrayLike],
    reference: Pair[ArrayLike],
    *,
    beta: ArrayLike,
    label_smoothing: ArrayLike,
) -> Array:
    """Per-pair loss that is unbiased if labels are flipped with probability e.

    ((1 - e) * -log sigmoid(m) - e * -log sigmoid(-m)) / (1 - 2 e) of the margin m of the implicit
    rewards. Chowdhury et al. 2024 (rDPO). For e > 0 it can be negative and has no lower bound.

    Args:
      policy, reference: sequence log-probs, nats, any shape.
      beta: strength of the KL penalty, > 0.
      label_smoothing: the flip rate e, in [0, 0.5).

    Raises:
      ValueError: a Python number out of that range (the values of arrays are not checked).

    >>> policy, reference = Pair(-12.0, -14.0), Pair(-12.5, -13.0)
    >>> print(f"{robust(policy, reference, beta=0.1, label_smoothing=0.1):.3f}")
    0.602
    """
    if isinstance(label_smoothing, int | float) and not 0 <= label_smoothing < 0.5:
        raise ValueError(f"robust: label_smoothing must be in [0, 0.5), got {label_smoothing}")
    reward = implicit_rewards(policy, reference, beta)
    margin = reward.chosen - reward.rejected
    right = (1 - label_smoothing) * jax.nn.log_sigmoid(margin)
    wrong = label_smoothing * jax.nn.log_sigmoid(-margin)
    return (wrong - right) / (1 - 2 * label_smoothing)


@checked
def exo(
    policy: Pair[ArrayLike],
    reference: Pair[ArrayLike],
    *,
    beta: ArrayLike,
    label_smoothing: ArrayLike,
) -> Array:
    """Per-pair reverse KL between the policy's preference and the smoothed label.

    KL(Bernoulli(sigmoid(m)) || Bernoulli(1 - e)) of the margin m of the implicit rewards.
    Ji et al. 2024 (EXO with K = 2).

    Args:
      policy, reference: sequence log-probs, nats, any shape.
      beta: strength of the KL penalty, > 0.
      label_smoothing: e in (0, 0.5), usually 1e-3; the loss is infinite at e = 0.

    Raises:
      ValueError: a Python number out of that range (the values of arrays are not checked).

    >>> policy, reference = Pair(-12.0, -14.0), Pair(-12.5, -13.0)
    >>> print(f"{exo(policy, reference, beta=0.1, label_smoothing=1e-3):.3f}")
    2.506
    """
    if isinstance(label_smoothing, int | float) and not 0 < label_smoothing < 0.5:
        raise ValueError(f"exo: label_smoothing must be in (0, 0.5), got {label_smoothing}")
    reward = implicit_rewards(policy, reference, beta)
    margin = reward.chosen - reward.rejected
    right = jax.nn.log_sigmoid(margin) - jnp.log1p(-jnp.asarray(label_smoothing))
    wrong = jax.nn.log_sigmoid(-margin) - jnp.log(label_smoothing)
    return jax.nn.sigmoid(margin) * right + jax.nn.sigmoid(-margin) * wrong


@checked
def dpo_soft(
    policy: Pair[ArrayLike], reference: Pair[ArrayLike], *, beta: ArrayLike, probability: ArrayLike
) -> Array:
    """Per-pair cross-entropy -p log sigmoid(m) - (1 - p) log sigmoid(-m) of a soft label p.

    The expectation of DPO's loss (Rafailov et al. 2023, eq. 7) over labels that prefer the chosen
    response with probability p. Such labels are the votes of several raters, or a reward model's
    probability.

    Args:
      policy, reference: sequence log-probs, nats, any shape.
      beta: strength of the KL penalty, > 0.
      probability: p of each pair, in [0, 1]: a scalar or the pairs' shape.

    >>> policy, reference = Pair(-12.0, -14.0), Pair(-12.5, -13.0)
    >>> print(f"{dpo_soft(policy, reference, beta=0.1, probability=0.75):.3f}")
    0.658
    """
    return dpo(policy, reference, beta=beta, label_smoothing=1 - jnp.asarray(probability))


@checked
def dpo_ties(
    policy: Pair[ArrayLike],
    reference: Pair[ArrayLike],
    *,
    beta: ArrayLike,
    tie: ArrayLike,
    threshold: ArrayLike,
) -> Array:
    """Per-pair negative log-likelihood of wins and ties.

    m is the margin of the implicit rewards and a the threshold. In the model of Rao & Kupper 1967,
    P(win) = sigmoid(m - a) and P(tie) = (exp(2 a) - 1) sigmoid(m - a) sigmoid(-m - a). With
    implicit rewards it is the DPO-RK of Chen et al. 2024 ("On extending DPO to accommodate ties"),
    whose nu is exp(a).

    Args:
      policy, reference: sequence log-probs, nats, any shape.
      beta: strength of the KL penalty, > 0.
      tie: 1 where the pair was judged equal, 0 where the chosen response won; a scalar or the
        pairs' shape.
      threshold: a > 0, the margin in nats below which ties are likely.

    >>> policy, reference = Pair(-12.0, -14.0), Pair(-12.5, -13.0)
    >>> print(f"{dpo_ties(policy, reference, beta=0.1, tie=0, threshold=1.0):.3f}")
    1.206
    >>> print(f"{dpo_ties(policy, reference, beta=0.1, tie=1, threshold=1.0):.3f}")
    0.776
    """
    reward = implicit_rewards(policy, reference, beta)
    margin = reward.chosen - reward.rejected
    # -log P(tie) is -log P(win) and these two terms, so `tie` only has to switch them on.
    tie_terms = -jax.nn.log_sigmoid(-margin - threshold) - jnp.log(jnp.expm1(2 * threshold))
    return -jax.nn.log_sigmoid(margin - threshold) + tie * tie_terms
