"""An iteration of PPO after its responses are scored: experience, then epochs of minibatches."""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp
import optax
from jax import Array

from dpojax import rl
from dpojax.methods.ppo.experience import build_experience, over_rows
from dpojax.methods.ppo.objectives import (
    Experience,
    policy_objective,
    token_values,
    value_objective,
    with_entropy,
)
from dpojax.methods.ppo.rollouts import PPOState, iteration_key
from dpojax.methods.ppo.settings import PPO
from dpojax.models.decoder import Model
from dpojax.training.forward import MAX_LOGITS, language_model
from dpojax.training.metrics import Metric
from dpojax.training.objective import Hyper
from dpojax.training.state import State
from dpojax.training.step import Report, build_step

_NAMES = {  # TRL's
    "policy/loss": "loss/policy_avg",
    "policy/grad_norm": "grad_norm",
    "value/loss": "loss/value_avg",
    "value/grad_norm": "value_grad_norm",
    "value/learning_rate": "value_learning_rate",
}


def build_update(
    policy: Model,
    value: Model,
    settings: PPO,
    optimizer: optax.GradientTransformation,
    *,
    max_logits: int = MAX_LOGITS,
) -> Callable[..., tuple[PPOState, Report]]:
    """Build an iteration of PPO after its responses were scored.

    It is not jitted: the caller adds donation and shardings.

    Args:
      policy: a decoder.
      value: a decoder with a scalar head (`with_value_head`).
      settings: what is compiled in.
      optimizer: the one that the state was made with.
      max_logits: float32 logits that may exist at once.

    Returns:
      (state, reference_params, responses, scores [N], hyper) -> (new state, report). The report's
      `bad` [N] marks scores that are not finite. If there is one, neither model is trained.
    """
    prepare = build_experience(policy, value, settings, max_logits=max_logits)
    optimise = build_optimise(policy, value, settings, optimizer, max_logits=max_logits)

    def update(state, reference_params, responses, scores, hyper):
        experience, metrics = prepare(state, reference_params, responses, scores, hyper)
        state, more, finite = optimise(state, experience, hyper)
        kl, count = metrics["objective/kl"]
        coefficient = rl.update_kl(
            state.kl,
            kl / jnp.maximum(count, 1),
            target=hyper["kl_target"],
            steps=count,
            horizon=hyper["kl_horizon"],
        )
        trains = state.iteration >= hyper["value_warmup"]
        kl_state = jax.tree.map(lambda a, b: jnp.where(trains, a, b), coefficient, state.kl)
        state = state._replace(kl=kl_state, iteration=state.iteration + 1)
        bad = ~jnp.isfinite(scores) & (responses.lengths > 0)
        return state, Report(metrics | more, finite, bad)

    return update


def build_optimise(
    policy: Model,
    value: Model,
    settings: PPO,
    optimizer: optax.GradientTransformation,
    *,
    max_logits: int = MAX_LOGITS,
) -> Callable[..., tuple[PPOState, dict[str, Metric], Array]]:
    """Build the epochs of minibatch steps on an iteration's experience.

    Gradients are means over the tokens of a minibatch, as TRL's, by `training.step.build_step`.

    Returns:
      (state, experience, hyper) -> (state with both models trained, metrics, whether all finite).
    """
    build_forward = with_entropy if settings.entropy else language_model
    forward = build_forward(policy, max_logits=max_logits)
    policy_step = build_step(forward, policy_objective(settings.entropy), optimizer, _constant)
    value_step = build_step(token_values(value), value_objective(), optimizer, _constant)

    def both_steps(models: tuple[State, State], part: Experience, hyper: Hyper):
        at_value = hyper | {"learning_rate": hyper["value_learning_rate"]}
        new_policy, of_policy = policy_step(models[0], part, hyper)
        new_value, of_value = value_step(models[1], part, at_value)
        metrics = {_NAMES.get(f"policy/{k}", k): v for k, v in of_policy.metrics.items()}
        metrics |= {_NAMES.get(f"value/{k}", k): v for k, v in of_value.metrics.items()}
        return (new_policy, new_value), metrics, of_policy.finite & of_value.finite

    def optimise(state: PPOState, experience: Experience, hyper: Hyper):
        trains = state.iteration >= hyper["value_warmup"]

        def step(carry, index):
            models, stop = carry
            part = over_rows(jax.tree.map(lambda x: x[index], experience))

            def take(models):
                return both_steps(models, part, hyper)

            def skip(models):
                _, metrics, _ = jax.eval_shape(take, models)
                zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), metrics)
                return models, zeros, jnp.array(True)

            (new_policy, new_value), metrics, finite = jax.lax.cond(stop, skip, take, models)
            new_policy = jax.tree.map(lambda a, b: jnp.where(trains, a, b), new_policy, models[0])
            kl, weight = metrics["policy/approxkl_avg"]
            stop |= kl > hyper["max_kl"] * weight
            return ((new_policy, new_value), stop), (metrics, finite)

        usable = jnp.isfinite(experience.returns).all()
        carry = (state.policy, state.value), ~usable
        order = _minibatches(state, experience.present, settings)
        (models, _), (metrics, finite) = jax.lax.scan(step, carry, order)
        metrics = jax.tree.map(lambda x: x.sum(0), metrics)
        return state._replace(policy=models[0], value=models[1]), metrics, usable & finite.all()

    return optimise


def _constant(step: Array) -> float:
    """The learning rate's factor at every step."""
    return 1.0


def _minibatches(state: PPOState, present: Array, settings: PPO) -> Array:
    """Rows of each step, int32 [epochs * minibatches, micro_batches, R / both].

    The rows are shuffled and dealt to the minibatches in turn, empty rows last. So the number of
    empty rows does not change where the others go, and the step skips empty micro-batches.
    """
    empty = ~present[:, 0, 0]

    def dealt(epoch):
        key = jax.random.fold_in(iteration_key(state), 1 + epoch)
        keys = jax.vmap(jax.random.fold_in, (None, 0))(key, jnp.arange(len(empty)))
        shuffled = jnp.lexsort((jax.vmap(jax.random.bits)(keys), empty))
        return shuffled.reshape(-1, settings.minibatches).T

    order = jax.vmap(dealt)(jnp.arange(settings.epochs)).astype(jnp.int32)
    return order.reshape(settings.epochs * settings.minibatches, settings.micro_batches, -1)
