"""Weights on pairs, weights on tokens, and weighted sums of losses."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array
from jax.typing import ArrayLike

from dpojax.losses.checks import checked
from dpojax.losses.margin import per_token
from dpojax.losses.pair import Pair


@checked
def wpo_weights(
    policy: Pair[ArrayLike],
    *,
    lengths: Pair[ArrayLike],
    log_collision: Pair[ArrayLike] | None,
    clamp: ArrayLike | None,
) -> Array:
    """Compute weights of pairs: how likely the policy is to have written both responses.

    Multiply a pair loss by them. weight = exp(l_w / |w|) exp(l_l / |l|). With the correction, each
    mean log-prob is relative to that of the policy's own samples: (l - c) / |y|, where c is the sum
    over the tokens of log sum_v p_v^2. Zhou et al. 2024 (WPO). No gradient flows through a weight.

    Args:
      policy: sequence log-probs, nats, any shape.
      lengths: tokens of each response, clamped to at least 1.
      log_collision: c, the pairs' shape (TRL), or None for no correction (open-instruct).
      clamp: the largest weight, 1 in TRL 0.24 and open-instruct, or None (TRL 1.16).

    >>> policy, lengths = Pair(-12.0, -14.0), Pair(5, 4)
    >>> print(f"{wpo_weights(policy, lengths=lengths, log_collision=None, clamp=1.0):.5f}")
    0.00274
    """
    if log_collision is not None:
        policy = jax.tree.map(jnp.subtract, policy, log_collision)
    mean = per_token(policy, lengths)
    weight = jnp.exp(mean.chosen + mean.rejected)
    weight = weight if clamp is None else jnp.minimum(weight, clamp)
    return jax.lax.stop_gradient(weight)


class HeadTail(NamedTuple):
    """Log-probs of a pair, nats: of the first `shared_length` tokens, and of the later ones."""

    head: Pair[ArrayLike]
    tail: Pair[ArrayLike]


@checked
def shared_length(lengths: Pair[ArrayLike]) -> Array:
    """Compute min(|w|, |l|), the length that both responses of a pair have; any shape.

    >>> shared_length(Pair(5, 4)).item()
    4
    """
    return jnp.minimum(lengths.chosen, lengths.rejected)


@checked
def ld_logprobs(
    policy: HeadTail, reference: HeadTail, *, alpha: ArrayLike, weight_reference: bool
) -> tuple[Pair[Array], Pair[Array]]:
    """Weight the tokens by which the longer response exceeds the shorter one with alpha.

    Length-desensitised DPO, Liu et al. 2024. Log-probs become head + alpha * tail; give the result
    to any pair loss. With alpha = 1 nothing changes. In some systems the reference is weighted too
    (TRL 1), in others only the policy (TRL 0.24, LLaMA-Factory).

    Args:
      policy, reference: sums over the tokens before and after `shared_length`, any shape.
      alpha: weight of the tail, in [0, 1].
      weight_reference: whether the reference's tail gets the weight as well.

    Returns:
      Log-probs of the policy and of the reference, nats.

    >>> policy = HeadTail(Pair(-9.0, -14.0), Pair(-3.0, 0.0))
    >>> reference = HeadTail(Pair(-10.0, -13.0), Pair(-2.5, 0.0))
    >>> new, old = ld_logprobs(policy, reference, alpha=0.5, weight_reference=True)
    >>> print(new.chosen, old.chosen)
    -10.5 -11.25
    """
    reference_alpha = alpha if weight_reference else 1.0
    return _weight_tail(policy, alpha), _weight_tail(reference, reference_alpha)


def _weight_tail(parts: HeadTail, alpha: ArrayLike) -> Pair[Array]:
    return jax.tree.map(lambda head, tail: head + alpha * tail, parts.head, parts.tail)


def mixture(losses: Sequence[ArrayLike], weights: Sequence[ArrayLike]) -> Array:
    """Add up losses of the same examples, each times its weight.

    MPO (Wang et al. 2024, InternVL) is 0.8 `dpo` + 0.2 `bco` + 1.0 times a likelihood per token.
    DPO with a likelihood term (Pang et al. 2024; TRL calls it RPO) is
    `mixture([dpo(...), sft(chosen) / length], [1.0, alpha])`. Weights are not normalised.

    Args:
      losses: each with one number per example, or a scalar.
      weights: one for each loss.

    Raises:
      ValueError: the numbers of losses and weights differ, or are 0.

    >>> mixture([jnp.array([1.0, 2.0]), jnp.array([4.0, 0.0])], [0.5, 0.25]).tolist()
    [1.5, 1.0]
    """
    if not losses or len(losses) != len(weights):
        raise ValueError(f"mixture: got {len(losses)} losses and {len(weights)} weights")
    return sum((w * jnp.asarray(loss) for w, loss in zip(weights, losses)), jnp.zeros(()))
