"""Metrics: weighted sums on devices, the files that hold them, and lines to print."""

from __future__ import annotations

import json
import math
import os
import time
from collections.abc import Collection, Mapping, Sequence
from typing import NamedTuple

import jax
from jax.typing import ArrayLike

from dpojax import sharding, storage
from dpojax.training.metric_names import aliases
from dpojax.training.trackers.tracker import Tracker
from dpojax.watchdog import beat

FILE = "metrics.jsonl"
RESERVED = ("step", "split", "time")  # fields of a line that are no metrics
# (metric, scale, text) of the line about an evaluation.
SHOWN = (
    ("loss", 1, "eval loss {value:.4f}"),
    ("rewards/accuracies", 100, "accuracy {value:.1f} %"),
    ("accuracy", 100, "accuracy {value:.1f} %"),
    ("rewards/margins", 1, "margin {value:+.2f}"),
    ("displacement", 100, "chosen less likely {value:.0f} %"),
    ("kl/per_token", 1, "kl {value:.3f} nats/token"),
    ("samples/win_rate", 100, "win rate {value:.1f} %"),
)


class Metric(NamedTuple):
    """A weighted sum and its weight, of equal shapes. Device functions return metrics like this.

    `merge` adds up the parts of a batch; only the code that logs divides. Padded examples have
    weight 0, so a metric does not depend on the batch size or the number of devices.
    """

    total: ArrayLike
    weight: ArrayLike

    @property
    def value(self) -> ArrayLike:
        """Return total / weight as a float; nan if the weight is 0. Only on the host."""
        if isinstance(self.weight, jax.core.Tracer):
            raise TypeError("Metric.value divides on the host; return the Metric from jit instead")
        total, weight = jax.device_get((self.total, self.weight))
        return float(total) / float(weight) if weight else math.nan


def merge(a: Metric, b: Metric) -> Metric:
    """Return the metric of two parts taken together."""
    return Metric(a.total + b.total, a.weight + b.weight)


class Window:
    """Collects the metrics of several steps without waiting for a device.

    `add` only stores references to device arrays. `flush` fetches them all at once and sums them on
    the host in float64, so a long window loses no digits. `state` and `restore` carry a window
    that is not flushed over to the run that goes on.
    """

    def __init__(self):
        self._steps: list[Mapping[str, Metric]] = []
        self._sums: dict[str, Metric] = {}

    def add(self, metrics: Mapping[str, Metric]) -> None:
        """Add the scalar metrics of one step; names may differ between steps."""
        self._steps.append(sharding.settle(metrics))
        beat()

    def flush(self) -> dict[str, float]:
        """Return the weighted mean of each metric since the last flush; nan if its weight is 0."""
        self._fetch()
        sums, self._sums = self._sums, {}
        return {name: metric.value for name, metric in sums.items()}

    def state(self) -> dict[str, list[float]]:
        """Return (total, weight) of each metric since the last flush, as JSON can hold it."""
        self._fetch()
        return {name: list(metric) for name, metric in self._sums.items()}

    def restore(self, state: Mapping[str, Sequence[float]]) -> None:
        """Go on from what `state` returned."""
        self._steps, self._sums = [], {name: Metric(*pair) for name, pair in state.items()}

    def _fetch(self) -> None:
        steps, self._steps = jax.device_get(self._steps), []
        for metrics in steps:
            for name, (total, weight) in metrics.items():
                one = Metric(float(total), float(weight))
                self._sums[name] = merge(self._sums[name], one) if name in self._sums else one


class MetricWriter:
    """Appends metrics to `folder/metrics.jsonl`, and gives them to trackers.

    Use it as a context manager. Only process 0 of a distributed run writes.

    Args:
      folder: a local folder or one on a bucket; it is made if it is not there.
      trackers: that get the same numbers, see `trackers.open_trackers`; they are closed with it.
      resume_step: lines after this step are removed first, so that a resumed run has every step
        once. None keeps all lines. Damaged lines, such as the last one of a killed process, are
        always removed.
      names: also write metrics under the names of these programs (`metric_names.PROGRAMS`).
    """

    def __init__(
        self,
        folder: str | os.PathLike,
        *,
        trackers: Sequence[Tracker] = (),
        resume_step: int | None = None,
        names: Collection[str] = (),
    ):
        self._names = names
        self._file, self._trackers = None, ()
        if jax.process_index() != 0:
            return
        folder = storage.as_path(folder)
        forget_later_steps(folder / FILE, resume_step)
        self._file = storage.LineWriter(folder / FILE)
        self._trackers = tuple(trackers)

    def __enter__(self) -> MetricWriter:
        return self

    def __exit__(self, kind, error, traceback) -> None:
        self.close()

    def write(self, step: int, values: Mapping[str, float], split: str = "train") -> None:
        """Append one line: `{"step", "split", "time", name: value, ...}`.

        `time` is in seconds since 1970. NaN and infinity become null, since JSON has neither. A
        local file has the line on return, a bucket's a few seconds later.

        Raises:
          ValueError: a metric is called `step`, `split` or `time`.
        """
        if self._file is None:
            return
        if clash := set(RESERVED) & set(values):
            raise ValueError(f"metrics of step {step}: the names {sorted(clash)} are taken")
        numbers = {name: float(value) for name, value in values.items()}
        numbers |= aliases(numbers, split, self._names)
        line = {"step": int(step), "split": split, "time": round(time.time(), 3)}
        line |= {name: x if math.isfinite(x) else None for name, x in numbers.items()}
        self._file.write(json.dumps(line, allow_nan=False))
        for tracker in self._trackers:
            tracker.write(int(step), split, numbers)

    def sync(self) -> None:
        """Make all lines survive a power failure.

        Raises:
          StorageError: the file was deleted meanwhile.
        """
        if self._file is not None:
            self._file.sync()

    def close(self) -> None:
        """Close the files; later writes do nothing."""
        for tracker in self._trackers:
            tracker.close()
        if self._file is not None:
            self._file.close()
        self._file, self._trackers = None, ()


def read_metrics(folder: str | os.PathLike, split: str | None = None) -> list[dict]:
    """Return the lines of `folder/metrics.jsonl` in order; null becomes nan.

    Damaged lines are left out, with a warning. If there is no file, the list is empty.

    Args:
      split: only lines of this split; None is all.
    """
    return [
        {name: math.nan if value is None else value for name, value in line.items()}
        for line in storage.read_records(storage.as_path(folder) / FILE)
        if _has_step(line) and split in (None, line.get("split"))
    ]


def forget_later_steps(path: storage.Path, last_step: int | None) -> None:
    """Remove the lines of a file after a step, and damaged ones; None removes only damaged ones.

    A run that is resumed at `last_step` writes the others again.
    """

    def keep(line: dict) -> bool:
        return last_step is None or (_has_step(line) and line["step"] <= last_step)

    storage.rewrite_records(path, keep)


def _has_step(line: dict) -> bool:
    return isinstance(line.get("step"), int)


def evaluation_line(step: int, total: int, values: Mapping[str, float]) -> str:
    """Return one printable line: `step  200/1000  eval loss 0.5312  accuracy ...`.

    It shows the metrics of `SHOWN` and no others. While the policy still is the reference, all
    margins are 0 and the accuracy means nothing, so it is not shown.
    """
    if values.get("rewards/margins") == 0:
        values = {name: value for name, value in values.items() if name != "rewards/accuracies"}
    parts = [f"step {step:>{len(str(total))}}/{total}"]
    parts += [
        template.format(value=values[name] * scale)
        for name, scale, template in SHOWN
        if name in values
    ]
    return "  ".join(parts)
