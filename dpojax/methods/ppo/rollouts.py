"""The state of PPO, the responses that its policy draws, and the rows that they are."""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax import Array

from dpojax.data.rows import Rows
from dpojax.models.config import DecoderConfig
from dpojax.models.decoder import Params
from dpojax.models.scores import with_scalar_head
from dpojax.rl import AdaptiveKL
from dpojax.sampling import Prompts, Sampler, Samples
from dpojax.sharding import ROWS, constrain, replicated
from dpojax.training.state import State, abstract_state, new_state


class PPOState(NamedTuple):
    """Everything that a resumed run needs besides the prompts' position and the reference."""

    policy: State  # its `rng` is the run's key, for samples and minibatches
    value: State
    kl: AdaptiveKL
    iteration: Array  # int32, iterations done


def with_value_head(config: DecoderConfig, params: Params) -> tuple[DecoderConfig, Params]:
    """A value model: a copy of the policy's trunk, and a scalar head that gives 0 everywhere."""
    config, params = with_scalar_head(config, params, jax.random.key(0))
    params = jax.tree.map(jnp.copy, params)
    return config, params | {"score": jax.tree.map(jnp.zeros_like, params["score"])}


def new_ppo_state(
    policy: Params,
    value: Params,
    optimizer: optax.GradientTransformation,
    mesh,
    rules,
    *,
    seed: int,
    kl_coefficient: float,
) -> PPOState:
    """A state at iteration 0 that takes over the buffers of both models' parameters.

    Args:
      optimizer: of each model, see `training.state.make_optimizer`.
      mesh, rules: see `training.state.abstract_state`.
      kl_coefficient: where the controller starts, > 0; reward per nat.
    """
    policy, value = (
        new_state(params, optimizer, abstract_state(params, optimizer, mesh, rules), seed)
        for params in (policy, value)
    )
    numbers = AdaptiveKL(jnp.float32(kl_coefficient)), jnp.int32(0)
    return PPOState(policy, value, *jax.device_put(numbers, replicated(mesh)))


def draw(sampler: Sampler, state: PPOState, prompts: Prompts, *, samples: int = 1) -> Samples:
    """`samples` responses to each prompt, as the policy has them: at temperature 1, untruncated.

    From the run's key and the iteration; prompts of one iteration need different ids.
    """
    return sampler(state.policy.params, prompts, seed=_sampler_seed(state), samples=samples)


def trim(samples: Samples, multiple: int = 16) -> Samples:
    """On the host: without the columns that no response reaches, down to a multiple of `multiple`.

    Few widths, so few compilations; and `update` computes no more columns than it has to.
    """
    longest = max(1, int(jnp.max(samples.lengths)))
    width = min(-(-longest // multiple) * multiple, samples.tokens.shape[-1])
    tokens, logprobs, behaviour = (x[..., :width] for x in samples[:3])
    return samples._replace(tokens=tokens, logprobs=logprobs, behaviour=behaviour)


@jax.jit
def _sampler_seed(state: PPOState) -> Array:
    return jax.random.bits(jax.random.fold_in(iteration_key(state), 0), dtype=jnp.uint32)


def iteration_key(state: PPOState) -> Array:
    """Of the iteration: 0 draws responses, 1 + epoch the minibatches."""
    return jax.random.fold_in(jax.random.wrap_key_data(state.policy.rng), state.iteration)


def rows_of(prompts: Prompts, samples: Samples) -> Rows:
    """One row [P + T] for each response, those of a prompt one after the other: R = B N.

    The prompt stands in the first P columns and the response in the last T, each with its padding
    behind it. `training.forward.reward_model` scores these rows, [R, 1, 1].
    """
    count = samples.tokens.shape[1]
    by_response = lambda x: x.reshape(-1, *x.shape[2:])
    prompt, length = (jnp.repeat(x, count, axis=0) for x in prompts[:2])
    tokens, own_length = by_response(samples.tokens), by_response(samples.lengths)
    before, after = (jax.lax.broadcasted_iota(jnp.int32, x.shape, 1) for x in (prompt, tokens))
    length, own_length = length[:, None], own_length[:, None]
    in_prompt, in_response = before < length, after < own_length
    join = lambda a, b: jnp.concatenate([a, b], axis=1)
    both = join(in_prompt, in_response)
    present = (own_length > 0)[..., None]
    one = (len(tokens), 1)
    rows = Rows(
        tokens=jnp.where(both, join(prompt, tokens), 0),
        positions=jnp.where(both, join(before, length + after), 0),
        segment=both.astype(jnp.int32),
        branch=join(jnp.zeros_like(before), in_response.astype(jnp.int32)),
        source=jnp.where(
            in_response, jnp.where(after == 0, length - 1, len(prompt[0]) + after - 1), 0
        ),
        target=jnp.where(in_response, tokens, 0),
        response=jnp.where(in_response, 0, -1),
        present=present,
        example=jnp.where(present[..., 0], jnp.arange(len(tokens))[:, None], -1),
        rank=jnp.zeros((*one, 1), jnp.int32),
        scores=jnp.zeros((*one, 1), jnp.float32),
        desirable=jnp.zeros(one, bool),
    )
    return jax.tree.map(lambda x: constrain(x, ROWS), rows)
