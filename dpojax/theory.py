"""The theory of direct preference optimisation on finite sets of responses.

Equation numbers are those of Rafailov et al. 2023. Arrays are [..., responses]: the last axis holds
all possible responses to one prompt. Policies are log-probabilities in nats, normalised over the
last axis. Rewards may have any unit; reward / beta is in nats.

>>> reference = jnp.log(jnp.array([0.5, 0.3, 0.2]))
>>> reward = jnp.array([0.0, 1.0, 2.0])
>>> best = optimal_policy(reference, reward, beta=1.0)
>>> [f"{p:.3f}" for p in jnp.exp(best).tolist()]
['0.179', '0.292', '0.529']
>>> print(f"{expected_reward(best, reward) - kl(best, reference):.4f}")
1.0272
>>> print(f"{log_partition(reference, reward, beta=1.0):.4f}")  # the value of the optimum, / beta
1.0272
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax import Array
from jax.typing import ArrayLike


def bradley_terry(better: ArrayLike, worse: ArrayLike) -> Array:
    """Probability sigmoid(r_better - r_worse) that the first response is preferred. Eq. 1.

    >>> print(f"{bradley_terry(1.0, 0.0):.3f}")
    0.731
    """
    return jax.nn.sigmoid(jnp.asarray(better) - worse)


def preferences(reward: Array) -> Array:
    """Bradley-Terry probability that response i is preferred to response j, [..., i, j].

    >>> preferences(jnp.zeros(2)).tolist()
    [[0.5, 0.5], [0.5, 0.5]]
    """
    return bradley_terry(jnp.expand_dims(reward, -1), jnp.expand_dims(reward, -2))


def plackett_luce(ranked: Array) -> Array:
    """Probability of a ranking, given the rewards of its responses, best first, [..., K] -> [...].

    prod_k exp(r_k) / sum_{j >= k} exp(r_j). Eq. 18.

    >>> print(f"{plackett_luce(jnp.zeros(3)):.4f}")  # 1 / 3!
    0.1667
    """
    # log sum_{j >= k} exp(r_j): the responses from which place k is filled.
    log_remaining = jax.lax.cumlogsumexp(ranked, axis=ranked.ndim - 1, reverse=True)
    return jnp.exp((ranked - log_remaining).sum(-1))


def implicit_reward(
    policy: Array, reference: Array, *, beta: ArrayLike, log_partition: ArrayLike = 0.0
) -> Array:
    """The reward beta (log policy - log reference + log Z) of which `policy` is optimal. Eq. 5.

    `log_partition` is a scalar, or [..., 1] with one number per prompt. Without it, the result is
    the reward of the equivalence class that has log Z = 0 (theorem 1).

    >>> implicit_reward(jnp.log(jnp.array([0.5, 0.5])), jnp.log(jnp.array([0.5, 0.5])), beta=2.0)
    Array([0., 0.], dtype=float32)
    """
    return beta * (policy - reference + log_partition)


def log_partition(reference: Array, reward: Array, *, beta: ArrayLike) -> Array:
    """log Z(x) = log sum_y reference(y | x) exp(r(x, y) / beta), nats, [...]. Below eq. 4.

    >>> print(f"{log_partition(jnp.log(jnp.array([0.5, 0.5])), jnp.ones(2), beta=0.5):.1f}")
    2.0
    """
    return jax.nn.logsumexp(reference + reward / beta, axis=-1)


def optimal_policy(reference: Array, reward: Array, *, beta: ArrayLike) -> Array:
    """log pi*(y | x) = log reference + r / beta - log Z, which maximises `objective`. Eq. 4.

    >>> policy = optimal_policy(jnp.log(jnp.array([0.5, 0.5])), jnp.array([0.0, 1.0]), beta=1.0)
    >>> [f"{p:.3f}" for p in jnp.exp(policy).tolist()]
    ['0.269', '0.731']
    """
    return jax.nn.log_softmax(reference + reward / beta, axis=-1)


def expected_reward(policy: Array, reward: Array) -> Array:
    """E_policy[r], [...].

    >>> print(expected_reward(jnp.log(jnp.array([0.5, 0.5])), jnp.array([1.0, 3.0])))
    2.0
    """
    return (jnp.exp(policy) * reward).sum(-1)


def kl(policy: Array, reference: Array) -> Array:
    """KL(policy || reference), nats, [...]; a response of probability 0 contributes 0.

    >>> print(f"{kl(jnp.log(jnp.array([1.0, 0.0])), jnp.log(jnp.array([0.5, 0.5]))):.4f}")
    0.6931
    """
    # Where p = 0 both logarithms are replaced: -inf - -inf would be NaN, and so would 0 * -inf.
    possible = policy > -jnp.inf
    ratio = jnp.where(possible, policy, 0.0) - jnp.where(possible, reference, 0.0)
    return jnp.where(possible, jnp.exp(policy) * ratio, 0.0).sum(-1)


def objective(policy: Array, reference: Array, reward: Array, *, beta: ArrayLike) -> Array:
    """E_policy[r] - beta KL(policy || reference), [...], what RLHF maximises. Eq. 3.

    >>> uniform = jnp.log(jnp.array([0.5, 0.5]))
    >>> print(objective(uniform, uniform, jnp.array([1.0, 3.0]), beta=0.1))
    2.0
    """
    return expected_reward(policy, reward) - beta * kl(policy, reference)


def project(reward: Array, reference: Array, *, beta: ArrayLike) -> Array:
    """The reward r - beta log Z(x): the one of its class that is an implicit reward. Theorem 1.

    Rewards are of one class if they differ by a function of the prompt only (definition 1).

    >>> uniform = jnp.log(jnp.array([0.5, 0.5]))
    >>> project(jnp.array([7.0, 7.0]), uniform, beta=1.0).tolist()
    [0.0, 0.0]
    """
    return reward - beta * jnp.expand_dims(log_partition(reference, reward, beta=beta), -1)


def reinforce(policy: Array, reward: Array, *, baseline: ArrayLike) -> Array:
    """The estimate of the expected reward's gradient from each single sample y.

    (r(y) - baseline) d log pi(y) / d logits for a softmax policy; Williams 1992. Its mean over
    y ~ policy is the gradient, for any baseline. Its variance depends on the baseline.

    Args:
      policy: log-probabilities, [..., responses].
      reward: [..., responses].
      baseline: a scalar, or [..., 1] with one number per prompt.

    Returns:
      [..., sampled response, logit].

    >>> print(reinforce(jnp.log(jnp.array([0.5, 0.5])), jnp.array([0.0, 1.0]), baseline=0.5))
    [[-0.25  0.25]
     [-0.25  0.25]]
    """
    # d log pi(y) / d logits = one-hot y - pi, [..., sampled response, logit].
    one_hot = jnp.broadcast_to(jnp.eye(policy.shape[-1]), (*policy.shape, policy.shape[-1]))
    scores = one_hot - jnp.expand_dims(jnp.exp(policy), -2)
    return jnp.expand_dims(reward - baseline, -1) * scores
