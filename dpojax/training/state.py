"""The train state, its optimiser, and their shardings."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax import Array
from jax.sharding import Mesh
from jax.typing import ArrayLike

from dpojax import sharding
from dpojax.losses import RunningMean
from dpojax.training.objective import OptionError

# Only these decay: not norms, biases and position embeddings. a and b are adapters'.
DECAYED = ("kernel", "tokens", "a", "b")


class State(NamedTuple):
    """Everything that a resumed run needs besides the data's position."""

    step: Array  # int32, optimiser steps done
    params: dict  # float32 master weights, a plain nested dict
    opt_state: optax.OptState
    rng: Array  # key data of the run's random key, uint32; fold in `step` to draw from it
    baseline: RunningMean  # of the rewards seen so far, for the objectives that keep one (BCO)
    reference: dict | None = None  # an earlier `params`, for objectives with `sync_every`


def make_optimizer(config) -> optax.GradientTransformation:
    """Build gradient clipping by global norm, then AdamW or RMSprop, without the learning rate.

    The update is a descent direction of unit scale. The step subtracts learning_rate times it, so
    the learning rate stays a traced number that a sweep can vary. `update` takes the global norm as
    `norm`, if the caller knows it.

    Args:
      config: name ("adamw" or "rmsprop"), clip_norm (0 is off), weight_decay, b1, b2, eps,
        rms_decay. RMSprop is torch's: no momentum, not centred, g / (sqrt(v) + eps), v from 0.

    Raises:
      OptionError: another name.
    """
    if config.name == "adamw":
        scale = optax.scale_by_adam(b1=config.b1, b2=config.b2, eps=config.eps)
    elif config.name == "rmsprop":
        scale = optax.scale_by_rms(decay=config.rms_decay, eps=config.eps, eps_in_sqrt=False)
    else:
        reason = f"must be 'adamw' or 'rmsprop', got {config.name!r}"
        raise OptionError("optimizer.name", reason)
    parts = [scale]
    if config.clip_norm:
        parts.insert(0, clip_by_norm(config.clip_norm))
    if config.weight_decay:
        parts.append(optax.add_decayed_weights(config.weight_decay, mask=_decayed))
    return optax.chain(*parts)


def moment_copies(config) -> int:
    """How many copies of the parameters the optimiser of `make_optimizer` keeps."""
    return {"adamw": 2, "rmsprop": 1}[config.name]


def clip_by_norm(most: float) -> optax.GradientTransformationExtraArgs:
    """Build `optax.clip_by_global_norm` with an `update` that takes the norm as `norm`.

    It multiplies by one factor, which fuses with what follows. Optax divides in a separate pass.
    """

    def update(gradient, state, params=None, *, norm=None, **_):
        norm = optax.tree.norm(gradient) if norm is None else norm
        factor = jnp.minimum(1.0, most / norm)
        return jax.tree.map(lambda g: g * factor, gradient), state

    return optax.GradientTransformationExtraArgs(optax.init_empty_state, update)


def descend(param: Array, update: Array, rate: Array) -> Array:
    """One step of descent, param - rate * update, in the parameter's dtype."""
    return (param - rate * update).astype(param.dtype)


def make_schedule(
    schedule: str,
    warmup_steps: ArrayLike,
    steps: ArrayLike,
    *,
    lowest: float = 0.0,
    decay_share: float = 0.1,
) -> Callable[[Array], Array]:
    """Build the learning rate's factor in [0, 1] at a step (counted from 0).

    First a linear warm-up as in the DPO authors' code, min(1, (step + 1) / (warmup_steps + 1)).
    Then it is constant, or falls to `lowest`, which it reaches at `steps`: along a line or a cosine
    from the end of the warm-up on, or (`wsd`, Hu et al. 2024) along a line in the last
    decay_share * steps steps. Both numbers of steps may be traced.

    Raises:
      OptionError: `schedule` is not constant, linear, cosine or wsd.
    """
    if schedule not in ("constant", "linear", "cosine", "wsd"):
        reason = f"must be constant, linear, cosine or wsd, got {schedule!r}"
        raise OptionError("schedule", reason)

    def factor(step: Array) -> Array:
        rise = jnp.minimum(1.0, (step + 1) / (warmup_steps + 1))
        if schedule == "constant":
            return rise
        begin = warmup_steps
        if schedule == "wsd":
            # In float32 also where `steps` is not traced, so that members of sweeps fare alike.
            begin = jnp.maximum(warmup_steps, steps - jnp.float32(decay_share) * steps)
        falling = jnp.maximum(1, steps - begin)
        left = 1 - jnp.clip((step - begin) / falling, 0.0, 1.0)
        if schedule == "cosine":
            left = 0.5 * (1 - jnp.cos(jnp.pi * left))
        return rise * (lowest + (1 - lowest) * left)

    return factor


def warmup_steps(config, steps: int) -> int:
    """The warm-up of a stage's config in a run of `steps` steps: its steps, or its share of them.

    The share is rounded up, but for what float arithmetic adds: 0.1 of 30 are 3.
    """
    if config.warmup_ratio is None:
        return config.warmup_steps
    return math.ceil(config.warmup_ratio * steps - 1e-9)


def schedule_of(config, warmup: ArrayLike, steps: ArrayLike) -> Callable[[Array], Array]:
    """Build the schedule of a stage's config; see `make_schedule`."""
    return make_schedule(
        config.schedule,
        warmup,
        steps,
        lowest=config.min_learning_rate_ratio,
        decay_share=config.decay_share,
    )


def abstract_state(
    abstract_params,
    optimizer: optax.GradientTransformation,
    mesh: Mesh,
    rules,
    *,
    with_reference: bool = False,
) -> State:
    """Shapes, dtypes and shardings of the state for parameters of these shapes.

    The optimiser's moments are sharded as their parameters are, and so is the reference, which is
    there if `with_reference`. Everything else is replicated.
    """
    params = sharding.tree_shardings(abstract_params, mesh, rules)
    initial = partial(initial_state, optimizer=optimizer, seed=0, with_reference=with_reference)
    shapes = jax.eval_shape(initial, abstract_params)
    repl = sharding.replicated(mesh)
    opt_state = optax.tree.map_params(
        optimizer, lambda _, s: s, shapes.opt_state, params, transform_non_params=lambda _: repl
    )
    return jax.tree.map(
        lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s),
        shapes,
        State(
            repl,
            params,
            opt_state,
            repl,
            RunningMean(repl, repl),
            params if with_reference else None,
        ),
    )


def new_state(params, optimizer: optax.GradientTransformation, abstract: State, seed: int) -> State:
    """Make a state at step 0 from `params`, whose buffers it takes over."""
    shardings = jax.tree.map(lambda x: x.sharding, abstract)
    options = {"seed": seed, "with_reference": abstract.reference is not None}
    build = jax.jit(
        lambda p: initial_state(p, optimizer, **options), out_shardings=shardings, donate_argnums=0
    )
    return build(params)


def initial_state(
    params,
    optimizer: optax.GradientTransformation,
    seed: ArrayLike,
    *,
    with_reference: bool = False,
) -> State:
    """Make a state at step 0; `new_state` is this under jit, with shardings."""
    key = jax.random.key_data(jax.random.key(seed))
    baseline = RunningMean(jnp.zeros(()), jnp.zeros(()))
    reference = params if with_reference else None
    return State(jnp.zeros((), jnp.int32), params, optimizer.init(params), key, baseline, reference)


def _decayed(params):
    def decayed(keys, _):
        return sharding.path_of(keys).rsplit("/", 1)[-1] in DECAYED

    return jax.tree_util.tree_map_with_path(decayed, params)
