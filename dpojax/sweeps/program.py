"""The compiled step of members that train together: how many it holds, and what goes in and out."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from dpojax import display, sharding, storage
from dpojax.config.errors import ConfigError
from dpojax.data.rows import Rows
from dpojax.sharding import ROWS, SWEEP
from dpojax.stages.example_stage import ExampleStage
from dpojax.stages.reference import Reference
from dpojax.stages.train import (
    abstract_frozen_weights,
    abstract_rows,
    abstract_train_state,
    make_step,
    resident_weights,
)
from dpojax.sweeps.layout import LAYOUT, Layout
from dpojax.training import memory
from dpojax.training.forward import FrozenWeights
from dpojax.training.state import initial_state, make_optimizer, warmup_steps
from dpojax.training.step import Report
from dpojax.training.vectorised_step import (
    MemberHyperparameters,
    MemberStates,
    abstract_member_states,
    build_take_member,
    build_vectorised_step,
    new_member_states,
    stack,
)


class Room(NamedTuple):
    """Memory of one device, in bytes; `calls`: how many calls' states fit at once."""

    states: int  # of the members of one call
    beside: int  # whatever else lies there while they train
    calls: int


class MemberProgram:
    """The step of a group's members on a mesh with a sweep axis.

    Args:
      stages: of all members, with the shape of their batches.
      order_of: for each member, which of the orders of batches it sees.
      mesh: of `layout.mesh_with_members`.
      begun: the layout of members that have begun, which is kept.
      folder: of the group.
    """

    def __init__(
        self,
        stages: Sequence[ExampleStage],
        order_of: Sequence[int],
        mesh: Mesh,
        begun: Layout | None,
        folder: storage.Path,
    ):
        self.stages, self.order_of, self.mesh = stages, order_of, mesh
        self.begun, self.folder = begun, folder
        self.lead = stages[0]
        self.settings = self.lead.setup.config.sweep
        self.rows_differ = len(set(order_of)) > 1
        self.optimizer = make_optimizer(self.lead.config.optimizer)
        self.abstract_state = abstract_train_state(self.lead, self.optimizer)
        axis, on_cpu = mesh.shape[SWEEP], mesh.devices.flat[0].platform == "cpu"
        members = min(len(stages), self.settings.at_once or len(stages))
        # A CPU's products are not faster for being batched; its cores are filled by devices.
        self.vmapped = self.settings.vmapped or (1 if on_cpu else -(-members // axis))

    @property
    def members_per_call(self) -> int:
        return self.vmapped * self.mesh.shape[SWEEP]

    def compile(self) -> int:
        """Compile the step; return how many members are trained at once.

        What was chosen stays so as long as there are checkpoints of the members, which have its
        shape.

        Raises:
          ConfigError: memory does not hold the members of one call, or as many as were asked for.
        """
        begun, settings, members = self.begun, self.settings, len(self.stages)
        self.vmapped = begun.vmapped if begun else self.vmapped
        while True:
            room = self._compile()
            if room.calls >= 1 or self.vmapped == 1 or begun or settings.vmapped:
                break
            self.vmapped = -(-self.vmapped // 2)
        most_calls = -(-members // self.members_per_call)
        fitting = min(max(1, room.calls), most_calls) * self.members_per_call
        at_once = begun.at_once if begun else settings.at_once or fitting
        calls = -(-min(at_once, members) // self.members_per_call)
        if calls > room.calls and self.lead.setup.config.check_memory:
            self._refuse(calls, room)
        self.take_member = build_take_member(self.abstract_state)
        if jax.process_index() == 0:
            layout = Layout(self.mesh.shape[SWEEP], self.vmapped, at_once)
            storage.write_json(self.folder / LAYOUT, layout._asdict())
            display.say(self._describe(min(at_once, members), room))
        return at_once

    def step(
        self,
        states: MemberStates,
        rows: Rows,
        hyperparameters: MemberHyperparameters,
        frozen: FrozenWeights,
    ) -> tuple[MemberStates, Report]:
        with jax.set_mesh(self.mesh):
            return self._step(states, rows, hyperparameters, frozen)

    def hyperparameters(self, indices: Sequence[int], ended: set[int]) -> MemberHyperparameters:
        """The hyperparameters of members; those that have ended, and spare places, do no steps."""
        members = [_hyperparameters(self.stages[i]) for i in indices]
        members = [_idle(x) if i in ended else x for i, x in zip(indices, members)]
        spare = [_idle(members[-1])] * (self.members_per_call - len(members))
        return stack([*members, *spare], self.mesh)

    def new_states(self, trained: dict, hyperparameters: MemberHyperparameters) -> MemberStates:
        """States at step 0 that all start from the same trained parameters."""

        def new_state(params: dict, seed: jax.Array) -> Any:
            with_reference = self.abstract_state.reference is not None
            return initial_state(params, self.optimizer, seed, with_reference=with_reference)

        return new_member_states(trained, new_state, hyperparameters.seed, self.abstract)

    def place(
        self, chunks: Sequence[Sequence[int]], reference: Reference, batch: Sequence[Rows]
    ) -> list[Rows]:
        """A batch of every order -> the rows of every chunk, with reference log-probs.

        Args:
          chunks: the indices of each chunk's members.
        """
        if reference.score_on_mesh is not None:
            mesh = self.lead.setup.mesh
            batch = [sharding.to_host(reference.to_device(rows, mesh)) for rows in batch]
        if not self.rows_differ:
            return [sharding.put(batch[0], self._row_sharding)] * len(chunks)
        placed = []
        for indices in chunks:
            spare = [indices[-1]] * (self.members_per_call - len(indices))
            rows = [batch[self.order_of[i]] for i in (*indices, *spare)]
            stacked = jax.tree.map(lambda *x: np.stack(x), *rows)
            placed.append(sharding.put(stacked, self._row_sharding))
        return placed

    def _compile(self) -> Room:
        """Compile for the present number of members, and measure."""
        count = self.members_per_call
        self.abstract = abstract_member_states(self.abstract_state, count, self.mesh)
        on_members = self.lead.stepping_on(self.mesh)
        step = build_vectorised_step(
            make_step(on_members, self.optimizer), self.abstract, rows_differ=self.rows_differ
        )
        hyperparameters = self.hyperparameters(range(min(count, len(self.stages))), set())
        frozen = abstract_frozen_weights(on_members)
        with jax.set_mesh(self.mesh):
            lowered = step.lower(self.abstract, self._abstract_rows(), hyperparameters, frozen)
            with display.doing(f"compiling the step of {count} members"):
                self._step = lowered.compile()
        memory.give_back()
        states = memory.bytes_per_device(self.abstract)
        # The weights that all start from stay, and an evaluation takes one member's state out.
        others = self.abstract_state.params, self.abstract_state, resident_weights(on_members)
        beside = memory.temporary_bytes(self._step) + memory.bytes_per_device(others)
        fitting = int((memory.limit_bytes() - beside) // states)
        return Room(states, beside, sharding.agreed(max(-1, min(2**20, fitting))))

    def _refuse(self, calls: int, room: Room) -> None:
        change = "lower config.sweep.at_once, axis or vmapped"
        if self.begun:
            change = f"they began so: give them as much memory, or delete {self.folder}"
        raise ConfigError(
            f"config.sweep: {calls * self.members_per_call} members at once, "
            f"{self.members_per_call} in a call, take {memory.gib(calls * room.states)} of each "
            f"device and {memory.gib(room.beside)} beside them, more than there is; {change} "
            "(config.check_memory=False tries all the same)"
        )

    def _describe(self, at_once: int, room: Room) -> str:
        return (
            f"sweep: {len(self.stages)} members, {at_once} of them at once; "
            f"{self.members_per_call} in a call, on a sweep axis of {self.mesh.shape[SWEEP]}; on "
            f"each device {memory.gib(room.states)} for the states of a call and "
            f"{memory.gib(room.beside)} beside them"
        )

    @property
    def _row_sharding(self) -> NamedSharding:
        spec = (SWEEP, None, ROWS) if self.rows_differ else (None, ROWS)
        return NamedSharding(self.mesh, PartitionSpec(*spec))

    def _abstract_rows(self) -> Rows:
        rows = abstract_rows(self.lead, self.lead.batches.shape)
        leading = (self.members_per_call,) if self.rows_differ else ()
        return jax.tree.map(
            lambda x: jax.ShapeDtypeStruct(
                (*leading, *x.shape), x.dtype, sharding=self._row_sharding
            ),
            rows,
        )


def _hyperparameters(stage: ExampleStage) -> MemberHyperparameters:
    return MemberHyperparameters(
        hyper=stage.hyper,
        warmup_steps=jnp.int32(warmup_steps(stage.config, stage.steps)),
        steps=jnp.int32(stage.steps),
        seed=jnp.int32(stage.setup.config.seed % 2**31),
    )


def _idle(hyperparameters: MemberHyperparameters) -> MemberHyperparameters:
    """The hyperparameters of a member that does no step."""
    return hyperparameters._replace(steps=jnp.int32(0))
