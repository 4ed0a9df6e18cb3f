"""Metrics and speed of the steps since the last line of metrics.jsonl."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping

import numpy as np

from dpojax.data.rows import Rows, utilisation
from dpojax.training.metrics import Window
from dpojax.training.throughput import memory_bytes

UTILISATION, MFU = "perf/model_flops_utilisation", "perf/mfu"
SECONDS_PER_STEP = "perf/seconds_per_step"
TFLOPS, TOKENS = "perf/tflops_per_device", "perf/tokens_per_second_per_device"


class Speed:
    """Adds up what steps compute until `flush`.

    Args:
      flops: rows -> the model FLOPs of a batch.
      ceiling: -> FLOP/s of a matmul on all devices together, measured. It is called when a speed
        is first asked for, since measuring it takes a second.
      devices: how many compute a step.
      peak: FLOP/s of all devices by their maker's page; None where that is not known.
    """

    def __init__(
        self,
        flops: Callable[[Rows], float],
        ceiling: Callable[[], float],
        devices: int = 1,
        peak: float | None = None,
    ):
        self.flops_of, self.ceiling, self.devices, self.peak = flops, ceiling, devices, peak
        self.restart()

    def restart(self) -> None:
        """Measure from now on."""
        self.began, self.steps = time.perf_counter(), 0
        self.tokens, self.examples, self.flops = 0, 0, 0.0
        self.fill: list[float] = []

    def add(self, *batches: Rows) -> None:
        """Add a step that was dispatched; nothing is waited for.

        Args:
          batches: the rows of every member that takes the step, of a run its own.
        """
        self.steps += 1
        self.tokens += sum(map(tokens_of, batches))
        self.examples += sum(int((rows.example >= 0).sum()) for rows in batches)
        self.flops += sum(map(self.flops_of, batches))
        self.fill += map(utilisation, batches)

    def flush(self) -> dict[str, float]:
        """The speed since the last call, once the device is waited for; {} without a step."""
        seconds = time.perf_counter() - self.began
        values = self._values(seconds) if self.steps else {}
        self.restart()
        return values

    def _values(self, seconds: float) -> dict[str, float]:
        rate = self.flops / seconds
        speed = {
            "perf/tokens_per_second": self.tokens / seconds,
            TOKENS: self.tokens / seconds / self.devices,
            "perf/examples_per_second": self.examples / seconds,
            "perf/steps_per_second": self.steps / seconds,
            SECONDS_PER_STEP: seconds / self.steps,
            TFLOPS: rate / self.devices / 1e12,
            UTILISATION: rate / self.ceiling(),
            "perf/row_utilisation": float(np.mean(self.fill)),
        }
        return speed if self.peak is None else speed | {MFU: rate / self.peak}


class Tally:
    """What the steps of one run, or of one member, add to its next train line.

    Attributes:
      window: the metrics since the last line.
      tokens: since step 0, without padding.
    """

    def __init__(self):
        self.window, self.tokens = Window(), 0

    def state(self) -> dict:
        """What `restore` goes on from, for the metadata of a checkpoint."""
        return {"sums": self.window.state(), "tokens": self.tokens}

    def restore(self, state: dict | None) -> None:
        """Go on from what `state` returned; None starts from nothing."""
        self.window.restore(state["sums"] if state else {})
        self.tokens = state["tokens"] if state else 0

    def flush(self) -> dict[str, float]:
        """The metrics since the last call, and `num_tokens`; waits for the device."""
        return self.window.flush() | {"num_tokens": float(self.tokens)}


def tokens_of(rows: Rows) -> int:
    """How many tokens these rows hold, without padding; a prompt counts once for its pair."""
    return int((rows.segment > 0).sum())


def memory_metrics() -> dict[str, float]:
    """Bytes of the device and of the process, for a line."""
    return {f"memory/{name}": float(n) for name, n in memory_bytes().items()}


def speed_line(values: Mapping[str, float]) -> str:
    """`0.251 s/step  85.8 TFLOP/s, 7,207 tokens/s a device  45.5 % MFU, 62.1 % of a matmul`.

    Args:
      values: of `Speed.flush`. Where they have no speed, the line is "".
    """
    if SECONDS_PER_STEP not in values:
        return ""
    mfu = f"{100 * values[MFU]:.1f} % MFU, " if MFU in values else ""
    return (
        f"{values[SECONDS_PER_STEP]:.3g} s/step  {values[TFLOPS]:.3g} TFLOP/s, "
        f"{values[TOKENS]:,.0f} tokens/s a device  "
        f"{mfu}{100 * values[UTILISATION]:.1f} % of a matmul"
    )
