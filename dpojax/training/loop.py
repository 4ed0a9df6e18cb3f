"""The loop around the step: logs, evaluates, saves, stops cleanly, and never trains on NaN."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import NamedTuple

import jax
import numpy as np

from dpojax import display, sharding, stopping
from dpojax.data.examples import Example
from dpojax.data.rows import Rows
from dpojax.training import goodput
from dpojax.training.checkpoints import Checkpoints
from dpojax.training.health import Health
from dpojax.training.keep_best import KEEP_BEST, KeepBest
from dpojax.training.lost_updates import LOST_UPDATES
from dpojax.training.metrics import MetricWriter, evaluation_line
from dpojax.training.objective import Hyper
from dpojax.training.pace import Speed, Tally, memory_metrics, speed_line, tokens_of
from dpojax.training.preemption import Preempted, StopSignal
from dpojax.training.profile import CHECKPOINT, COMPILE, DATA, EVALUATION, STEP, Spans
from dpojax.training.state import State
from dpojax.training.step import Report
from dpojax.training.stop_at import STOP_AT, StopAt

WINDOW = "window"  # in a checkpoint's metadata: of the steps that no line has shown yet
NOT_EVALUATED = "not_evaluated"  # in it: a signal ended the evaluation that was due
MOST_LOST = 0.5  # share of updates that rounding may swallow without a warning


class NonFiniteLoss(FloatingPointError):
    """The loss or its gradient is NaN or infinite; the state before the step is kept."""


class Due(NamedTuple):
    """What is to be done after a step."""

    log: bool
    evaluate: bool
    save: bool


@dataclasses.dataclass(frozen=True)
class Every:
    """Steps between two logs, evaluations and checkpoints; 0 means only at the end."""

    log: int
    evaluate: int
    checkpoint: int

    def due(self, step: int, steps: int) -> Due:
        """What is to be done after `step` of `steps`; everything after the last."""
        intervals = (self.log, self.evaluate, self.checkpoint)
        return Due(*(step == steps or (n > 0 and step % n == 0) for n in intervals))


@dataclasses.dataclass
class TrainLoop:
    """What a stage needs in order to run; call it with a state.

    Attributes:
      stage: its name.
      step: the jitted step, (state, rows on the mesh, hyper) -> (state, report). It donates the
        state.
      batches: NumPy rows in training order, positioned at the state's step; it can be saved.
      to_device: NumPy rows -> rows on the mesh, with reference log-probs where they are needed.
      evaluate: state -> values by metric name, on the held-out data.
      speed: of its steps, on all devices.
      hyper: the step's numbers.
      steps: of the whole run.
      every: how often to log, evaluate and save.
      examples: of the data, by the numbers in rows.
      checkpoints: where states go.
      writer: of metrics.
      stop: says whether the run is asked to stop.
      keep_best: follows a metric of `evaluate`. Whenever it is better than before, the state is
        saved and stays on disk until one is better. It also says when to stop early. None keeps no
        best.
      stop_at: says when a metric of `evaluate` has reached the value to stop at; None: never.
      spans: add up where the time goes.
      warned: the terminal has said that updates are lost to rounding.
      last_line: of metrics.
      tally: what the steps since `last_line` add to the next one.
      health: says in words how the training does.
    """

    stage: str
    step: Callable[[State, Rows, Hyper], tuple[State, Report]]
    batches: Iterator[Rows]
    to_device: Callable[[Rows], Rows]
    evaluate: Callable[[State], dict[str, float]]
    speed: Speed
    hyper: Hyper
    steps: int
    every: Every
    examples: Sequence[Example]
    checkpoints: Checkpoints
    writer: MetricWriter
    stop: StopSignal
    keep_best: KeepBest | None = None
    stop_at: StopAt | None = None
    spans: Spans = dataclasses.field(default_factory=Spans)
    warned: bool = False
    last_line: dict[str, float] = dataclasses.field(default_factory=dict)
    tally: Tally = dataclasses.field(default_factory=Tally)
    health: Health = dataclasses.field(default_factory=Health)

    def __call__(self, state: State) -> State:
        """Train to the last step or to an early stop; return the state, also on disk.

        Raises:
          NonFiniteLoss: naming the examples; the last good checkpoint is kept.
          Preempted: asked to stop, once the state is saved.
        """
        try:
            with self.stop.steps(), goodput.spending(goodput.STEP):
                return self._train(state)
        finally:
            self.spans.end()

    def _train(self, state: State) -> State:
        done = int(state.step)
        saved = self.checkpoints.metadata(done) if done else {}
        for followed in self._followed():
            followed.restore(saved)  # at step 0 nothing is saved
        goodput.goes_on(self.stage, done)
        first = done + 1
        self.tally.restore(saved.get(WINDOW))
        self.speed.restart()
        if done == 0 or saved.get(NOT_EVALUATED):
            self._evaluate(state, done)
        with display.bar(self.stage, self.steps, done) as bar:
            pending, ended = None, self._stops_early(done)
            while done < self.steps and not ended:
                with self.spans(DATA, partial(is_computing, pending and pending[1])):
                    rows = next(self.batches)
                    placed = self.to_device(rows)
                with self.spans(COMPILE if done + 1 == first else STEP):
                    state, report = self.step(state, placed, self.hyper)
                    done += 1
                    if pending is not None:  # one step behind: the device never waits for us
                        self._check(*pending, done - 1)
                self.spans.stepped(report)
                pending = rows, report
                self._count(rows, report)
                bar.update()
                if done == first:
                    self.speed.restart()  # without the compilation
                due = self.every.due(done, self.steps)
                asked = self.stop.agreed(done)
                if any(due) or asked:
                    with self.spans(COMPILE if done == first else STEP):
                        self._check(*pending, done)
                if due.log:
                    bar.note = _numbers(self._log(done))
                values, is_best = {}, False
                if due.evaluate:
                    values, is_best = self._evaluate(state, done)
                    self.speed.restart()
                ended = self._stops_early(done)
                if ended and not due.log:  # no later line would have the metrics of these steps
                    self._log(done)
                if due.save or asked or is_best or ended:
                    self._save(state, done, values, is_best)
                if asked and done < self.steps and not ended:
                    self._wait()
                    raise Preempted(f"{self.stage}: stopped at step {done} of {self.steps}, saved")
        self._wait()
        return state

    def _wait(self) -> None:
        """Wait until the last checkpoint is on disk."""
        with self.spans(CHECKPOINT):
            self.checkpoints.wait()

    def _stops_early(self, step: int) -> bool:
        return any(followed.stopped_at == step for followed in self._followed())

    def _followed(self) -> list[KeepBest | StopAt]:
        """What follows a metric, and may end the training."""
        return [x for x in (self.keep_best, self.stop_at) if x is not None]

    def _check(self, rows: Rows, report: Report, step: int) -> None:
        """Refuse a step whose loss or gradient was not finite."""
        if bool(report.finite):
            return
        names = name_the_not_finite(rows, np.asarray(sharding.to_host(report.bad)), self.examples)
        raise NonFiniteLoss(
            f"{self.stage}: loss or gradient is not finite at step {step}: {names}. The last good "
            f"checkpoint ({self.checkpoints.latest}) is kept; look at these records with "
            "scripts/inspect_data.py, or lower the learning rate in a new workdir (an exported SFT "
            "policy as config.model.path saves that stage)"
        )

    def _count(self, rows: Rows, report: Report) -> None:
        """Add a step that was dispatched; nothing is waited for."""
        self.tally.window.add(report.metrics)
        self.tally.tokens += tokens_of(rows)
        self.speed.add(rows)

    def _log(self, step: int) -> dict[str, float]:
        values = self.tally.flush() | self.speed.flush() | memory_metrics() | goodput.metrics()
        self.warned = self.warned or warn_of_lost_updates(self.stage, step, values)
        self.writer.write(step, values, split="train")
        self.last_line = values
        return values

    def _evaluate(self, state: State, step: int) -> tuple[dict[str, float], bool]:
        """Evaluate and log; return the values, and whether they are the best so far.

        A signal need not wait for the end. The run that resumes then evaluates first. The last
        evaluation, one that decides anything, and one of several processes are not cut short.

        Raises:
          Preempted: the state is saved, and not evaluated.
        """
        alone = jax.process_count() == 1 and not self._followed()
        try:
            with self.spans(EVALUATION), stopping.obeyed(alone and step < self.steps):
                values = self.evaluate(state)
        except Preempted as stopped:
            if step and self.stop.agreed(step):
                self._save(state, step, {}, False, {NOT_EVALUATED: True})
                self._wait()
            why = f"stopped in the evaluation at step {step} of {self.steps}, what is done is saved"
            raise Preempted(f"{self.stage}: {why}") from stopped
        self.writer.write(step, values, split="eval")
        print_evaluation(self.stage, step, self.steps, values, self.health.add(step, values))
        print_line(self.stage, speed_line(self.last_line))
        if self.stop_at is not None and self.stop_at.add(step, values):
            say_reached(self.stage, self.stop_at, self.steps)
        return values, self.keep_best is not None and self.keep_best.add(step, values)

    def _save(
        self,
        state: State,
        step: int,
        values: dict[str, float],
        is_best: bool,
        more: dict | None = None,
    ) -> None:
        """Save the state, with the values of its evaluation ({} if there was none) and `more`."""
        evaluation = {name: x for name, x in values.items() if math.isfinite(x)}
        metadata = {"stage": self.stage, "evaluation": evaluation, WINDOW: self.tally.state()}
        metadata |= more or {}
        self.writer.sync()  # a run that resumes here does not write these lines again
        if self.keep_best is not None:
            metadata[KEEP_BEST] = self.keep_best.state()
        if self.stop_at is not None:
            metadata[STOP_AT] = self.stop_at.state()
        score = self.keep_best.score if is_best else None
        with self.spans(CHECKPOINT):
            self.checkpoints.save(step, state, self.batches, metadata=metadata, score=score)
        goodput.saved(self.stage, step)


def is_computing(report: Report | None) -> bool:
    """Whether the devices still compute the step that gave this report."""
    finite = None if report is None else report.finite
    return isinstance(finite, jax.Array) and not finite.is_ready()


def print_line(name: str, text: str) -> None:
    """Print a line in the first process alone; none for ""."""
    if text and jax.process_index() == 0:
        display.say(f"{name}  {text}")


def print_evaluation(
    name: str, step: int, steps: int, values: dict[str, float], health: str
) -> None:
    """Print what an evaluation has found, and what `training.health` says of it."""
    print_line(name, "  ".join(filter(None, [evaluation_line(step, steps, values), health])))


def say_reached(name: str, stop_at: StopAt, steps: int) -> None:
    """Print why a training ends before its last step, in the first process alone."""
    print_line(name, f"stops at {stop_at.describe(steps)}")


def warn_of_lost_updates(name: str, step: int, values: dict[str, float]) -> bool:
    """Print a warning if rounding swallows most updates; returns whether it does."""
    lost = values.get(LOST_UPDATES, 0.0)
    if lost > MOST_LOST and jax.process_index() == 0:
        display.say(
            f"{name}  step {step}: {lost:.0%} of the updates are smaller than the weights can "
            "resolve, and change nothing: the learning rate is too small"
        )
    return lost > MOST_LOST


def name_the_not_finite(rows: Rows, bad: np.ndarray, examples: Sequence[Example]) -> str:
    """Name the examples of a batch whose loss is not finite.

    If only the gradient is not finite, name all of them.

    Args:
      rows: the batch.
      bad: [M, R, E] bool, of the step's report.
      examples: of the data, by the numbers in rows.
    """
    names = [examples[i].id for i in rows.example[bad] if i >= 0]
    if not names:
        all_of_them = [examples[i].id for i in rows.example.ravel() if i >= 0]
        names = ["the gradient, not any one loss; the batch was", *all_of_them]
    return ", ".join(names[:8]) + (f" and {len(names) - 8} more" if len(names) > 8 else "")


def _numbers(values: dict[str, float]) -> str:
    """The numbers beside the progress bar."""
    labels = {"loss": "loss", "rewards/accuracies": "accuracy", "accuracy": "accuracy"}
    return ", ".join(
        f"{label} {values[name]:.3f}"
        for name, label in labels.items()
        if math.isfinite(values.get(name, math.nan))
    )
