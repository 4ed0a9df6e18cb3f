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


class Pace:
    """Adds up steps until `flush`.

    Args:
      flops: rows -> the model FLOPs of a batch.
      ceiling: -> FLOP/s of a matmul on all devices together, measured.
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
        self.window, self.flops_of, self.ceiling = Window(), flops, ceiling
        self.devices, self.peak = devices, peak
        self.seen = 0  # tokens since step 0; the other counts are since the last restart
        self.restart()

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
        self.began, self.tokens, self.examples, self.flops = time.perf_counter(), 0, 0, 0.0
        self.fill: list[float] = []

    def add(self, rows: Rows, report: Report) -> None:
        """Add a step that was dispatched; nothing is waited for."""
        self.window.add(report.metrics)
        tokens = int((rows.segment > 0).sum())
        self.seen += tokens
        self.tokens += tokens
        self.examples += int((rows.example >= 0).sum())
        self.flops += self.flops_of(rows)
        self.fill.append(utilisation(rows))

    def flush(self) -> dict[str, float]:
        """The metrics of the steps since the last call, and their speed; waits for the device."""
        values = self.window.flush()
        seconds = time.perf_counter() - self.began
        values["num_tokens"] = float(self.seen)
        if self.fill:
            values |= self._speed(seconds)
        values |= {f"memory/{name}": float(n) for name, n in memory_bytes().items()}
        self.restart()
        return values

    def _speed(self, seconds: float) -> dict[str, float]:
        rate, steps = self.flops / seconds, len(self.fill)
        speed = {
            "perf/tokens_per_second": self.tokens / seconds,
            TOKENS: self.tokens / seconds / self.devices,
            "perf/examples_per_second": self.examples / seconds,
            "perf/steps_per_second": steps / seconds,
            SECONDS_PER_STEP: seconds / steps,
            TFLOPS: rate / self.devices / 1e12,
            UTILISATION: rate / self.ceiling(),
            "perf/row_utilisation": float(np.mean(self.fill)),
        }
        return speed if self.peak is None else speed | {MFU: rate / self.peak}


def speed_line(values: Mapping[str, float]) -> str:
    """`0.251 s/step  85.8 TFLOP/s, 7,207 tokens/s a device  45.5 % MFU, 62.1 % of a matmul`.

    Args:
      values: of `Pace.flush`. Where they have no speed, the line is "".
    """
    if SECONDS_PER_STEP not in values:
        return ""
    mfu = f"{100 * values[MFU]:.1f} % MFU, " if MFU in values else ""
    return (
        f"{values[SECONDS_PER_STEP]:.3g} s/step  {values[TFLOPS]:.3g} TFLOP/s, "
        f"{values[TOKENS]:,.0f} tokens/s a device  "
        f"{mfu}{100 * values[UTILISATION]:.1f} % of a matmul"
    )
