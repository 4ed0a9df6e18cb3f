"""Policy gradients under a KL penalty: advantages, PPO's losses, shaped rewards, KL estimators.

Responses are [..., tokens] with a mask of the same shape, true where a token of the response
stands, its end-of-sequence token included. What stands elsewhere may be anything, NaN too, unless
a function says otherwise, and comes out as 0. Log-probs are in nats. Nothing here is averaged:
tokens and sequences go out one by one, and diagnostics as a sum and its weight; only `whiten`
needs the whole batch.

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
    """What a rollout teaches about each token, both [..., tokens], 0 where no token stands."""

    advantages: Array
    returns: Array  # what the value function is fitted to: advantages + values


class Sum(NamedTuple):
    """A weighted sum and its weight; a mean is the quotient of the sums over all parts."""

    total: Array
    weight: Array


class AdaptiveKL(NamedTuple):
    """The state of the controller of the KL penalty: its coefficient, > 0, in reward per nat."""

    coefficient: Array


def gae(
    rewards: Array, values: Array, mask: Array, *, discount: ArrayLike, gae_lambda: ArrayLike
) -> Advantages:
    """Generalised advantages A_t = sum_k (discount gae_lambda)^k d_{t+k}, and returns A_t + V_t.

    d_t = r_t + discount V_{t+1} - V_t, with V = 0 after the last token: a response is an episode
    that ends. Schulman et al. 2016, eq. 16. Decay (their lambda) 1 gives the discounted sum of
    the rewards to come minus V_t, gae_lambda 0 gives d_t. Masked tokens are stepped over.

    Args:
      rewards: of each token, [..., tokens].
      values: V before each token is chosen, [..., tokens], from the policy that sampled.
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
        here = (advantage, value)
        return jax.tree.map(lambda x, y: jnp.where(present, x, y), here, later), advantage

    time_first = jax.tree.map(lambda x: jnp.moveaxis(x, -1, 0), (rewards, values, mask))
    after = jnp.zeros(rewards.shape[:-1], dtype)
    _, advantages = jax.lax.scan(step, (after, after), time_first, reverse=True)
    advantages = jnp.where(mask, jnp.moveaxis(advantages, 0, -1), 0)
    return Advantages(advantages, advantages + values)


def whiten(x: Array, mask: Array, *, shift_mean: bool = True) -> Array:
    """Scale the present tokens of a batch to variance 1 (of n - 1) and, by default, to mean 0.

    Statistics run over all axes, so call it on the whole optimiser batch, before that is cut into
    micro-batches: then padding and sharding change nothing. As TRL whitens advantages (1e-8 is
    added to the variance); with `shift_mean=False`, as it whitens rewards, the mean stays.

    Args:
      x: any shape.
      mask: the shape of x.

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
    """PPO's loss of each token, -min(rho A, clip(rho, 1 - c, 1 + c) A) with rho = p / p_old.

    Schulman et al. 2017, eq. 7. Where the clipped term is the lesser the gradient is exactly 0,
    however large the ratio. Where it is not and A < 0, the loss grows with the ratio without a
    bound and overflows float32 for log-ratios over 88: no clamp hides that. A token whose
    advantage is 0, as `gae` has it for padding, costs 0 for any finite log-probs.

    Args:
      logprobs, old_logprobs: of the sampled tokens under the policy and the sampler, [..., tokens].
      advantages: [..., tokens], data (differentiate the log-probs only).
      clip: c > 0.

    Returns:
      [..., tokens], a loss.

    >>> ratio, advantage = jnp.array([1.5, 1.5]), jnp.array([1.0, -1.0])
    >>> loss = clipped_surrogate(jnp.log(ratio), jnp.zeros(2), advantage, clip=0.2)
    >>> [f"{x:.1f}" for x in loss.tolist()]
    ['-1.2', '1.5']
    """
    log_ratio = logprobs - old_logprobs
    clipped = _is_clipped(log_ratio, advantages, clip)
    bound = jnp.where(advantages >= 0, 1 + jnp.asarray(clip), 1 - jnp.asarray(clip))
    # The exponent is replaced too: the gradient of an overflow that is not chosen would be NaN.
    ratio = jnp.exp(jnp.where(clipped, 0, log_ratio))
    return -advantages * jnp.where(clipped, bound, ratio).astype(ratio.dtype)


def clipped_value_loss(
    values: Array, old_values: Array, returns: Array, *, clip: ArrayLike
) -> Array:
    """Half the greater of the squared errors of V and of V held to within c of its old value.

    1/2 max((V - R)^2, (clip(V, V_old - c, V_old + c) - R)^2) of each token, after the code of
    Schulman et al. 2017 (their paper has no value clip) and Ziegler et al. 2019. Absent tokens
    are not masked here; the loss is finite for any finite input that can be squared.

    Args:
      values, old_values, returns: [..., tokens]; only `values` is differentiated.
      clip: c > 0, in units of the reward.

    >>> loss = clipped_value_loss(jnp.array([1.0]), jnp.array([0.0]), jnp.array([2.0]), clip=0.5)
    >>> loss.tolist()  # 1.5 ** 2 / 2
    [1.125]
    """
    held = jnp.clip(values, old_values - clip, old_values + clip)
    return 0.5 * jnp.maximum((values - returns) ** 2, (held - returns) ** 2)


def kl_estimate(log_ratio: ArrayLike, *, estimator: Estimator) -> Array:
    """An estimate of KL(policy || reference) from samples of the policy, one for each log-ratio.

    Of d = log policy - log reference: k1 = d, unbiased; k2 = d^2 / 2, biased, never negative;
    k3 = exp(-d) - 1 + d, unbiased and never negative. Schulman 2020, "Approximating KL
    divergence". Of a token given its prefix they are summed over tokens to estimate the sequence's
    KL. k3 overflows float32 for d < -88. Unbiased values do not make unbiased gradients: the
    expected gradient of k1 is 0 and that of k2 is the KL's.

    Args:
      log_ratio: nats, any shape, of single tokens or of whole sequences.
      estimator: "k1", "k2" or "k3".

    Raises:
      ValueError: another estimator.

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
    """`kl_estimate` of each token summed over each response, nats, [..., tokens] -> [...].

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
    """Token rewards -c KL_t, and the response's score on top of that of its last token.

    Ziegler et al. 2019, eq. 2, token by token. With k1 their sum over a response is its score
    - c (log policy - log reference), whose expectation is the objective of Rafailov et al. 2023,
    eq. 3, and whose policy gradient is that objective's; with k2 or k3 it is not.

    Args:
      scores: of each response, [...].
      logprobs, reference_logprobs: of its tokens under the sampler and the reference,
        [..., tokens]; data.
      mask: [..., tokens]; a response without any token loses its score.
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
    to_come = jnp.flip(jnp.cumsum(jnp.flip(mask, -1), axis=-1), -1)
    score = jnp.where(mask & (to_come == 1), jnp.expand_dims(scores, -1), 0)
    return score - kl_coefficient * kl_estimate(log_ratio, estimator=kl_estimator)


def missing_eos_penalty(scores: Array, stopped: Array, penalty: ArrayLike) -> Array:
    """Scores less a penalty for responses that did not stop by themselves, any shape.

    `stopped` is true where the response ends with its end-of-sequence token and was not cut.

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
    """Raise the coefficient where the KL is over its target, lower it where it is below.

    c <- c (1 + e steps / horizon) with e = (KL - target) / target held to [-clip, clip]. Ziegler
    et al. 2019, section 2.2. `horizon=jnp.inf` leaves the coefficient fixed.

    Args:
      state: the coefficient, a scalar or one for each run of a sweep.
      kl: of the sequences, mean over the batch, nats.
      target: nats, > 0.
      steps: responses seen since the last update, less than horizon / clip.
      horizon: responses that an error of 1 would need to double the coefficient.

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
    """KL(sampler || policy) over the tokens of a rollout: how far its updates went, nats a token.

    `kl_estimate` of log sampler - log policy. TRL's `approxkl` is k2, whose sign does not matter.
    Arrays are [..., tokens]; the sum and the number of tokens are scalars.

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
    """In how many tokens `clipped_surrogate` is clipped, so that they teach nothing.

    As TRL counts, not every token whose ratio is out of bounds. Arrays are [..., tokens]; the sum
    and the number of tokens are scalars.

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
    ratio = jnp.exp(log_ratio)
    return jnp.where(advantages >= 0, ratio > 1 + jnp.asarray(clip), ratio < 1 - jnp.asarray(clip))


def _sum(values: Array, mask: Array) -> Sum:
    return Sum(jnp.where(mask, values, 0).sum(), mask.sum().astype(values.dtype))
