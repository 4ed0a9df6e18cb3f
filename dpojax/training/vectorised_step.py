"""Members of a sweep as one program: the whole step over a mesh with a sweep axis.

Members differ in traced numbers alone (beta, learning rate, the length of the run, ...). Rows,
cached reference log-probs and frozen weights are the same arrays for all of them. No member
communicates with another.
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
    """The numbers in which members may differ. Once stacked, every array leads with [N] members."""

    hyper: Hyper
    warmup_steps: Array  # int32
    steps: Array  # int32, after which the member's state is not changed
    seed: Array  # int32, of the state's random key


class MemberStates(NamedTuple):
    """The members' train states. Every array leads with [N] members."""

    states: State
    alive: Array  # [N] bool: the member's loss and gradient have always been finite


def build_vectorised_step(
    make_step: MakeStep, abstract: MemberStates, *, rows_differ: bool = False
) -> Callable[..., tuple[MemberStates, Report]]:
    """Build one step of every member, jitted.

    A member whose loss is not finite keeps its last good state for good. One that has done its
    `steps` keeps its last state. Neither changes the others. From then on a member reports zero
    metrics and `finite=True`.

    Args:
      make_step: builds a member's step.
      abstract: of `abstract_member_states`.
      rows_differ: rows lead with [N], too: the members see different batches (other seeds).

    Returns:
      (states, rows, hyperparameters, frozen) -> (states, reports), which donates the states. The
      reports lead with [N].
    """

    def one(member: MemberStates, rows, hyperparameters: MemberHyperparameters, frozen):
        state, alive = member
        step = make_step(hyperparameters.warmup_steps, hyperparameters.steps)

        def take(state: State) -> tuple[State, Report]:
            return step(state, rows, hyperparameters.hyper, frozen)

        def skip(state: State) -> tuple[State, Report]:
            shapes = jax.eval_shape(take, state)[1]
            return state, _nothing_done(shapes)

        active = alive & (state.step < hyperparameters.steps)
        if under_vmap:
            # `vmap` computes both sides of a branch in any case, and would make the rows differ by
            # member. Loops over them would then ask all members whether to go on: a collective.
            # The step itself chooses the old state: a choice after it needs memory for both.
            state, report = step(state, rows, hyperparameters.hyper, frozen, active)
            report = jax.tree.map(partial(jnp.where, active), report, _nothing_done(report))
        else:
            state, report = jax.lax.cond(active, take, skip, state)
        return MemberStates(state, alive & report.finite), report

    mesh = abstract.alive.sharding.mesh
    members = abstract.alive.shape[0]
    under_vmap = mesh.size > mesh.shape[SWEEP] or members > mesh.shape[SWEEP]
    axes = (0, 0 if rows_differ else None, 0, None)
    # Not `shard_map` where a member has several devices: XLA's partitioner dies of some meshes.
    if mesh.size > mesh.shape[SWEEP]:
        every = jax.vmap(one, in_axes=axes, spmd_axis_name=SWEEP)
    else:
        by_member, shared = PartitionSpec(SWEEP), PartitionSpec()
        every = jax.shard_map(
            partial(_members_of_device, one, axes),
            mesh=mesh,
            in_specs=tuple(shared if axis is None else by_member for axis in axes),
            out_specs=by_member,
            axis_names={SWEEP},
            check_vma=False,
        )
    shardings = jax.tree.map(lambda x: x.sharding, abstract)
    return jax.jit(every, donate_argnums=0, out_shardings=(shardings, None))


def _nothing_done(report: Report) -> Report:
    """What a member reports that changes nothing; from a report, or from its shapes."""
    zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), report)
    return zeros._replace(finite=jnp.array(True))


def _members_of_device(one: Callable, axes: tuple, states: MemberStates, *arguments):
    """Apply `one` to every member of a device.

    A single member does without `vmap`, which computes both sides of every branch. On a CPU that
    took a tenth longer.
    """
    if len(states.alive) > 1:
        return jax.vmap(one, in_axes=axes)(states, *arguments)
    first = [
        x if axis is None else jax.tree.map(lambda leaf: leaf[0], x)
        for x, axis in zip((states, *arguments), axes)
    ]
    return jax.tree.map(lambda x: x[None], one(*first))


def abstract_member_states(abstract: State, members: int, mesh: Mesh) -> MemberStates:
    """Shapes, dtypes and shardings of the states of several members.

    Args:
      abstract: of one member's state.
      members: how many there are.
      mesh: of `sharding.sweep_mesh`. Each state is sharded over its other axes as `abstract` is.
    """

    def stacked(leaf):
        spec = PartitionSpec(SWEEP, *leaf.sharding.spec)
        placed = NamedSharding(mesh, spec)
        return jax.ShapeDtypeStruct((members, *leaf.shape), leaf.dtype, sharding=placed)

    by_member = NamedSharding(mesh, PartitionSpec(SWEEP))
    alive = jax.ShapeDtypeStruct((members,), bool, sharding=by_member)
    return MemberStates(jax.tree.map(stacked, abstract), alive)


def new_member_states(
    params: dict, make_state: Callable[[dict, Array], State], seeds: Array, abstract: MemberStates
) -> MemberStates:
    """States that all start from the same parameters.

    Args:
      params: where every member starts.
      make_state: (params, seed) -> State.
      seeds: [N].
      abstract: of `abstract_member_states`.
    """

    def build(params, seeds):
        states = jax.vmap(make_state, in_axes=(None, 0))(params, seeds)
        return MemberStates(states, jnp.ones(len(seeds), bool))

    shardings = jax.tree.map(lambda x: x.sharding, abstract)
    return jax.jit(build, out_shardings=shardings)(params, seeds)


def build_take_member(abstract: State) -> Callable[[MemberStates, Array], State]:
    """Build (states, index) -> the state of one member, laid out as `abstract`."""

    def take(states: MemberStates, index: Array) -> State:
        return jax.tree.map(lambda x: x[index], states.states)

    return jax.jit(take, out_shardings=jax.tree.map(lambda x: x.sharding, abstract))


def stack(hyperparameters: Sequence[MemberHyperparameters], mesh: Mesh) -> MemberHyperparameters:
    """Put the hyperparameters of several members on the mesh; every array leads with [N]."""
    by_member = NamedSharding(mesh, PartitionSpec(SWEEP))
    stacked = jax.tree.map(lambda *values: np.stack(values), *jax.device_get(list(hyperparameters)))
    return sharding.put(stacked, by_member)
