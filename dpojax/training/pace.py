"""Metrics and speed of the steps since the last line of metrics.jsonl."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping

import numpy as np

from dpojax.data.rows import Rows, utilisation
from dpojax.training.metrics import Window
from dpojax.training.step import Report
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

    def add(self, *batches: Rows) -> int:
        """Add a step that was dispatched; nothing is waited for. Returns its tokens.

        Args:
          batches: the rows of every member that takes the step, of a run its own.
        """
        tokens = sum(int((rows.segment > 0).sum()) for rows in batches)
        self.steps += 1
        self.tokens += tokens
        self.examples += sum(int((rows.example >= 0).sum()) for rows in batches)
        self.flops += sum(map(self.flops_of, batches))
        self.fill += map(utilisation, batches)
        return tokens

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


class Pace:
    """Metrics and speed of the steps until `flush`."""

    def __init__(self, speed: Speed):
        self.window, self.speed = Window(), speed
        self.seen = 0  # tokens since step 0

    def not_logged(self) -> dict:
        """Sums since the last log, and all tokens, for the metadata of a checkpoint."""
        return {"sums": self.window.state(), "tokens": self.seen}

    def carry_over(self, not_logged: dict | None) -> None:
        """Go on from what `not_logged` returned."""
        if not_logged is not None:
            self.window.restore(not_logged["sums"])
            self.seen = not_logged["tokens"]

    def restart(self) -> None:
        """Measure the speed from now on."""
        self.speed.restart()

    def add(self, rows: Rows, report: Report) -> None:
        """Add a step that was dispatched; nothing is waited for."""
        self.window.add(report.metrics)
        self.seen += self.speed.add(rows)

    def flush(self) -> dict[str, float]:
        """The metrics of the steps since the last call, and their speed; waits for the device."""
        values = self.window.flush()
        values["num_tokens"] = float(self.seen)
        values |= self.speed.flush()
        return values | memory_metrics()


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
