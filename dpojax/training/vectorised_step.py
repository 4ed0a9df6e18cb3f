"""Members of a sweep as lanes of one program: the whole step over a mesh with an axis of its own.

A lane is a member's train state; lanes differ in traced numbers alone (beta, learning rate, the
length of the run, ...). Rows, cached reference log-probs and frozen weights are the same arrays for
all of them, and nothing is communicated between lanes.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from dpojax import sharding
from dpojax.sharding import SWEEP
from dpojax.training.objective import Hyper
from dpojax.training.state import State
from dpojax.training.step import Report

# (schedule's warm-up steps, schedule's steps) -> the step of `training.step.build_step`
MakeStep = Callable[[Array, Array], Callable[..., tuple[State, Report]]]


class MemberHyperparameters(NamedTuple):
    """What a member may differ in; every array leads with an axis of lanes once stacked."""

    hyper: Hyper
    warmup_steps: Array  # int32
    steps: Array  # int32, after which the member is left as it is
    seed: Array  # int32, of the state's random key


class MemberStates(NamedTuple):
    """Train states side by side; every array leads with an axis of lanes [L]."""

    states: State
    alive: Array  # [L] bool: no loss or gradient of the lane has ever been NaN or infinite


def build_vectorised_step(
    make_step: MakeStep, abstract: MemberStates, *, own_rows: bool = False
) -> Callable:
    """(lanes, rows, numbers, frozen) -> (lanes, reports): one step of every lane, jitted.

    A lane whose loss is not finite keeps its last good state for good, and one that has done its
    `steps` its last; neither touches the others. From then on it reports zeros, and `finite`.
    Reports lead with [L]. Donates the lanes.

    Args:
      abstract: of `abstract_member_states`.
      own_rows: rows lead with [L] as well: members that see other batches (other seeds).
    """

    def one(lane: MemberStates, rows, numbers: MemberHyperparameters, frozen):
        state, alive = lane
        step = make_step(numbers.warmup_steps, numbers.steps)
        take = lambda state: step(state, rows, numbers.hyper, frozen)
        said = jax.eval_shape(take, state)[1]

        def leave(state: State) -> tuple[State, Report]:
            report = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), said)
            return state, report._replace(finite=jnp.array(True))

        going = alive & (state.step < numbers.steps)
        state, report = jax.lax.cond(going, take, leave, state)
        return MemberStates(state, alive & report.finite), report

    mesh = abstract.alive.sharding.mesh
    axes = (0, 0 if own_rows else None, 0, None)
    # Not `shard_map` where a lane has several devices: XLA's partitioner dies of some such meshes.
    if mesh.size > mesh.shape[SWEEP]:
        every = jax.vmap(one, in_axes=axes, spmd_axis_name=SWEEP)
    else:
        by_lane, shared = PartitionSpec(SWEEP), PartitionSpec()
        every = jax.shard_map(
            partial(_of_device, one, axes),
            mesh=mesh,
            in_specs=tuple(shared if axis is None else by_lane for axis in axes),
            out_specs=by_lane,
            axis_names={SWEEP},
            check_vma=False,
        )
    shardings = jax.tree.map(lambda x: x.sharding, abstract)
    return jax.jit(every, donate_argnums=0, out_shardings=(shardings, None))


def _of_device(one: Callable, axes: tuple, lanes: MemberStates, *given):
    """`one` of every lane of a device; a single one does without `vmap`, which computes both ways
    of every branch and on a CPU took a tenth longer."""
    if len(lanes.alive) > 1:
        return jax.vmap(one, in_axes=axes)(lanes, *given)
    first = lambda x: x[0]
    own = [x if axis is None else jax.tree.map(first, x) for x, axis in zip((lanes, *given), axes)]
    return jax.tree.map(lambda x: x[None], one(*own))


def abstract_member_states(abstract: State, lanes: int, mesh: Mesh) -> MemberStates:
    """Shapes, dtypes and shardings of `lanes` states that each look like `abstract`.

    Args:
      mesh: of `sharding.sweep_mesh`; each lane is sharded over its other axes as `abstract` is.
    """

    def one(leaf):
        spec = PartitionSpec(SWEEP, *leaf.sharding.spec)
        where = NamedSharding(mesh, spec)
        return jax.ShapeDtypeStruct((lanes, *leaf.shape), leaf.dtype, sharding=where)

    by_lane = NamedSharding(mesh, PartitionSpec(SWEEP))
    alive = jax.ShapeDtypeStruct((lanes,), bool, sharding=by_lane)
    return MemberStates(jax.tree.map(one, abstract), alive)


def new_member_states(
    params: dict, make_state: Callable[[dict, Array], State], seeds: Array, abstract: MemberStates
) -> MemberStates:
    """MemberStates that all start from the same parameters; make_state(params, seed) -> State."""

    def build(params, seeds):
        states = jax.vmap(make_state, in_axes=(None, 0))(params, seeds)
        return MemberStates(states, jnp.ones(len(seeds), bool))

    shardings = jax.tree.map(lambda x: x.sharding, abstract)
    return jax.jit(build, out_shardings=shardings)(params, seeds)


def build_take_member(abstract: State) -> Callable[[MemberStates, Array], State]:
    """(lanes, index) -> the state of one lane, laid out as `abstract`."""
    shardings = jax.tree.map(lambda x: x.sharding, abstract)
    take = lambda lanes, index: jax.tree.map(lambda x: x[index], lanes.states)
    return jax.jit(take, out_shardings=shardings)


def stack(numbers: Sequence[MemberHyperparameters], mesh: Mesh) -> MemberHyperparameters:
    """The numbers of several members on the mesh, an axis of lanes in front."""
    by_lane = NamedSharding(mesh, PartitionSpec(SWEEP))
    stacked = jax.tree.map(lambda *values: np.stack(values), *jax.device_get(list(numbers)))
    return sharding.put(stacked, by_lane)
