"""The loop around lanes: members of a sweep train on the same batches, and end or fail alone."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterator, Sequence

import jax
import numpy as np

from dpojax import sharding
from dpojax.data.rows import Rows
from dpojax.data.tokenise import Example
from dpojax.training.checkpoints import Checkpoints
from dpojax.training.loop import (
    Every,
    Preempted,
    StopSignal,
    say_evaluation,
    say_lost,
    what_is_not_finite,
)
from dpojax.training.metrics import MetricWriter, Window, progress
from dpojax.training.state import State
from dpojax.training.vectorised_step import MemberHyperparameters, MemberStates

POSITION_OF = "orders"


@dataclasses.dataclass
class Member:
    """What a member has of its own.

    evaluate: state -> values by metric name, on the held-out data.
    checkpoints: where its final state goes.
    ended: by an earlier call; its lane is idle, and it has nothing of the above.
    error: why it failed; "" if it did not.
    found: its last evaluation.
    warned: that its updates are lost to rounding; said once.
    """

    name: str
    steps: int
    evaluate: Callable[[State], dict[str, float]] | None = None
    writer: MetricWriter | None = None
    checkpoints: Checkpoints | None = None
    ended: bool = False
    error: str = ""
    found: dict[str, float] = dataclasses.field(default_factory=dict)
    window: Window = dataclasses.field(default_factory=Window)
    warned: bool = False

    def going(self, done: int) -> bool:
        return not self.ended and not self.error and done < self.steps


@dataclasses.dataclass
class MemberChunk:
    """Members whose lanes one call computes, in order; what is left of the lanes is idle."""

    members: Sequence[Member]
    lanes: MemberStates
    numbers: MemberHyperparameters
    unread: list = dataclasses.field(default_factory=list)  # metrics of steps, on the device

    def read(self) -> None:
        """Hand the metrics of the steps since the last call to the members' windows."""
        steps, self.unread = sharding.to_host(self.unread), []
        for metrics in steps:
            for lane, member in enumerate(self.members):
                if member.ended:
                    continue
                member.window.add(jax.tree.map(lambda x, i=lane: x[i], metrics))


class Orders:
    """Batches of several orders of the same examples side by side, as one saveable iterator."""

    def __init__(self, iterators: Sequence):
        self._iterators = iterators

    def __next__(self) -> list[Rows]:
        return [next(iterator) for iterator in self._iterators]

    def get_state(self) -> dict:
        return {POSITION_OF: [iterator.get_state() for iterator in self._iterators]}

    def set_state(self, state: dict) -> None:
        for iterator, own in zip(self._iterators, state[POSITION_OF], strict=True):
            iterator.set_state(own)


@dataclasses.dataclass
class VectorisedLoop:
    """What members need in order to train together.

    step: (lanes, rows on the mesh, numbers) -> (lanes, reports); donates the lanes.
    lane: (lanes, index) -> that member's state.
    batches: lists of NumPy rows, one of every order, positioned at the first step; saveable.
    place: such a list -> the rows of every turn on the mesh.
    rows_of: such a list, turn, lane -> the NumPy rows that this lane saw.
    checkpoints: of all lanes, until every member has ended.
    """

    stage: str
    step: Callable
    lane: Callable[[MemberStates, int], State]
    batches: Iterator[list[Rows]]
    place: Callable[[list[Rows]], list[Rows]]
    rows_of: Callable[[list[Rows], int, int], Rows]
    every: Every
    examples: Sequence[Example]
    checkpoints: Checkpoints
    stop: StopSignal

    def __call__(self, turns: Sequence[MemberChunk], done: int) -> None:
        """Train until every member has ended or failed; final states are on disk then.

        Raises:
          Preempted: after a SIGTERM, once all lanes are saved.
        """
        members = [m for turn in turns for m in turn.members if not m.ended]
        last, pending = max(member.steps for member in members), None
        if done == 0:
            self._each(turns, members, self._evaluate, 0)
        with progress(last, done, f"{self.stage} x {len(members)}") as bar:
            while any(member.going(done) for member in members):
                batch = next(self.batches)
                reports = self._step_all(turns, batch, done)
                going = [member for member in members if member.going(done)]
                done += 1
                bar.update()
                if pending is not None:  # one step behind, so that the device never waits for us
                    self._check(turns, *pending, done - 1)
                pending = batch, reports
                due = {member.name: self.every.due(done, member.steps) for member in going}
                stopping = self.stop.agreed(done)
                if stopping or any(any(flags) for flags in due.values()):
                    self._check(turns, *pending, done)
                    self._tell(turns, going, due, done)
                saving = self.every.checkpoint and done % self.every.checkpoint == 0
                if done < last and (saving or stopping):
                    self._save(turns, done)
                if stopping and done < last:
                    self.checkpoints.wait()
                    raise Preempted(f"{self.stage}: stopped at step {done} of {last}, saved")
        for member in members:
            member.checkpoints.wait()

    def _step_all(self, turns: Sequence[MemberChunk], batch: list[Rows], done: int) -> list:
        """One step of every turn that goes on; None for the others."""
        reports: list = []
        for turn, rows in zip(turns, self.place(batch)):
            if not any(member.going(done) for member in turn.members):
                reports.append(None)
                continue
            turn.lanes, report = self.step(turn.lanes, rows, turn.numbers)
            turn.unread.append(report.metrics)
            reports.append(report)
        return reports

    def _tell(self, turns, going: Sequence[Member], due: dict, done: int) -> None:
        """Log, evaluate and save what is due, of the members that took this step."""
        for turn in turns:
            turn.read()
        asked = lambda k: [m for m in going if due[m.name][k] and not m.error]
        for member in asked(0):
            values = member.window.flush()
            name = f"{self.stage} {member.name}"
            member.warned = member.warned or say_lost(name, done, values)
            member.writer.write(done, values, split="train")
        self._each(turns, asked(1), self._evaluate, done)
        self._each(turns, [m for m in asked(2) if done == m.steps], self._finish, done)

    def _each(self, turns, members: Sequence[Member], act: Callable, done: int) -> None:
        for turn in turns:
            for index, member in enumerate(turn.members):
                if member in members:
                    act(member, self.lane(turn.lanes, index), done)

    def _evaluate(self, member: Member, state: State, done: int) -> None:
        values = member.found = member.evaluate(state)
        member.writer.write(done, values, split="eval")
        say_evaluation(f"{self.stage} {member.name}", done, member.steps, values)

    def _finish(self, member: Member, state: State, done: int) -> None:
        finite = {name: x for name, x in member.found.items() if math.isfinite(x)}
        metadata = {"stage": self.stage, "evaluation": finite}
        member.checkpoints.save(done, state, metadata=metadata)

    def _check(self, turns, batch: list[Rows], reports: list, step: int) -> None:
        """Members whose loss was not finite at this step have failed."""
        for t, (turn, report) in enumerate(zip(turns, reports)):
            if report is None or bool(report.finite.all()):
                continue
            finite, bad = sharding.to_host((report.finite, report.bad))
            for lane, member in enumerate(turn.members):
                if not finite[lane] and member.going(step - 1):
                    rows = self.rows_of(batch, t, lane)
                    found = what_is_not_finite(rows, np.asarray(bad[lane]), self.examples)
                    member.error = f"loss or gradient is not finite at step {step}: {found}"

    def _save(self, turns: Sequence[MemberChunk], done: int) -> None:
        failed = {m.name: m.error for turn in turns for m in turn.members if m.error}
        lanes = {f"turn {i}": turn.lanes for i, turn in enumerate(turns)}
        metadata = {"stage": self.stage, "failed": failed}
        self.checkpoints.save(done, lanes, self.batches, metadata=metadata)


def resume(
    checkpoints: Checkpoints, abstract: MemberStates, turns: int, batches: Orders
) -> tuple[list[MemberStates], int, dict[str, str]] | None:
    """The lanes of every turn, the steps done and the members that had failed; None at step 0."""
    done = checkpoints.latest
    if done is None:
        return None
    wanted = {f"turn {i}": abstract for i in range(turns)}
    lanes, metadata = checkpoints.restore(wanted, batches)
    return [lanes[f"turn {i}"] for i in range(turns)], done, metadata["failed"]
