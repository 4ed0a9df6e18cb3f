"""Where a stage's time goes: spans of the loop, parts of the step, and a trace of a few steps."""

from __future__ import annotations

import contextlib
import json
import pathlib
import statistics
import time
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp

from dpojax.data.rows import Rows
from dpojax.training.forward import NO_FROZEN_WEIGHTS, Forward, FrozenWeights, build_outputs
from dpojax.training.objective import Hyper, Objective
from dpojax.training.state import State
from dpojax.training.step import build_gradient

COMPILE, DATA, STEP = "compilation and first step", "waiting for data", "steps"
EVALUATION, CHECKPOINT = "evaluation", "waiting for checkpoints"
TRACED = range(3, 6)  # steps of this process, which a trace shows
REPEATS = 3
TABLE, TRACE = "profile.txt", "trace"


class Spans:
    """Seconds of a loop by what they were spent on, and a trace of some of its steps.

    Args:
      folder: where the trace goes; None makes none.
    """

    def __init__(self, folder: pathlib.Path | None = None):
        self.folder, self.seconds, self.steps = folder, {}, 0
        self._tracing = False

    @contextlib.contextmanager
    def __call__(self, name: str) -> Iterator[None]:
        began = time.perf_counter()
        try:
            yield
        finally:
            self.seconds[name] = self.seconds.get(name, 0.0) + time.perf_counter() - began

    def stepped(self, report: Any) -> None:
        """One more step is under way and will give `report`; the last one traced is waited for."""
        self.steps += 1
        if self.folder is not None and self.steps == TRACED.start - 1:
            jax.profiler.start_trace(str(self.folder / TRACE))
            self._tracing = True
        elif self._tracing and self.steps >= TRACED.stop:
            jax.block_until_ready(report)
            self.end()

    def end(self) -> None:
        """Write the trace, if one is being made."""
        if self._tracing:
            jax.profiler.stop_trace()
            self._tracing = False


def parts_of_step(
    step: Callable,
    forward: Forward,
    objective: Objective,
    state: State,
    rows: Rows,
    hyper: Hyper,
    frozen: FrozenWeights = NO_FROZEN_WEIGHTS,
) -> dict[str, float]:
    """Seconds of a step's forward pass, backward pass and update, on one batch; medians.

    Programs of their own: the loss alone, the loss with its gradient, and the whole step. A part is
    what the next program takes longer.

    Args:
      step: (state, rows, hyper, frozen) -> (state, report), which donates the state.
    """
    outputs = build_outputs(forward)
    loss = lambda params: objective.terms(outputs(params, rows, frozen), rows, hyper).loss.sum()
    gradient = jax.jit(build_gradient(forward, objective))
    whole = lambda fresh: step(fresh, rows, hyper, frozen)
    first = _median(jax.jit(loss), lambda: state.params)
    second = _median(lambda state: gradient(state, rows, hyper, frozen), lambda: state)
    third = _median(whole, lambda: jax.tree.map(jnp.copy, state))
    return {"forward": first, "backward": second - first, "update": third - second}


def table(spans: Spans, parts: dict[str, float], utilisation: float) -> str:
    """What took how long, for a person."""
    total = sum(spans.seconds.values())
    lines = [f"{'where the time went':<30}{'seconds':>10}{'share':>8}"]
    for name, seconds in sorted(spans.seconds.items(), key=lambda item: -item[1]):
        lines.append(f"{name:<30}{seconds:>10.2f}{seconds / total:>8.1%}")
    whole = sum(parts.values())
    lines.append(f"\n{'one step, by itself':<30}{whole:>10.3f}")
    lines += [f"  {name:<28}{x:>10.3f}{x / whole:>8.1%}" for name, x in parts.items()]
    lines.append(f"\nmodel FLOPs / matmul rate     {utilisation:>10.1%}")
    return "\n".join(lines)


def write(folder: pathlib.Path, spans: Spans, parts: dict[str, float], utilisation: float) -> str:
    """profile.txt and profile.json; returns the table."""
    text = table(spans, parts, utilisation)
    (folder / TABLE).write_text(text + "\n")
    found = {"spans": spans.seconds, "step": parts, "utilisation": utilisation}
    (folder / TABLE).with_suffix(".json").write_text(json.dumps(found, indent=2) + "\n")
    return text


def _median(function: Callable, argument: Callable[[], Any]) -> float:
    """Seconds of a call, without compilation."""
    times = []
    for _ in range(1 + REPEATS):
        given = jax.block_until_ready(argument())
        began = time.perf_counter()
        jax.block_until_ready(function(given))
        times.append(time.perf_counter() - began)
    return statistics.median(times[1:])
