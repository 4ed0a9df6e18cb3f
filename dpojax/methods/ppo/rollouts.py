"""PPO's state, the responses that its policy samples, and the rows that they are packed into."""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import Array

from dpojax.data.examples import Example
from dpojax.data.packing import Shape, Size, first_fit, size_of
from dpojax.data.rows import Rows, collate
from dpojax.models.config import DecoderConfig
from dpojax.models.decoder import Params
from dpojax.models.scores import with_scalar_head
from dpojax.rl import AdaptiveKL
from dpojax.sampling import Prompts, Sampler, Samples
from dpojax.sharding import replicated
from dpojax.training.state import State, abstract_state, new_state


class Responses(NamedTuple):
    """The N responses of an iteration, of up to T tokens each, packed into rows by `pack`."""

    rows: Rows  # [R, ...], each response alone behind its prompt; `example` is its number
    place: Array  # [R, T] int32: response * T + the token's place in it; N * T at padding
    lengths: Array  # [N] int32, 0 where there is none
    stopped: Array  # [N] bool

    def by_response(self, values: Array) -> Array:
        """Rearrange values by scored token [R, T] by response: [N, T], 0 after its end."""
        size = len(self.lengths) * self.place.shape[1]
        flat = jnp.zeros(size + 1, values.dtype).at[self.place].set(values)
        return flat[:-1].reshape(len(self.lengths), -1)

    def by_token(self, values: Array) -> Array:
        """Rearrange values by response [N, T] by scored token: [R, T], 0 at padding."""
        return jnp.take(values.ravel(), self.place, mode="fill", fill_value=0)


class PPOState(NamedTuple):
    """Everything that a resumed run needs besides the prompts' position and the reference."""

    policy: State  # its `rng` is the run's key, for samples and minibatches
    value: State
    kl: AdaptiveKL
    iteration: Array  # int32, iterations done


def with_value_head(config: DecoderConfig, params: Params) -> tuple[DecoderConfig, Params]:
    """Make a value model: a copy of the policy's trunk with a scalar head that gives 0."""
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
    """Make a state at iteration 0, which takes over the buffers of both models' parameters.

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
    """Sample `samples` responses to each prompt from the policy itself: temperature 1, no top-k.

    The random key is that of the run and the iteration. Prompts of one iteration need different
    ids.
    """
    return sampler(state.policy.params, prompts, seed=_sampler_seed(state), samples=samples)


@jax.jit
def _sampler_seed(state: PPOState) -> Array:
    return jax.random.bits(jax.random.fold_in(iteration_key(state), 0), dtype=jnp.uint32)


def iteration_key(state: PPOState) -> Array:
    """The iteration's random key. Fold in 0 to draw responses, 1 + epoch to draw minibatches."""
    return jax.random.fold_in(jax.random.wrap_key_data(state.policy.rng), state.iteration)


def pack(prompts: Prompts, samples: Samples, *, multiple: int = 1) -> Responses:
    """Pack prompts with their responses into rows, as many as fit, on the host.

    The number of rows is one of at most eight, so that `update` is compiled for few shapes. Which
    responses share a row depends on their lengths alone.

    Args:
      prompts, samples: NumPy arrays, as `draw` gives them. A response without tokens is left out.
      multiple: the number of rows is a multiple of it: minibatches x micro-batches of an update,
        times `sharding.row_shards`.
    """
    count, new = samples.tokens.shape[1:]
    tokens, lengths = samples.tokens.reshape(-1, new), samples.lengths.reshape(-1)
    prompt = lambda n: prompts.tokens[n // count, : prompts.lengths[n // count]]
    examples = [
        Example("", prompt(n), (tokens[n, :length],), (False,), None)
        for n, length in enumerate(lengths)
    ]
    present = np.flatnonzero(lengths).tolist()
    shape = row_shape(prompts.tokens.shape[1], new)
    sizes = [size_of(examples[n]) for n in present]
    needed = len(first_fit(sizes, Size(shape.length, shape.scored)))
    step = multiple * -(-len(examples) // (8 * multiple))
    rows = collate(examples, present, shape._replace(rows=max(1, -(-needed // step)) * step))
    rows = jax.tree.map(lambda x: x[0], rows)
    scored = rows.response >= 0
    owner = np.take_along_axis(rows.example, np.maximum(rows.response, 0), axis=-1)
    before = np.take_along_axis(rows.positions, rows.source, axis=-1)  # the predicted token
    place = owner * new + before + 1 - prompts.lengths[owner // count]
    place = np.where(scored, place, len(examples) * new).astype(np.int32)
    return Responses(rows, place, lengths, samples.stopped.reshape(-1))


def row_shape(prompt: int, new: int) -> Shape:
    """The shape of a row that holds a prompt of `prompt` tokens and a response of `new` tokens."""
    length = -(-(prompt + new) // 16) * 16
    return Shape(1, 1, length, scored=new, examples=length // 2, responses=1)
