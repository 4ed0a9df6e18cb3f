"""What PPO's two models minimise on an iteration's experience, as the train step needs it."""

from __future__ import annotations

import math
from typing import NamedTuple

import jax.numpy as jnp
from jax import Array

from dpojax import rl
from dpojax.data.packing import Buckets
from dpojax.logprobs import TokenStatistics, token_logprobs_and_entropy
from dpojax.models.decoder import Model
from dpojax.training.forward import (
    MAX_LOGITS,
    NO_FROZEN_WEIGHTS,
    NO_NUMBERS,
    Forward,
    FrozenWeights,
    scored_hidden,
)
from dpojax.training.metrics import Metric
from dpojax.training.objective import Hyper, Objective, Terms, masked_metric


class Experience(NamedTuple):
    """The responses of an iteration, [R, ...]: fields of `Rows`, and what was computed from them.

    Float arrays are [R, T], one number per scored token, 0 at padding.
    """

    tokens: Array
    positions: Array
    segment: Array
    branch: Array
    source: Array
    target: Array
    response: Array
    present: Array
    logprobs: Array  # nats, of the policy that sampled the responses
    values: Array  # of the value model at that time
    advantages: Array  # whitened over the batch
    returns: Array
    buckets: Buckets = Buckets()  # as in `Rows`


def hyper(
    *,
    learning_rate: float,
    value_learning_rate: float,
    clip: float = 0.2,
    value_clip: float = 0.2,
    discount: float = 1.0,
    gae_lambda: float = 0.95,
    kl_target: float = 6.0,
    kl_horizon: float = math.inf,
    missing_eos_penalty: float = 0.0,
    max_kl: float = math.inf,
    value_warmup: int = 0,
) -> Hyper:
    """Make PPO's numbers traced arrays, so that another value compiles nothing anew.

    Args:
      learning_rate, value_learning_rate: of the policy and of the value model.
      clip, value_clip: see `rl.clipped_surrogate` and `rl.clipped_value_loss`.
      discount, gae_lambda: see `rl.gae`.
      kl_target, kl_horizon: of the sequences' KL, see `rl.update_kl`. An infinite horizon leaves
        the state's coefficient unchanged. A finite one has to be over 0.2 times the number of an
        iteration's responses.
      missing_eos_penalty: is subtracted from the score of a response that was truncated.
      max_kl: nats per token (`rl.approx_kl`, of a minibatch). Once it is exceeded, the remaining
        minibatches of the iteration are skipped.
      value_warmup: iterations at the start that train the value model alone.
    """
    numbers = {
        "learning_rate": learning_rate,
        "value_learning_rate": value_learning_rate,
        "clip": clip,
        "value_clip": value_clip,
        "discount": discount,
        "gae_lambda": gae_lambda,
        "kl_target": kl_target,
        "kl_horizon": kl_horizon,
        "missing_eos_penalty": missing_eos_penalty,
        "max_kl": max_kl,
        "value_warmup": value_warmup,
    }
    return {name: jnp.asarray(number, jnp.float32) for name, number in numbers.items()}


def with_entropy(model: Model, *, max_logits: int = MAX_LOGITS) -> Forward:
    """Build the forward pass of a policy with an entropy bonus: log-probs and entropies [R, T]."""

    def forward(
        params: dict,
        rows,
        frozen: FrozenWeights = NO_FROZEN_WEIGHTS,
        hyper: Hyper = NO_NUMBERS,
    ) -> TokenStatistics:
        del frozen, hyper
        hidden, head = scored_hidden(model, params, rows), model.head(params)
        return token_logprobs_and_entropy(hidden, head, rows.target, max_logits=max_logits)

    return forward


def token_values(model: Model) -> Forward:
    """Build the value model's forward pass: the value before each token of the responses [R, T]."""

    def forward(
        params: dict,
        rows,
        frozen: FrozenWeights = NO_FROZEN_WEIGHTS,
        hyper: Hyper = NO_NUMBERS,
    ) -> Array:
        del frozen, hyper
        return model.scores(params, scored_hidden(model, params, rows))

    return forward


def policy_objective(entropy: float = 0.0) -> Objective:
    """The clipped surrogate minus `entropy` times the entropy, a mean over tokens."""

    def terms(outputs: TokenStatistics, part: Experience, hyper: Hyper) -> Terms:
        mask, new, old = part.response >= 0, outputs.logprob, part.logprobs
        new = jnp.where(mask, new, old)
        loss = rl.clipped_surrogate(new, old, part.advantages, clip=hyper["clip"])
        clipped = rl.clip_fraction(new, old, part.advantages, mask, clip=hyper["clip"])
        metrics = {
            "policy/approxkl_avg": Metric(*rl.approx_kl(new, old, mask)),
            "policy/clipfrac_avg": Metric(*clipped),
        }
        if entropy:
            loss = loss - entropy * outputs.entropy
            metrics["objective/entropy"] = masked_metric(outputs.entropy, mask)
        return _terms(loss, mask, metrics)

    return Objective(terms, needs_reference=False)


def value_objective() -> Objective:
    """The clipped value loss, a mean over tokens."""

    def terms(values: Array, part: Experience, hyper: Hyper) -> Terms:
        clip = hyper["value_clip"]
        loss = rl.clipped_value_loss(values, part.values, part.returns, clip=clip)
        return _terms(loss, part.response >= 0, {})

    return Objective(terms, needs_reference=False)


def _terms(loss: Array, mask: Array, metrics: dict[str, Metric]) -> Terms:
    """Sums [..., R, 1] over the scored tokens of each row."""
    total = jnp.where(mask, loss, 0.0).sum(-1, keepdims=True)
    return Terms(total, mask.sum(-1, keepdims=True).astype(jnp.float32), metrics)
