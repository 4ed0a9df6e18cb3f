"""What PPO makes of scored responses: log-probs, values, shaped rewards, advantages."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp
from jax import Array

from dpojax import rl
from dpojax.data.rows import Rows
from dpojax.methods.ppo.objectives import Experience, token_values
from dpojax.methods.ppo.rollouts import PPOState, Responses
from dpojax.methods.ppo.settings import PPO
from dpojax.models.decoder import Model
from dpojax.sharding import ROWS, constrain
from dpojax.training.forward import MAX_LOGITS, row_logprobs
from dpojax.training.metrics import Metric
from dpojax.training.micro_batches import map_present
from dpojax.training.objective import Hyper, masked_metric, summed_metrics


def build_experience(
    policy: Model, value: Model, settings: PPO, *, max_logits: int = MAX_LOGITS
) -> Callable[..., tuple[Experience, dict[str, Metric]]]:
    """Build what turns an iteration's responses into experience.

    Log-probs and values come from the forward passes that train, in parts of the same size. So the
    first minibatch finds ratios of 1.

    Returns:
      (state, reference_params, responses, scores [N], hyper) -> (experience, metrics).
    """
    logprobs_of = partial(row_logprobs, policy, max_logits=max_logits)

    def prepare(
        state: PPOState, reference_params: dict, responses: Responses, scores: Array, hyper: Hyper
    ) -> tuple[Experience, dict[str, Metric]]:
        rows = jax.tree.map(lambda x: constrain(x, ROWS), responses.rows)
        parts = _cut(rows, settings)
        by_token = partial(_by_token, parts, rows.response >= 0)
        logprobs = by_token(logprobs_of, state.policy.params)  # [R, S]
        reference = by_token(logprobs_of, reference_params)
        values = by_token(token_values(value), state.value.params)
        arrays = map(responses.by_response, (logprobs, reference, values))  # [N, T]
        advantages, returns, metrics = _advantages(
            *arrays, responses, scores.astype(jnp.float32), state, settings, hyper
        )
        experience = Experience(
            tokens=rows.tokens,
            positions=rows.positions,
            segment=rows.segment,
            branch=rows.branch,
            source=rows.source,
            target=rows.target,
            response=rows.response,
            present=rows.present,
            logprobs=logprobs,
            values=values,
            advantages=responses.by_token(advantages),
            returns=responses.by_token(returns),
        )
        return experience, metrics

    return prepare


def over_rows(tree):
    """Micro-batches [M, R, ...] with their rows over the mesh."""
    return jax.tree.map(lambda x: constrain(x, None, ROWS), tree)


def _cut(rows: Rows, settings: PPO) -> Rows:
    """Rows [R, ...] as parts [P, R / P, ...] of a micro-batch's size.

    A part gets every P-th row, so that the devices' rows stay where they are.

    Raises:
      ValueError: the number of rows is no multiple of the number of parts.
    """
    parts = settings.minibatches * settings.micro_batches
    if len(rows.tokens) % parts:
        raise ValueError(
            f"{len(rows.tokens)} rows cannot be cut into {settings.minibatches} minibatches of "
            f"{settings.micro_batches} micro-batches; pack them with multiple={parts}"
        )
    return over_rows(
        jax.tree.map(lambda x: x.reshape(-1, parts, *x.shape[1:]).swapaxes(0, 1), rows)
    )


def _by_token(parts: Rows, scored: Array, function: Callable, params: dict) -> Array:
    """`function` (params, part) -> [R / P, S] of every part, as [R, S]; 0 at padding."""
    values = map_present(partial(function, params), parts)
    return jnp.where(scored, values.swapaxes(0, 1).reshape(scored.shape), 0.0)


def _advantages(
    logprobs: Array,
    reference: Array,
    values: Array,
    responses: Responses,
    scores: Array,
    state: PPOState,
    settings: PPO,
    hyper: Hyper,
) -> tuple[Array, Array, dict[str, Metric]]:
    """Whitened advantages and returns, both [N, T], and metrics of the responses."""
    mask = jnp.arange(values.shape[1])[None] < responses.lengths[:, None]  # [N, T]
    stopped = responses.stopped
    rewards = rl.shape_rewards(
        rl.missing_eos_penalty(scores, stopped, hyper["missing_eos_penalty"]),
        logprobs,
        reference,
        mask,
        kl_coefficient=state.kl.coefficient,
        kl_estimator=settings.kl_estimator,
    )
    advantages, returns = rl.gae(
        rewards, values, mask, discount=hyper["discount"], gae_lambda=hyper["gae_lambda"]
    )
    by_response = {
        "objective/kl": rl.sequence_kl(logprobs, reference, mask),
        "objective/scores": scores,
        "objective/rlhf_reward": rewards.sum(-1),
        "val/stopped": stopped,
        "val/response_length": mask.sum(-1),
    }
    present = responses.lengths > 0
    metrics = summed_metrics({name: masked_metric(x, present) for name, x in by_response.items()})
    metrics["objective/kl_coef"] = Metric(state.kl.coefficient, jnp.float32(1))
    metrics["val/unexplained"] = _unexplained(values, returns, mask)
    return rl.whiten(advantages, mask), returns, metrics


def _unexplained(values: Array, returns: Array, mask: Array) -> Metric:
    """The share of the returns' variance that the values miss."""
    mean = returns.sum() / jnp.maximum(mask.sum(), 1)
    squares = lambda x: jnp.where(mask, x**2, 0.0).sum()
    return Metric(squares(returns - values), squares(returns - mean))
