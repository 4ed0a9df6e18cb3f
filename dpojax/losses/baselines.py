"""Losses of the baselines: likelihood, unlikelihood and reward models."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax import Array
from jax.typing import ArrayLike

from dpojax.losses.checks import checked
from dpojax.losses.pair import Pair


@checked
def sft(logprobs: Array) -> Array:
    """Negative log-likelihood of each sequence, nats, summed over its tokens.

    For the usual mean over tokens, divide the sum over the batch by its number of tokens.

    >>> sft(jnp.array([-3.0])).tolist()
    [3.0]
    """
    return -logprobs


@checked
def unlikelihood(policy: Pair[ArrayLike], *, alpha: ArrayLike) -> Array:
    """Per-pair loss -l_w + alpha l_l of the log-probs l; it has no lower bound.

    The baseline of Rafailov et al. 2023, section 6. Departure from Welleck et al. 2019: they add
    -log(1 - p) of single tokens, which is bounded below.

    Args:
      policy: sequence log-probs, nats, any shape.
      alpha: weight of the rejected response, in [0, 1].

    >>> print(f"{unlikelihood(Pair(-12.0, -14.0), alpha=0.5):.1f}")
    5.0
    """
    return -jnp.asarray(policy.chosen) + alpha * policy.rejected


@checked
def bradley_terry(
    scores: Pair[ArrayLike], *, margin: ArrayLike = 0.0, centring: ArrayLike = 0.0
) -> Array:
    """Per-pair loss -log sigmoid(s_w - s_l - margin) + centring (s_w + s_l)^2 of reward scores s.

    Rafailov et al. 2023, eq. 2. The margin is that of Touvron et al. 2023 (Llama 2). Centring is
    that of Eisenstein et al. 2023: of all rewards with the same preferences, it picks the one with
    mean zero.

    Args:
      scores: a reward model's outputs, any shape.
      margin: by how much the chosen score should be larger: a scalar or the pairs' shape.
      centring: weight of the squared sum, >= 0.

    >>> print(f"{bradley_terry(Pair(2.0, -1.0), margin=3.0, centring=0.01):.3f}")
    0.703
    """
    gap = scores.chosen - scores.rejected - margin
    return -jax.nn.log_sigmoid(gap) + centring * (scores.chosen + scores.rejected) ** 2


@checked
def plackett_luce_scores(
    scores: Array,
    *,
    mask: ArrayLike | None = None,
    top: ArrayLike | None = None,
    ranks: ArrayLike | None = None,
) -> Array:
    """Negative log-likelihood of a ranking of K responses under reward scores.

    -sum_k (s_k - log sum_{j ranked k or behind} exp s_j). Plackett 1975; Rafailov et al. 2023,
    eq. 18. For two responses it is `bradley_terry`. For the arguments see `plackett_luce`.

    >>> print(f"{plackett_luce_scores(jnp.zeros(3)):.3f}")  # log 3!
    1.792
    >>> print(f"{plackett_luce_scores(jnp.zeros(3), top=1):.3f}")  # log 3
    1.099
    """
    mask = jnp.ones(scores.shape, bool) if mask is None else jnp.asarray(mask, bool)
    if ranks is None:
        ranks = jnp.cumsum(mask, axis=-1) - 1
    scores = jnp.where(mask, scores, 0.0)  # an absent score may be NaN
    # Entry [k, j]: whether response k is chosen from a set that contains response j.
    not_ahead = jnp.expand_dims(ranks, -2) >= jnp.expand_dims(ranks, -1)  # [..., K, K]
    # The set always contains k itself. So no logsumexp is over an empty set, whose gradient would
    # be NaN, not even that of an absent response.
    itself = jnp.broadcast_to(jnp.eye(scores.shape[-1], dtype=bool), not_ahead.shape)
    candidates = (not_ahead & jnp.expand_dims(mask, -2)) | itself
    candidate_scores = jnp.broadcast_to(jnp.expand_dims(scores, -2), candidates.shape)
    cost = jax.nn.logsumexp(candidate_scores, axis=-1, where=candidates) - scores  # [..., K]
    is_counted = mask if top is None else mask & (ranks < top)
    return jnp.where(is_counted, cost, 0.0).sum(-1)
