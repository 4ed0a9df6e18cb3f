"""Policy gradients under a KL penalty: advantages, PPO's losses, shaped rewards, KL estimators.

Arrays of tokens are [..., tokens]. A mask of the same shape is true for the tokens of the response,
its end-of-sequence token included. Values at other places may be anything, even NaN, unless a
function says otherwise; results are 0 there. Log-probs are in nats.

No function averages. Losses and rewards come out as one number per token or sequence, diagnostics
as a sum and its weight. Only `whiten` needs the whole batch.

>>> mask = jnp.array([True, True, False])
>>> policy, reference = jnp.array([-1.0, -2.0, 0.0]), jnp.array([-1.5, -1.0, 0.0])
>>> rewards = shape_rewards(jnp.array(1.0), policy, reference, mask, kl_coefficient=0.1)
>>> [f"{x:.2f}" for x in rewards.tolist()]
['-0.05', '1.10', '0.00']
>>> advantages, _ = gae(rewards, jnp.zeros(3), mask, discount=1.0, gae_lambda=0.95)
>>> [f"{x:.3f}" for x in advantages.tolist()]
['0.995', '1.100', '0.000']
"""

from __future__ import annotations

from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array
from jax.typing import ArrayLike

Estimator = Literal["k1", "k2", "k3"]


class Advantages(NamedTuple):
    """Advantages and returns of a rollout, [..., tokens] each, 0 where there is no token."""

    advantages: Array
    returns: Array  # the targets of the value function: advantages + values


class Sum(NamedTuple):
    """A weighted sum and its weight, scalars.

    To average over parts of a batch, add the totals, add the weights, and divide.
    """

    total: Array
    weight: Array


class AdaptiveKL(NamedTuple):
    """The state of the controller of the KL penalty."""

    coefficient: Array  # > 0, reward per nat


def gae(
    rewards: Array, values: Array, mask: Array, *, discount: ArrayLike, gae_lambda: ArrayLike
) -> Advantages:
    """Compute advantages A_t = sum_k (discount gae_lambda)^k d_{t+k} and returns A_t + V_t.

    Generalised advantage estimation, Schulman et al. 2016, eq. 16. d_t = r_t + discount V_{t+1} -
    V_t, with V = 0 after the last token, as a response is an episode that ends. With gae_lambda 1,
    A_t is the discounted sum of the later rewards minus V_t; with gae_lambda 0, it is d_t. Masked
    tokens are skipped: their neighbours are treated as adjacent.

    Args:
      rewards: the reward of each token, [..., tokens].
      values: V before each token is chosen, [..., tokens], of the policy that sampled.
      mask: [..., tokens].
      discount: gamma, in [0, 1].
      gae_lambda: lambda, in [0, 1].

    >>> rewards, values = jnp.array([0.0, 1.0]), jnp.array([0.5, 0.25])
    >>> out = gae(rewards, values, jnp.ones(2, bool), discount=1.0, gae_lambda=1.0)
    >>> print(out.advantages, out.returns)
    [0.5  0.75] [1. 1.]
    """
    dtype = jnp.result_type(rewards, values, jnp.float32)
    mask = jnp.asarray(mask, bool)
    rewards, values = (jnp.where(mask, x, 0).astype(dtype) for x in (rewards, values))
    discount = jnp.asarray(discount, dtype)
    trace = discount * jnp.asarray(gae_lambda, dtype)

    def step(later, token):
        next_advantage, next_value = later
        reward, value, present = token
        advantage = reward + discount * next_value - value + trace * next_advantage
        # A masked token hands on what came from the token after it.
        next_advantage = jnp.where(present, advantage, next_advantage)
        next_value = jnp.where(present, value, next_value)
        return (next_advantage, next_value), advantage

    time_first = tuple(jnp.moveaxis(x, -1, 0) for x in (rewards, values, mask))  # [tokens, ...]
    zero = jnp.zeros(rewards.shape[:-1], dtype)
    _, advantages = jax.lax.scan(step, (zero, zero), time_first, reverse=True)
    advantages = jnp.where(mask, jnp.moveaxis(advantages, 0, -1), 0)
    return Advantages(advantages, advantages + values)


def whiten(x: Array, mask: Array, *, shift_mean: bool = True) -> Array:
    """Scale the unmasked tokens of a batch to variance 1 and, by default, shift them to mean 0.

    Mean and variance are over all axes. So call it on the whole optimiser batch, before it is cut
    into micro-batches; then padding and sharding change nothing. As in TRL, the variance divides by
    n - 1, and 1e-8 is added to it. TRL whitens advantages with the shift, and rewards without.

    Args:
      x: any shape.
      mask: the shape of x.
      shift_mean: False keeps the mean.

    >>> whiten(jnp.array([1.0, 2.0, 3.0, 99.0]), jnp.array([1, 1, 1, 0])).tolist()
    [-1.0, 0.0, 1.0, 0.0]
    """
    mask = jnp.asarray(mask, bool)
    x = jnp.where(mask, x, 0)
    count = mask.sum()
    mean = x.sum() / jnp.maximum(count, 1)
    centred = jnp.where(mask, x - mean, 0)
    variance = (centred**2).sum() / jnp.maximum(count - 1, 1)
    scaled = centred * jax.lax.rsqrt(variance + 1e-8)
    return scaled if shift_mean else jnp.where(mask, scaled + mean, 0)


def clipped_surrogate(
    logprobs: Array, old_logprobs: Array, advantages: Array, *, clip: ArrayLike
) -> Array:
    """Compute PPO's loss of each token, -min(rho A, clip(rho, 1 - c, 1 + c) A), rho = p / p_old.

    Schulman et al. 2017, eq. 7. Where the clipped term is the smaller one, the gradient is exactly
    0, however large the ratio is. Where it is not and A < 0, the loss grows with the ratio without
    a bound. It then overflows float32 for log-ratios over 88; nothing is clamped to hide that. A
    token with advantage 0, which `gae` gives to padding, has loss 0 for any finite log-probs.

    Args:
      logprobs: log-probs of the sampled tokens under the policy, [..., tokens].
      old_logprobs: those under the policy that sampled.
      advantages: [..., tokens]; constants, so differentiate with respect to `logprobs` only.
      clip: c > 0.

    Returns:
      [..., tokens].

    >>> ratio, advantage = jnp.array([1.5, 1.5]), jnp.array([1.0, -1.0])
    >>> loss = clipped_surrogate(jnp.log(ratio), jnp.zeros(2), advantage, clip=0.2)
    >>> [f"{x:.1f}" for x in loss.tolist()]
    ['-1.2', '1.5']
    """
    log_ratio = logprobs - old_logprobs
    clipped = _is_clipped(log_ratio, advantages, clip)
    bound = jnp.where(advantages >= 0, 1 + jnp.asarray(clip), 1 - jnp.asarray(clip))
    # The exponent is replaced too: an overflow that `where` does not choose has a NaN gradient.
    ratio = jnp.exp(jnp.where(clipped, 0, log_ratio))
    return -advantages * jnp.where(clipped, bound, ratio).astype(ratio.dtype)


def clipped_value_loss(
    values: Array, old_values: Array, returns: Array, *, clip: ArrayLike
) -> Array:
    """Compute 1/2 max((V - R)^2, (clip(V, V_old - c, V_old + c) - R)^2) of each token.

    So V is pulled towards the return R, but gets no gradient once it is more than c away from its
    old value on the way there. This is in the code of Schulman et al. 2017, not in their paper, and
    in Ziegler et al. 2019. Absent tokens are not masked here. The loss is finite for any finite
    input whose square is finite.

    Args:
      values, old_values, returns: [..., tokens]; only `values` is differentiated.
      clip: c > 0, in units of the reward.

    Returns:
      [..., tokens].

    >>> loss = clipped_value_loss(jnp.array([1.0]), jnp.array([0.0]), jnp.array([2.0]), clip=0.5)
    >>> loss.tolist()  # 1.5 ** 2 / 2
    [1.125]
    """
    clipped = jnp.clip(values, old_values - clip, old_values + clip)
    return 0.5 * jnp.maximum((values - returns) ** 2, (clipped - returns) ** 2)


def kl_estimate(log_ratio: ArrayLike, *, estimator: Estimator) -> Array:
    """Estimate KL(policy || reference) from samples of the policy, one estimate per log-ratio.

    Schulman 2020, "Approximating KL divergence", with d = log policy - log reference:
      k1: d, unbiased
      k2: d^2 / 2, biased, never negative
      k3: exp(-d) - 1 + d, unbiased, never negative; overflows float32 for d < -88

    The sum over the tokens of a sequence estimates the KL of sequences. An unbiased value does not
    mean an unbiased gradient: the expected gradient of k1 is 0, and that of k2 is the gradient of
    the KL.

    Args:
      log_ratio: d, nats, any shape, of single tokens or of whole sequences.
      estimator: "k1", "k2" or "k3".

    Raises:
      ValueError: an unknown estimator.

    >>> [f"{kl_estimate(-0.5, estimator=k):.4f}" for k in ("k1", "k2", "k3")]
    ['-0.5000', '0.1250', '0.1487']
    """
    d = jnp.asarray(log_ratio)
    if estimator == "k1":
        return d
    if estimator == "k2":
        return d**2 / 2
    if estimator == "k3":
        return jnp.expm1(-d) + d  # exp(-d) - 1 would lose the digits of a small d
    raise ValueError(f"kl_estimate: estimator must be 'k1', 'k2' or 'k3', got {estimator!r}")


def sequence_kl(
    logprobs: Array, reference_logprobs: Array, mask: Array, *, estimator: Estimator = "k1"
) -> Array:
    """Sum `kl_estimate` over the tokens of each response, nats, [..., tokens] -> [...].

    >>> policy, reference = jnp.array([-1.0, -2.0, 0.0]), jnp.array([-1.5, -1.0, 7.0])
    >>> print(sequence_kl(policy, reference, jnp.array([1, 1, 0])))
    -0.5
    """
    log_ratio = jnp.where(jnp.asarray(mask, bool), logprobs - reference_logprobs, 0)
    return kl_estimate(log_ratio, estimator=estimator).sum(-1)


def shape_rewards(
    scores: Array,
    logprobs: Array,
    reference_logprobs: Array,
    mask: Array,
    *,
    kl_coefficient: ArrayLike,
    kl_estimator: Estimator = "k1",
) -> Array:
    """Compute token rewards -c KL_t, plus the response's score at its last token.

    Ziegler et al. 2019, eq. 2, token by token. With k1, the sum over a response is its score -
    c (log policy - log reference). The expectation of this sum is the objective of Rafailov et al.
    2023, eq. 3, and its policy gradient is that of the objective. With k2 or k3 it is not.

    Args:
      scores: the score of each response, [...].
      logprobs: log-probs of its tokens under the policy that sampled, [..., tokens]; constants.
      reference_logprobs: those under the reference; constants.
      mask: [..., tokens]; the score of a response without tokens is lost.
      kl_coefficient: c >= 0, reward per nat (the beta of DPO).
      kl_estimator: see `kl_estimate`.

    Returns:
      [..., tokens].

    >>> even, mask = jnp.log(jnp.array([0.5, 0.5])), jnp.ones(2, bool)
    >>> shape_rewards(jnp.array(2.0), even, even, mask, kl_coefficient=0.1).tolist()
    [0.0, 2.0]
    """
    mask = jnp.asarray(mask, bool)
    log_ratio = jnp.where(mask, logprobs - reference_logprobs, 0)
    # How many tokens are left at each place, itself included; the last token has 1.
    tokens_left = jnp.flip(jnp.cumsum(jnp.flip(mask, -1), axis=-1), -1)
    is_last = mask & (tokens_left == 1)
    score = jnp.where(is_last, jnp.expand_dims(scores, -1), 0)
    return score - kl_coefficient * kl_estimate(log_ratio, estimator=kl_estimator)


def missing_eos_penalty(scores: Array, stopped: Array, penalty: ArrayLike) -> Array:
    """Subtract a penalty from the scores of responses that were cut off, any shape.

    `stopped` is true where the response ends with its end-of-sequence token.

    >>> missing_eos_penalty(jnp.array([1.0, 1.0]), jnp.array([True, False]), 3.0).tolist()
    [1.0, -2.0]
    """
    return scores - jnp.where(stopped, 0.0, penalty)


def update_kl(
    state: AdaptiveKL,
    kl: ArrayLike,
    *,
    target: ArrayLike,
    steps: ArrayLike,
    horizon: ArrayLike,
    clip: ArrayLike = 0.2,
) -> AdaptiveKL:
    """Raise the coefficient if the KL is above its target; lower it if the KL is below.

    c <- c (1 + e steps / horizon) with e = (KL - target) / target, clipped to [-clip, clip].
    Ziegler et al. 2019, section 2.2. `horizon=jnp.inf` keeps the coefficient fixed.

    Args:
      state: the coefficient, a scalar or one for each run of a sweep.
      kl: KL of the sequences, mean over the batch, nats.
      target: nats, > 0.
      steps: responses seen since the last update, less than horizon / clip.
      horizon: the number of responses over which an error e of 1 would double c.
      clip: the largest |e|.

    >>> state = AdaptiveKL(jnp.array(0.1))
    >>> state = update_kl(state, 12.0, target=6.0, steps=256, horizon=10000)
    >>> print(f"{state.coefficient:.6f}")  # 0.1 * (1 + 0.2 * 0.0256)
    0.100512
    """
    error = jnp.clip(jnp.asarray(kl) / target - 1, -clip, clip)
    return AdaptiveKL(state.coefficient * (1 + error * steps / horizon))


def approx_kl(
    logprobs: Array, old_logprobs: Array, mask: Array, *, estimator: Estimator = "k3"
) -> Sum:
    """Estimate KL(sampler || policy), nats, over the tokens of a rollout.

    It measures how far the updates have moved the policy since it sampled. It is `kl_estimate` of
    log sampler - log policy. TRL's `approxkl` is k2, for which the sign does not matter.

    Args:
      logprobs, old_logprobs: under the policy and the policy that sampled, [..., tokens].
      mask: [..., tokens].
      estimator: see `kl_estimate`.

    Returns:
      The sum over tokens, and the number of tokens.

    >>> total, weight = approx_kl(jnp.array([-1.0, 0.0]), jnp.array([-1.1, 0.0]), jnp.ones(2))
    >>> print(f"{total:.5f} {weight:.0f}")
    0.00517 2
    """
    mask = jnp.asarray(mask, bool)
    log_ratio = jnp.where(mask, old_logprobs - logprobs, 0)
    return _sum(kl_estimate(log_ratio, estimator=estimator), mask)


def clip_fraction(
    logprobs: Array, old_logprobs: Array, advantages: Array, mask: Array, *, clip: ArrayLike
) -> Sum:
    """Count the tokens at which `clipped_surrogate` is clipped, so that their gradient is 0.

    As in TRL, a token whose ratio is out of bounds counts only if the loss is clipped there.
    Arguments as in `clipped_surrogate`, and `mask`, [..., tokens].

    Returns:
      The number of clipped tokens, and the number of tokens.

    >>> ratio, advantage = jnp.array([1.5, 1.5]), jnp.array([1.0, -1.0])
    >>> total, weight = clip_fraction(
    ...     jnp.log(ratio), jnp.zeros(2), advantage, jnp.ones(2), clip=0.2
    ... )
    >>> print(f"{total:.0f} of {weight:.0f}")
    1 of 2
    """
    mask = jnp.asarray(mask, bool)
    clipped = _is_clipped(logprobs - old_logprobs, advantages, clip) & (advantages != 0)
    return _sum(clipped.astype(jnp.float32), mask)


def _is_clipped(log_ratio: Array, advantages: Array, clip: ArrayLike) -> Array:
    """Where the clipped term is the smaller one: above 1 + c if A >= 0, below 1 - c if A < 0."""
    ratio = jnp.exp(log_ratio)
    return jnp.where(advantages >= 0, ratio > 1 + jnp.asarray(clip), ratio < 1 - jnp.asarray(clip))


def _sum(values: Array, mask: Array) -> Sum:
    return Sum(jnp.where(mask, values, 0).sum(), mask.sum().astype(values.dtype))
