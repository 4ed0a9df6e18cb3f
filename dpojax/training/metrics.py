"""Metrics: weighted sums on devices, the files that hold them, and lines to print."""

from __future__ import annotations

import json
import math
import os
import sys
import time
from collections.abc import Mapping
from typing import NamedTuple

import jax
from jax.typing import ArrayLike
from tqdm import tqdm

from dpojax import storage

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
    the host in float64, so a long window loses no digits.
    """

    def __init__(self):
        self._steps: list[Mapping[str, Metric]] = []

    def add(self, metrics: Mapping[str, Metric]) -> None:
        """Add the scalar metrics of one step; names may differ between steps."""
        self._steps.append(metrics)

    def flush(self) -> dict[str, float]:
        """Return the weighted mean of each metric since the last flush; nan if its weight is 0."""
        steps, self._steps = jax.device_get(self._steps), []
        sums: dict[str, Metric] = {}
        for metrics in steps:
            for name, (total, weight) in metrics.items():
                one = Metric(float(total), float(weight))
                sums[name] = merge(sums[name], one) if name in sums else one
        return {name: metric.value for name, metric in sums.items()}


class MetricWriter:
    """Appends metrics to `folder/metrics.jsonl`, and event files for TensorBoard to a subfolder.

    Use it as a context manager. Only process 0 of a distributed run writes.

    Args:
      folder: a local folder or one on a bucket; it is made if it is not there.
      tensorboard: also write event files, to `folder/tensorboard`.
      resume_step: lines after this step are removed first, so that a resumed run has every step
        once. None keeps all lines. An incomplete last line, left by a killed process, is always
        removed.

    Raises:
      ValueError: a line of the existing file is not JSON; the message names file and line.
    """

    def __init__(
        self,
        folder: str | os.PathLike,
        *,
        tensorboard: bool = True,
        resume_step: int | None = None,
    ):
        self._file = self._events = None
        if jax.process_index() != 0:
            return
        folder = storage.as_path(folder)
        _remove_later_steps(folder / FILE, resume_step)
        self._file = storage.LineWriter(folder / FILE)
        if tensorboard:
            purge_step = None if resume_step is None else resume_step + 1
            self._events = _event_writer(folder / "tensorboard", purge_step)

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
        line = {"step": int(step), "split": split, "time": round(time.time(), 3)}
        line |= {name: x if math.isfinite(x) else None for name, x in numbers.items()}
        self._file.write(json.dumps(line, allow_nan=False))
        if self._events is not None:
            for name, number in numbers.items():
                self._events.add_scalar(f"{split}/{name}", number, int(step))

    def close(self) -> None:
        """Close the files; later writes do nothing."""
        for open_file in (self._file, self._events):
            if open_file is not None:
                open_file.close()
        self._file = self._events = None


def _event_writer(folder: storage.Path, purge_step: int | None):
    """Return a `SummaryWriter` of tensorboardX that writes to a local folder or to a bucket."""
    from tensorboardX import SummaryWriter, record_writer  # costs a second and a protobuf runtime

    for scheme in ("gs", "s3"):  # its own writers for buckets need packages that we do not
        record_writer.register_writer_factory(scheme, _BucketEvents)
    return SummaryWriter(str(folder), purge_step=purge_step)


class _BucketEvents:
    """An event file on a bucket, as tensorboardX opens one: each flush writes the whole object."""

    def __init__(self, path: str):
        self._path, self._content = path, bytearray()

    @classmethod
    def open(cls, path: str) -> _BucketEvents:
        return cls(path)

    @staticmethod
    def directory_check(path: str) -> None:
        """A bucket needs no folders."""

    def write(self, record: bytes) -> None:
        self._content += record

    def flush(self) -> None:
        storage.write_bytes(self._path, bytes(self._content))

    close = flush


def read_metrics(folder: str | os.PathLike, split: str | None = None) -> list[dict]:
    """Return the lines of `folder/metrics.jsonl` in order; null becomes nan.

    An incomplete last line is left out. If there is no file, the list is empty.

    Args:
      split: only lines of this split; None is all.

    Raises:
      ValueError: a line is not JSON; the message names file and line.
    """
    lines = [json.loads(text) for text in _checked_lines(storage.as_path(folder) / FILE)]
    return [
        {name: math.nan if value is None else value for name, value in line.items()}
        for line in lines
        if split is None or line["split"] == split
    ]


def progress(total: int, initial: int = 0, desc: str = "") -> tqdm:
    """Return a progress bar on stderr with steps per second and the time left.

    It is silent if stderr is not a terminal, and on all processes but the first. Show numbers
    beside it with `bar.set_postfix(loss=..., accuracy=..., refresh=False)`.
    """
    return tqdm(
        total=total,
        initial=initial,
        desc=desc,
        unit="step",
        file=sys.stderr,
        disable=jax.process_index() != 0 or not sys.stderr.isatty(),
        dynamic_ncols=True,
        bar_format="{desc} {percentage:3.0f}% |{bar:20}| {n}/{total} "
        "[{rate_fmt}, {remaining} left]{postfix}",
    )


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


def _checked_lines(path: storage.Path) -> list[str]:
    """Return the whole lines of a file, each of which is a JSON object."""
    lines = storage.read_lines(path)
    for number, text in enumerate(lines, start=1):
        try:
            valid = isinstance(json.loads(text), dict)
        except ValueError:
            valid = False
        if not valid:
            raise ValueError(f"{path}, line {number}: not a JSON object: {text[:80]!r}; remove it")
    return lines


def _remove_later_steps(path: storage.Path, last_step: int | None) -> None:
    """Rewrite the file without the lines after `last_step`; None only checks the lines."""
    _checked_lines(path)
    if last_step is not None:
        storage.rewrite_lines(path, lambda text: json.loads(text)["step"] <= last_step)
