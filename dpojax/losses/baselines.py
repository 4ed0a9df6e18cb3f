"""Losses of the baselines: likelihood, unlikelihood and reward models."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax import Array
from jax.typing import ArrayLike

from dpojax.losses.pair import Pair


def sft(logprobs: Array) -> Array:
    """Negative log-likelihood, nats, one number per sequence (a sum over its tokens).

    Divide the batch's sum by its number of tokens for the usual token mean.

    >>> sft(jnp.array([-3.0])).tolist()
    [3.0]
    """
    return -logprobs


def unlikelihood(policy: Pair, *, alpha: ArrayLike) -> Array:
    """Per-pair loss -l_w + alpha l_l of the log-probs l; it has no lower bound.

    The baseline of Rafailov et al. 2023, section 6, after Welleck et al. 2019, who lower
    -log(1 - p) of single tokens instead.

    Args:
      policy: sequence log-probs, nats, any shape.
      alpha: weight of making the rejected response unlikely, in [0, 1].

    >>> print(f"{unlikelihood(Pair(-12.0, -14.0), alpha=0.5):.1f}")
    5.0
    """
    return -jnp.asarray(policy.chosen) + alpha * policy.rejected


def bradley_terry(scores: Pair, *, margin: ArrayLike = 0.0, centring: ArrayLike = 0.0) -> Array:
    """Per-pair loss -log sigmoid(s_w - s_l - margin) + centring (s_w + s_l)^2 of reward scores s.

    Rafailov et al. 2023, eq. 2. The margin is that of Touvron et al. 2023 (Llama 2); centring, by
    Eisenstein et al. 2023, picks the reward of mean zero among those with the same preferences.

    Args:
      scores: a reward model's outputs, any shape.
      margin: how far apart the pair ought to be: a scalar or the pairs' shape.
      centring: weight of the squared sum, >= 0.

    >>> print(f"{bradley_terry(Pair(2.0, -1.0), margin=3.0, centring=0.01):.3f}")
    0.703
    """
    gap = scores.chosen - scores.rejected - margin
    return -jax.nn.log_sigmoid(gap) + centring * (scores.chosen + scores.rejected) ** 2


def plackett_luce_scores(
    scores: Array,
    *,
    mask: ArrayLike | None = None,
    top: ArrayLike | None = None,
    ranks: ArrayLike | None = None,
) -> Array:
    """Negative log-likelihood of a ranking of K responses under reward scores.

    -sum_k (s_k - log sum_{j ranked k or behind} exp s_j). Plackett 1975; Rafailov et al. 2023,
    eq. 18. Two responses give `bradley_terry`. For the arguments see `plackett_luce`.

    >>> print(f"{plackett_luce_scores(jnp.zeros(3)):.3f}")  # log 3!
    1.792
    >>> print(f"{plackett_luce_scores(jnp.zeros(3), top=1):.3f}")  # log 3
    1.099
    """
    mask = jnp.ones(scores.shape, bool) if mask is None else jnp.asarray(mask, bool)
    if ranks is None:
        ranks = jnp.cumsum(mask, axis=-1) - 1
    scores = jnp.where(mask, scores, 0.0)
    not_ahead = jnp.expand_dims(ranks, -2) >= jnp.expand_dims(ranks, -1)
    # Every choice holds at least the response itself, so none is empty, not even an absent one's.
    itself = jnp.broadcast_to(jnp.eye(scores.shape[-1], dtype=bool), not_ahead.shape)
    choices = (not_ahead & jnp.expand_dims(mask, -2)) | itself
    others = jnp.broadcast_to(jnp.expand_dims(scores, -2), choices.shape)
    cost = jax.nn.logsumexp(others, axis=-1, where=choices) - scores
    counts = mask if top is None else mask & (ranks < top)
    return jnp.where(counts, cost, 0.0).sum(-1)
