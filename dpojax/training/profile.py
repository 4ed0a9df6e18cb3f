"""Where a stage's time goes: spans of the loop, parts of the step, a trace of a few steps."""

from __future__ import annotations

import contextlib
import os
import statistics
import time
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp

from dpojax import storage
from dpojax.data.rows import Rows
from dpojax.training import goodput
from dpojax.training.forward import NO_FROZEN_WEIGHTS, Forward, FrozenWeights, build_outputs
from dpojax.training.objective import Hyper, Objective
from dpojax.training.state import State
from dpojax.training.step import build_gradient
from dpojax.watchdog import beat

COMPILE, DATA, STEP = "compilation and first step", "waiting for data", "steps"
EVALUATION, CHECKPOINT = "evaluation", "waiting for checkpoints"
# Of the goodput. What is compiled in a step counts as such there, and not the whole first step.
BUCKETS = {
    COMPILE: goodput.STEP,
    DATA: goodput.DATA,
    STEP: goodput.STEP,
    EVALUATION: goodput.EVALUATION,
    CHECKPOINT: goodput.CHECKPOINT,
}
TRACED = range(3, 6)  # the steps of this process that a trace shows
REPEATS = 3
TABLE, TRACE = "profile.txt", "trace"


class Spans:
    """Adds up the seconds of a loop by activity, and traces some of its steps.

    Args:
      folder: where the trace goes; None makes none.
    """

    def __init__(self, folder: str | os.PathLike | None = None):
        self.folder = None if folder is None else storage.as_path(folder)
        self.seconds, self.steps = {}, 0
        self._tracing = False
        self._upload = contextlib.ExitStack()

    @contextlib.contextmanager
    def __call__(self, name: str, hidden: Callable[[], bool] | None = None) -> Iterator[None]:
        """Count the time of a `with` block as `name`, for the goodput as well.

        Args:
          hidden: says at the end whether a step was computed all the while; then it counts as one.
        """
        began = time.perf_counter()
        beat(name)
        try:
            with goodput.spending(BUCKETS[name], hidden):
                yield
        finally:
            beat()
            if hidden is not None and hidden():
                name = STEP
            self.seconds[name] = self.seconds.get(name, 0.0) + time.perf_counter() - began

    def stepped(self, report: Any) -> None:
        """Count a step that was dispatched; wait for its report if it is the last one traced."""
        self.steps += 1
        if self.folder is not None and self.steps == TRACED.start - 1:
            jax.profiler.start_trace(str(self._trace_folder()))
            self._tracing = True
        elif self._tracing and self.steps >= TRACED.stop:
            jax.block_until_ready(report)
            self.end()

    def end(self) -> None:
        """Write the trace, if one is being made."""
        if self._tracing:
            jax.profiler.stop_trace()
            self._tracing = False
            self._upload.close()

    def _trace_folder(self) -> os.PathLike:
        """Return the folder that JAX's profiler writes to: a local one, uploaded at the end."""
        folder = self.folder / TRACE
        if storage.is_local(folder):
            return folder
        return self._upload.enter_context(storage.replacing_folder(folder))


def parts_of_step(
    step: Callable,
    forward: Forward,
    objective: Objective,
    state: State,
    rows: Rows,
    hyper: Hyper,
    frozen: FrozenWeights = NO_FROZEN_WEIGHTS,
) -> dict[str, float]:
    """Measure a step's forward pass, backward pass and update on one batch.

    Three programs are timed: the loss, the loss with its gradient, and the whole step. The
    backward pass is what the second takes longer than the first, and so on.

    Args:
      step: (state, rows, hyper, frozen) -> (state, report), which donates the state.

    Returns:
      Median seconds of `forward`, `backward` and `update`.
    """
    outputs = build_outputs(forward)
    gradient = jax.jit(build_gradient(forward, objective))

    @jax.jit
    def loss(state: State):
        return objective.terms(outputs(state.params, rows, frozen, hyper), rows, hyper).loss.sum()

    of_loss = _median(loss, lambda: state)
    of_gradient = _median(lambda state: gradient(state, rows, hyper, frozen), lambda: state)
    # The step donates its state, so every run gets a copy.
    of_step = _median(
        lambda copy: step(copy, rows, hyper, frozen), lambda: jax.tree.map(jnp.copy, state)
    )
    return {
        "forward": of_loss,
        "backward": of_gradient - of_loss,
        "update": of_step - of_gradient,
    }


def table(spans: Spans, parts: dict[str, float], utilisation: float) -> str:
    """Format the seconds and shares as a table."""
    total = sum(spans.seconds.values())
    lines = [f"{'where the time went':<30}{'seconds':>10}{'share':>8}"]
    for name, seconds in sorted(spans.seconds.items(), key=lambda item: -item[1]):
        lines.append(f"{name:<30}{seconds:>10.2f}{seconds / total:>8.1%}")
    whole = sum(parts.values())
    lines.append(f"\n{'one step, by itself':<30}{whole:>10.3f}")
    lines += [f"  {name:<28}{x:>10.3f}{x / whole:>8.1%}" for name, x in parts.items()]
    lines.append(f"\nmodel FLOPs / matmul rate     {utilisation:>10.1%}")
    return "\n".join(lines)


def write(
    folder: str | os.PathLike, spans: Spans, parts: dict[str, float], utilisation: float
) -> str:
    """Write profile.txt and profile.json; return the table."""
    folder, text = storage.as_path(folder), table(spans, parts, utilisation)
    storage.write_text(folder / TABLE, text + "\n")
    numbers = {"spans": spans.seconds, "step": parts, "utilisation": utilisation}
    storage.write_json((folder / TABLE).with_suffix(".json"), numbers)
    return text


def _median(function: Callable, argument: Callable[[], Any]) -> float:
    """Median seconds of a call, without compilation."""
    times = []
    for _ in range(1 + REPEATS):
        value = jax.block_until_ready(argument())
        began = time.perf_counter()
        jax.block_until_ready(function(value))
        times.append(time.perf_counter() - began)
    return statistics.median(times[1:])
