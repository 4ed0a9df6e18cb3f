"""Pair losses that use more than log-probs about each pair: an offset, a KL, a reward's scores."""

from __future__ import annotations

from typing import Literal

import jax
import jax.numpy as jnp
from jax import Array
from jax.typing import ArrayLike

from dpojax.losses.checks import checked
from dpojax.losses.margin import dpo_norm, implicit_rewards, log_ratios, per_token
from dpojax.losses.pair import Pair


@checked
def odpo(
    policy: Pair[ArrayLike], reference: Pair[ArrayLike], *, beta: ArrayLike, offset: ArrayLike
) -> Array:
    """Per-pair loss -log sigmoid(r_chosen - r_rejected - offset) with r the implicit rewards.

    DPO with an offset, Amini et al. 2024. The better the chosen response is, the larger a margin
    the loss asks for: in the paper, offset = alpha log(score_w - score_l).

    Args:
      policy, reference: sequence log-probs, nats, any shape.
      beta: strength of the KL penalty, > 0.
      offset: the target margin of each pair, nats: a scalar or the pairs' shape.

    >>> policy, reference = Pair(-12.0, -14.0), Pair(-12.5, -13.0)
    >>> print(f"{odpo(policy, reference, beta=0.1, offset=0.15):.3f}")
    0.693
    """
    reward = implicit_rewards(policy, reference, beta)
    return -jax.nn.log_sigmoid(reward.chosen - reward.rejected - offset)


@checked
def dpop(
    policy: Pair[ArrayLike], reference: Pair[ArrayLike], *, beta: ArrayLike, penalty: ArrayLike
) -> Array:
    """Per-pair loss -log sigmoid(beta (d_w - d_l - penalty max(0, -d_w))) of the log-ratios d.

    DPO-Positive, Pal et al. 2024. It adds a penalty where the chosen response is less likely under
    the policy than under the reference. With penalty 0 it is `dpo`.

    Args:
      policy, reference: sequence log-probs, nats, any shape.
      beta: strength of the KL penalty, > 0.
      penalty: weight of the lost log-prob, >= 0; their lambda.

    >>> policy, reference = Pair(-13.0, -14.0), Pair(-12.5, -13.0)
    >>> print(f"{dpop(policy, reference, beta=0.1, penalty=1.0):.3f}")
    0.693
    """
    ratio = log_ratios(policy, reference)
    lost_logprob = jax.nn.relu(-ratio.chosen)
    return -jax.nn.log_sigmoid(beta * (ratio.chosen - ratio.rejected - penalty * lost_logprob))


@checked
def tdpo(
    policy: Pair[ArrayLike],
    reference: Pair[ArrayLike],
    *,
    beta: ArrayLike,
    kl: Pair[ArrayLike],
    alpha: ArrayLike,
    stop_chosen: bool,
) -> Array:
    """Per-pair loss -log sigmoid(beta (d_w - d_l - alpha (kl_l - kl_w))) of the log-ratios d.

    Token-level DPO, Zeng et al. 2024. TDPO1 has alpha = 1 and all gradients. TDPO2 weights the KL
    difference with alpha, and no gradient flows through kl_w (`stop_chosen`).

    Args:
      policy, reference: sequence log-probs, nats, any shape.
      beta: strength of the KL penalty, > 0.
      kl: for each response, KL(reference || policy) of the next-token distributions, summed over
        its tokens; nats, the pairs' shape.
      alpha: weight of the difference of the two KL sums.
      stop_chosen: whether the chosen response's KL gets no gradient.

    >>> policy, reference = Pair(-12.0, -14.0), Pair(-12.5, -13.0)
    >>> kl = Pair(0.5, 2.0)
    >>> print(f"{tdpo(policy, reference, beta=0.1, kl=kl, alpha=1.0, stop_chosen=False):.3f}")
    0.693
    """
    ratio = log_ratios(policy, reference)
    chosen = jax.lax.stop_gradient(kl.chosen) if stop_chosen else kl.chosen
    kl_difference = alpha * (kl.rejected - chosen)
    return -jax.nn.log_sigmoid(beta * (ratio.chosen - ratio.rejected - kl_difference))


@checked
def rpo(
    policy: Pair[ArrayLike],
    reference: Pair[ArrayLike],
    *,
    beta: ArrayLike,
    scores: Pair[ArrayLike],
    scale: ArrayLike,
    form: Literal["sq", "bwd_kl", "fwd_kl"],
) -> Array:
    """Per-pair distance between the implicit margin b and the margin g of a reward model.

    Reward-aware preference optimisation (Adler et al. 2024, Nemotron-4; Sun et al. 2025), with
    g = scale (score_w - score_l), in NeMo-Aligner's names:
      sq:     (b - g)^2
      bwd_kl: KL(Bernoulli(sigmoid(g)) || Bernoulli(sigmoid(b)))
      fwd_kl: KL(Bernoulli(sigmoid(b)) || Bernoulli(sigmoid(g)))

    Args:
      policy, reference: sequence log-probs, nats, any shape.
      beta: strength of the KL penalty, > 0.
      scores: the reward model's scores of the responses, the pairs' shape.
      scale: nats per unit of the scores.
      form: which distance.

    Raises:
      ValueError: an unknown `form`.

    >>> policy, reference = Pair(-12.0, -14.0), Pair(-12.5, -13.0)
    >>> print(f"{rpo(policy, reference, beta=0.2, scores=Pair(1., 0.), scale=1., form='sq'):.2f}")
    0.49
    """
    reward = implicit_rewards(policy, reference, beta)
    implicit_margin = reward.chosen - reward.rejected
    target_margin = jnp.asarray(scale * (scores.chosen - scores.rejected))
    if form == "sq":
        return (implicit_margin - target_margin) ** 2
    if form == "bwd_kl":
        return _bernoulli_kl(target_margin, implicit_margin)
    if form == "fwd_kl":
        return _bernoulli_kl(implicit_margin, target_margin)
    raise ValueError(f"rpo: form must be 'sq', 'bwd_kl' or 'fwd_kl', got {form!r}")


@checked
def mappo(
    policy: Pair[ArrayLike],
    reference: Pair[ArrayLike],
    *,
    beta: ArrayLike,
    score_gap: ArrayLike,
) -> Array:
    """Per-pair loss -log sigmoid(r_chosen - score_gap r_rejected) with r the implicit rewards.

    Maximum-a-posteriori preference optimisation (MaPPO), Lan et al. 2025, eq. 8. The nearer the two
    scores of a pair are, the less the loss pushes the rejected response down. With a gap of 1 it is
    `dpo`; with 0 the rejected response gets no gradient.

    Args:
      policy, reference: sequence log-probs, nats, any shape.
      beta: strength of the KL penalty, > 0.
      score_gap: score_w - score_l of a reward model with scores in [0, 1], so in [0, 1]: a scalar
        or the pairs' shape; their Delta_r.

    >>> policy, reference = Pair(-12.0, -14.0), Pair(-12.5, -13.0)
    >>> print(f"{mappo(policy, reference, beta=0.1, score_gap=0.5):.3f}")
    0.644
    """
    reward = implicit_rewards(policy, reference, beta)
    return -jax.nn.log_sigmoid(reward.chosen - score_gap * reward.rejected)


@checked
def uni_dpo(
    policy: Pair[ArrayLike],
    reference: Pair[ArrayLike],
    *,
    beta: ArrayLike,
    lengths: Pair[ArrayLike],
    scores: Pair[ArrayLike],
    scale: ArrayLike,
    margin: ArrayLike,
    gamma: ArrayLike,
    alpha: ArrayLike,
    good_score: ArrayLike,
) -> Array:
    """Per-pair `dpo_norm`, weighted by the quality of the pair and by what the policy has to learn.

    quality * hardness * -log sigmoid(beta (d_w / |w| - d_l / |l|)) + alpha nll, where
      quality  = sigmoid(scale (score_w - score_l))
      hardness = sigmoid(margin - beta (l_w / |w| - l_l / |l|))^gamma
      nll      = -l_w / |w| where the policy finds a good chosen response less likely than the
                 reference does (d_w < 0 and score_w >= good_score), else 0

    Uni-DPO, Peng et al. 2026, as in the authors' code for text. A gradient flows through
    `hardness`, too. With scale = gamma = alpha = 0 it is half of `dpo_norm`.

    Args:
      policy, reference: sequence log-probs, nats, any shape.
      beta: scale of the per-token rewards, > 0: 2 in their code.
      lengths: tokens of each response, clamped to at least 1.
      scores: a judge's or a reward model's scores of the responses, the pairs' shape.
      scale: nats per unit of the scores; their eta.
      margin: target of beta (l_w / |w| - l_l / |l|), nats; their tau_ref.
      gamma: how much well-separated pairs are weighed down, >= 0.
      alpha: weight of the likelihood; their lambda.
      good_score: a chosen response with this score or more is a good one; their tau_good.

    >>> policy, reference = Pair(-12.0, -14.0), Pair(-12.5, -13.0)
    >>> loss = uni_dpo(policy, reference, beta=2.0, lengths=Pair(5, 4), scores=Pair(8.0, 6.0),
    ...                scale=0.1, margin=0.8, gamma=1.0, alpha=0.01, good_score=7.0)
    >>> print(f"{loss:.4f}")
    0.0439
    """
    absolute = per_token(policy, lengths)
    separation = beta * (absolute.chosen - absolute.rejected)
    quality = jax.nn.sigmoid(scale * (scores.chosen - scores.rejected))
    # sigmoid(z)^gamma in logarithms: its gradient stays finite where sigmoid(z) rounds to 0.
    hardness = jnp.exp(gamma * jax.nn.log_sigmoid(margin - separation))
    sunk = (policy.chosen < reference.chosen) & (scores.chosen >= good_score)
    nll = jnp.where(sunk, -absolute.chosen, 0.0)
    return (
        quality * hardness * dpo_norm(policy, reference, beta=beta, lengths=lengths) + alpha * nll
    )


def _bernoulli_kl(first: Array, second: Array) -> Array:
    """KL(Bernoulli(sigmoid(first)) || Bernoulli(sigmoid(second))) of two logits.

    log(1 - sigmoid(x)) is log_sigmoid(-x), which is exact where 1 - sigmoid(x) rounds to 0.
    """
    log_sigmoid = jax.nn.log_sigmoid
    yes = jax.nn.sigmoid(first) * (log_sigmoid(first) - log_sigmoid(second))
    no = jax.nn.sigmoid(-first) * (log_sigmoid(-first) - log_sigmoid(-second))
    return yes + no
