"""The loop around a vectorised step: members train on the same batches, and end or fail alone."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from typing import NamedTuple

import jax
import numpy as np

from dpojax import display, sharding
from dpojax.data.examples import Example
from dpojax.data.rows import Rows
from dpojax.training import goodput
from dpojax.training.checkpoints import Checkpoints
from dpojax.training.health import Health
from dpojax.training.loop import (
    Due,
    Every,
    is_computing,
    name_the_not_finite,
    print_evaluation,
    print_line,
    say_reached,
    warn_of_lost_updates,
)
from dpojax.training.metrics import MetricWriter
from dpojax.training.pace import Speed, Tally, memory_metrics, speed_line, tokens_of
from dpojax.training.preemption import Preempted, StopSignal
from dpojax.training.state import State
from dpojax.training.step import Report
from dpojax.training.stop_at import STOP_AT, StopAt
from dpojax.training.vectorised_step import MemberHyperparameters, MemberStates
from dpojax.watchdog import beat

POSITIONS = "orders"  # the key of the iterators' positions in a checkpoint


@dataclasses.dataclass
class Member:
    """What belongs to one member alone.

    Attributes:
      name: its folder's.
      steps: of its run.
      evaluate: state -> values by metric name, on the held-out data.
      writer: of its metrics.
      checkpoints: where its final state goes.
      ended: by an earlier call; its state is idle, and it has nothing of the above.
      error: why it failed; "" if it did not.
      evaluation: the values of its last evaluation.
      tally: what its steps since the last log add to the next one.
      stop_at: says when a metric of `evaluate` has reached the value to stop at; None: never. Other
        members train on.
      warned: the terminal has said that its updates are lost to rounding.
      health: says at each evaluation in words how its training does.
    """

    name: str
    steps: int
    evaluate: Callable[[State], dict[str, float]] | None = None
    writer: MetricWriter | None = None
    checkpoints: Checkpoints | None = None
    ended: bool = False
    error: str = ""
    evaluation: dict[str, float] = dataclasses.field(default_factory=dict)
    tally: Tally = dataclasses.field(default_factory=Tally)
    stop_at: StopAt | None = None
    warned: bool = False
    health: Health = dataclasses.field(default_factory=Health)

    def trains_after(self, done: int) -> bool:
        """Whether it takes another step after `done` steps."""
        return not self.ended and not self.error and not self.is_last(done)

    def is_last(self, done: int) -> bool:
        """Whether it has taken its last step after `done` steps: of its run, or before a stop."""
        stopped_at = None if self.stop_at is None else self.stop_at.stopped_at
        return done >= (self.steps if stopped_at is None else stopped_at)

    def log(self, stage: str, done: int, speed: Mapping[str, float]) -> None:
        """Write the metrics of the steps since the last log, and the speed of all members."""
        values = self.tally.flush() | speed | goodput.metrics()
        self.warned = self.warned or warn_of_lost_updates(f"{stage} {self.name}", done, values)
        self.writer.write(done, values, split="train")

    def evaluate_and_log(self, stage: str, state: State, done: int) -> None:
        """Evaluate its state, and write the values."""
        values = self.evaluation = self.evaluate(state)
        self.writer.write(done, values, split="eval")
        health = self.health.add(done, values)
        print_evaluation(f"{stage} {self.name}", done, self.steps, values, health)
        if self.stop_at is not None and self.stop_at.add(done, values):
            say_reached(f"{stage} {self.name}", self.stop_at, self.steps)

    def finish(self, stage: str, state: State, done: int) -> None:
        """Save its final state."""
        finite = {name: x for name, x in self.evaluation.items() if math.isfinite(x)}
        metadata = {"stage": stage, "evaluation": finite}
        if self.stop_at is not None:
            metadata[STOP_AT] = self.stop_at.state()
        self.checkpoints.save(done, state, metadata=metadata)


@dataclasses.dataclass
class MemberChunk:
    """The members that one call of the step computes.

    Attributes:
      members: in the order of the states; states beyond their number are idle.
      states: of the members.
      hyperparameters: of the members.
      unread: metrics of the steps since `read`, on the device.
    """

    members: Sequence[Member]
    states: MemberStates
    hyperparameters: MemberHyperparameters
    unread: list = dataclasses.field(default_factory=list)

    def read(self) -> None:
        """Hand the metrics of the steps since the last call to the members."""
        steps, self.unread = sharding.to_host(self.unread), []
        for metrics in steps:
            for index, member in enumerate(self.members):
                if member.ended:
                    continue
                member.tally.window.add(jax.tree.map(lambda x, i=index: x[i], metrics))

    def idle(self, done: int) -> None:
        """Let members that stopped at their evaluation after `done` steps take no more of them."""
        stopped = [
            member.stop_at is not None and member.stop_at.stopped_at == done
            for member in self.members
        ]
        if any(stopped):
            before = self.hyperparameters.steps
            steps = np.array(sharding.to_host(before))
            steps[np.flatnonzero(stopped)] = 0
            steps = sharding.put(steps, before.sharding)
            self.hyperparameters = self.hyperparameters._replace(steps=steps)


class Orders:
    """Batches of several orders of the same examples, as one iterator that can be saved."""

    def __init__(self, iterators: Sequence):
        self._iterators = iterators

    def __next__(self) -> list[Rows]:
        return [next(iterator) for iterator in self._iterators]

    def get_state(self) -> dict:
        return {POSITIONS: [iterator.get_state() for iterator in self._iterators]}

    def set_state(self, state: dict) -> None:
        for iterator, position in zip(self._iterators, state[POSITIONS], strict=True):
            iterator.set_state(position)


@dataclasses.dataclass
class VectorisedLoop:
    """What members need in order to train together; call it with their chunks.

    Attributes:
      stage: its name.
      step: (states, rows on the mesh, hyperparameters) -> (states, reports); donates the states.
      take_member: (states, index) -> that member's state.
      batches: lists of NumPy rows, one of every order, positioned at the first step; it can be
        saved.
      place: such a list -> the rows of every chunk on the mesh.
      rows_of: (such a list, chunk, index in the chunk) -> the NumPy rows that this member saw.
      every: how often to log, evaluate and save.
      examples: of the data, by the numbers in rows.
      checkpoints: of all members' states, until every member has ended.
      stop: says whether the run is asked to stop.
      speed: of all members together: the tokens, examples and FLOPs of each that takes a step.
      last_speed: the last line of it.
    """

    stage: str
    step: Callable
    take_member: Callable[[MemberStates, int], State]
    batches: Iterator[list[Rows]]
    place: Callable[[list[Rows]], list[Rows]]
    rows_of: Callable[[list[Rows], int, int], Rows]
    every: Every
    examples: Sequence[Example]
    checkpoints: Checkpoints
    stop: StopSignal
    speed: Speed
    last_speed: dict[str, float] = dataclasses.field(default_factory=dict)

    def __call__(self, chunks: Sequence[MemberChunk], done: int) -> None:
        """Train until every member has ended or failed; then their final states are on disk.

        Raises:
          Preempted: asked to stop, once all states are saved.
        """
        with self.stop.steps(), goodput.spending(goodput.STEP):
            self._train(chunks, done)

    def _train(self, chunks: Sequence[MemberChunk], done: int) -> None:
        members = [member for chunk in chunks for member in chunk.members if not member.ended]
        last, pending = max(member.steps for member in members), None
        goodput.goes_on(self.stage, done)
        first = done + 1
        if done:
            print_line(self.stage, f"{len(members)} members resume at step {done} of {last}")
        else:
            self._evaluate(chunks, members, 0)
        with display.bar(f"{self.stage} x {len(members)}", last, done) as bar:
            while any(member.trains_after(done) for member in members):
                with goodput.spending(goodput.DATA, partial(_are_computing, pending)):
                    batch = next(self.batches)
                reports = self._step_all(chunks, batch, done)
                active = [member for member in members if member.trains_after(done)]
                self._count(chunks, batch, active)
                done += 1
                bar.update()
                if pending is not None:  # one step behind, so that the device never waits for us
                    self._check(chunks, *pending, done - 1)
                pending = batch, reports
                if done == first:
                    self.speed.restart()  # without what was compiled in the first step
                due = {member.name: self.every.due(done, member.steps) for member in active}
                stopping = self.stop.agreed(done)
                if stopping or any(any(flags) for flags in due.values()):
                    self._check(chunks, *pending, done)
                    self._report(chunks, active, due, done)
                saving = self.every.checkpoint and done % self.every.checkpoint == 0
                going_on = any(member.trains_after(done) for member in members)
                if going_on and (saving or stopping):
                    with goodput.spending(goodput.CHECKPOINT):
                        self._save(chunks, done)
                    goodput.saved(self.stage, done)
                if stopping and going_on:
                    with goodput.spending(goodput.CHECKPOINT):
                        self.checkpoints.wait()
                    raise Preempted(f"{self.stage}: stopped at step {done} of {last}, saved")
        with goodput.spending(goodput.CHECKPOINT):
            for member in members:
                member.checkpoints.wait()

    def _count(
        self, chunks: Sequence[MemberChunk], batch: list[Rows], active: Sequence[Member]
    ) -> None:
        """Add the tokens of a step to these members, and what all of them compute to the speed."""
        computed = []
        for c, chunk in enumerate(chunks):
            for index, member in enumerate(chunk.members):
                if member in active:
                    rows = self.rows_of(batch, c, index)
                    member.tally.tokens += tokens_of(rows)
                    computed.append(rows)
        self.speed.add(*computed)

    def _step_all(
        self, chunks: Sequence[MemberChunk], batch: list[Rows], done: int
    ) -> list[Report | None]:
        """One step of every chunk with a member that still trains; None for the others."""
        beat("steps of the members")
        reports: list[Report | None] = []
        for chunk, rows in zip(chunks, self.place(batch)):
            if not any(member.trains_after(done) for member in chunk.members):
                reports.append(None)
                continue
            chunk.states, report = self.step(chunk.states, rows, chunk.hyperparameters)
            chunk.unread.append(sharding.settle(report.metrics))
            reports.append(report)
        return reports

    def _report(
        self,
        chunks: Sequence[MemberChunk],
        active: Sequence[Member],
        due: dict[str, Due],
        done: int,
    ) -> None:
        """Log, evaluate and save what is due, of the members that took this step."""
        for chunk in chunks:
            chunk.read()
        active = [member for member in active if not member.error]
        logging = [member for member in active if due[member.name].log]
        if logging:
            self.last_speed = self.speed.flush() | memory_metrics()
        for member in logging:
            member.log(self.stage, done, self.last_speed)
        evaluating = [member for member in active if due[member.name].evaluate]
        self._evaluate(chunks, evaluating, done)
        last = [member for member in active if member.is_last(done)]
        for member in last:
            if not due[member.name].log:  # no later line would have the metrics of these steps
                member.log(self.stage, done, self.last_speed)
        with goodput.spending(goodput.CHECKPOINT):
            self._each(chunks, last, Member.finish, done)
        for chunk in chunks:
            chunk.idle(done)

    def _evaluate(
        self, chunks: Sequence[MemberChunk], members: Sequence[Member], done: int
    ) -> None:
        with goodput.spending(goodput.EVALUATION):
            self._each(chunks, members, Member.evaluate_and_log, done)
        if members:
            print_line(f"{self.stage} x {len(members)}", speed_line(self.last_speed))
            self.speed.restart()

    def _each(
        self, chunks: Sequence[MemberChunk], members: Sequence[Member], act: Callable, done: int
    ) -> None:
        """Call `act` (member, stage, its state, done) for these members."""
        for chunk in chunks:
            for index, member in enumerate(chunk.members):
                if member in members:
                    beat(f"evaluation of {member.name}")
                    act(member, self.stage, self.take_member(chunk.states, index), done)

    def _check(
        self,
        chunks: Sequence[MemberChunk],
        batch: list[Rows],
        reports: Sequence[Report | None],
        step: int,
    ) -> None:
        """Mark the members whose loss was not finite at this step as failed."""
        for c, (chunk, report) in enumerate(zip(chunks, reports)):
            if report is None or bool(report.finite.all()):
                continue
            finite, bad = sharding.to_host((report.finite, report.bad))
            for index, member in enumerate(chunk.members):
                if not finite[index] and member.trains_after(step - 1):
                    rows = self.rows_of(batch, c, index)
                    names = name_the_not_finite(rows, np.asarray(bad[index]), self.examples)
                    member.error = f"loss or gradient is not finite at step {step}: {names}"
                    print_line(member.name, f"FAILED: {member.error}; the others go on")

    def _save(self, chunks: Sequence[MemberChunk], done: int) -> None:
        failed = {m.name: m.error for chunk in chunks for m in chunk.members if m.error}
        states = {_key(c): chunk.states for c, chunk in enumerate(chunks)}
        for chunk in chunks:
            chunk.read()
        training = [m for chunk in chunks for m in chunk.members if not m.ended]
        tallies = {member.name: member.tally.state() for member in training}
        for member in training:
            member.writer.sync()  # a run that resumes here does not write these lines again
            member.checkpoints.wait()  # one that has ended has its final state, which is not here
        metadata = {"stage": self.stage, "failed": failed, "tallies": tallies}
        metadata[STOP_AT] = {m.name: m.stop_at.state() for m in training if m.stop_at is not None}
        self.checkpoints.save(done, states, self.batches, metadata=metadata)


def _are_computing(pending: tuple | None) -> bool:
    """Whether the devices still compute the last step of a chunk."""
    return pending is not None and any(map(is_computing, pending[1]))


class Resumed(NamedTuple):
    """Where a vectorised sweep goes on.

    Attributes:
      states: of every chunk.
      done: steps.
      failed: why members had failed, by name.
      tallies: of each member, what its steps since the last log add to the next one.
      stops: of each member with a `stop_at`, what is known of its metric.
    """

    states: list[MemberStates]
    done: int
    failed: dict[str, str]
    tallies: dict[str, dict]
    stops: dict[str, dict]


def resume(
    checkpoints: Checkpoints, abstract: MemberStates, chunks: int, batches: Orders
) -> Resumed | None:
    """Read the states of a sweep that was stopped.

    Args:
      checkpoints: of all members' states.
      abstract: of one chunk's states.
      chunks: how many there are.
      batches: is put back to where it was.

    Returns:
      where it goes on; None where nothing is saved.
    """
    done = checkpoints.latest
    if done is None:
        return None
    states, metadata = checkpoints.restore({_key(c): abstract for c in range(chunks)}, batches)
    of_chunks = [states[_key(c)] for c in range(chunks)]
    tallies, stops = metadata.get("tallies", {}), metadata.get(STOP_AT, {})
    return Resumed(of_chunks, done, metadata["failed"], tallies, stops)


def _key(chunk: int) -> str:
    """The name of a chunk's states in a checkpoint."""
    return f"chunk {chunk}"
