"""Metrics as sums and weights, the files that they go to, and the lines that a person reads."""

from __future__ import annotations

import json
import math
import os
import pathlib
import sys
import time
from collections.abc import Mapping
from typing import NamedTuple

import jax
from jax.typing import ArrayLike
from tqdm import tqdm

FILE = "metrics.jsonl"
RESERVED = ("step", "split", "time")


class Metric(NamedTuple):
    """A weighted sum and its weight, any equal shapes: what a device function returns.

    Parts of a batch are put together with `merge`, and only the line that logs divides. Padded
    examples have weight 0, so a metric does not depend on batch size or device count.
    """

    total: ArrayLike
    weight: ArrayLike

    @property
    def value(self) -> ArrayLike:
        """total / weight; nan on the host where nothing was counted."""
        if isinstance(self.weight, jax.core.Tracer):
            raise TypeError("Metric.value divides on the host; return the Metric from jit instead")
        total, weight = jax.device_get((self.total, self.weight))
        return float(total) / float(weight) if weight else math.nan


def merge(a: Metric, b: Metric) -> Metric:
    """The metric of both parts together."""
    return Metric(a.total + b.total, a.weight + b.weight)


class Window:
    """Metrics of the steps since the last `flush`, without waiting for a device.

    `add` only keeps references to the device arrays; `flush` fetches them once and sums them on
    the host in float64, so that a long window loses no digits.
    """

    def __init__(self):
        self._steps: list[Mapping[str, Metric]] = []

    def add(self, metrics: Mapping[str, Metric]) -> None:
        """Adds the scalar metrics of one step; names may differ between steps."""
        self._steps.append(metrics)

    def flush(self) -> dict[str, float]:
        """The weighted mean of every metric since the last flush, nan where nothing was counted."""
        steps, self._steps = jax.device_get(self._steps), []
        sums: dict[str, Metric] = {}
        for metrics in steps:
            for name, (total, weight) in metrics.items():
                one = Metric(float(total), float(weight))
                sums[name] = merge(sums[name], one) if name in sums else one
        return {name: metric.value for name, metric in sums.items()}


class MetricWriter:
    """Appends metrics to `folder/metrics.jsonl` and, for TensorBoard, to `folder/tensorboard`.

    A context manager. Only process 0 of a distributed run writes; the others do nothing.

    Args:
      folder: made if it is not there.
      tensorboard: also write event files.
      resume_step: lines after this step are removed before anything is written, so that a resumed
        run has every step once; None keeps all lines. A last line that a killed process left
        without its end is removed in any case.
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
        folder = pathlib.Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        _truncate(folder / FILE, resume_step)
        self._file = (folder / FILE).open("a", encoding="utf-8")
        if tensorboard:
            from tensorboardX import SummaryWriter  # costs a second and a protobuf runtime

            purge = None if resume_step is None else resume_step + 1
            self._events = SummaryWriter(str(folder / "tensorboard"), purge_step=purge)

    def __enter__(self) -> MetricWriter:
        return self

    def __exit__(self, kind, error, traceback) -> None:
        self.close()

    def write(self, step: int, values: Mapping[str, float], split: str = "train") -> None:
        """Appends one line, complete on return: `{"step", "split", "time", name: value, ...}`.

        `time` is in seconds since 1970. NaN and infinity become null, since JSON has neither.

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
        self._file.write(json.dumps(line, allow_nan=False) + "\n")
        self._file.flush()
        if self._events is not None:
            for name, number in numbers.items():
                self._events.add_scalar(f"{split}/{name}", number, int(step))

    def close(self) -> None:
        """Closes the files; writing afterwards does nothing."""
        for open_file in (self._file, self._events):
            if open_file is not None:
                open_file.close()
        self._file = self._events = None


def read_metrics(folder: str | os.PathLike, split: str | None = None) -> list[dict]:
    """The lines of `folder/metrics.jsonl` in order, of one split or of all; null becomes nan.

    A torn last line is left out; no file is an empty list.

    Raises:
      ValueError: another line is not JSON; the message names file and line.
    """
    path = pathlib.Path(folder) / FILE
    lines = [json.loads(text) for text in _whole_lines(path)]
    return [
        {name: math.nan if value is None else value for name, value in line.items()}
        for line in lines
        if split is None or line["split"] == split
    ]


def progress(total: int, initial: int = 0, desc: str = "") -> tqdm:
    """A bar on stderr with steps per second and time left; silent where stderr is no
    terminal and on all processes but the first.

    Numbers go beside it with `bar.set_postfix(loss=..., accuracy=..., refresh=False)`.
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
    """One line about an evaluation for a person: `step  200/1000  eval loss 0.5312  accuracy ...`.

    Shows of `values` the metrics that it knows by TRL's names, and passes over the others; no
    accuracy while the policy is the reference, where all margins are 0.
    """
    known = {
        "loss": lambda x: f"eval loss {x:.4f}",
        "rewards/accuracies": lambda x: f"accuracy {100 * x:.1f} %",
        "accuracy": lambda x: f"accuracy {100 * x:.1f} %",
        "rewards/margins": lambda x: f"margin {x:+.2f}",
        "displacement": lambda x: f"displaced {100 * x:.0f} %",
        "kl/per_token": lambda x: f"kl {x:.3f} nats/token",
    }
    if values.get("rewards/margins") == 0:
        values = {name: value for name, value in values.items() if name != "rewards/accuracies"}
    parts = [f"step {step:>{len(str(total))}}/{total}"]
    parts += [show(values[name]) for name, show in known.items() if name in values]
    return "  ".join(parts)


def _whole_lines(path: pathlib.Path) -> list[str]:
    """The lines that have their end and are JSON objects, a torn last one left out."""
    if not path.is_file():
        return []
    lines = path.read_text(encoding="utf-8", errors="replace").split("\n")
    for number, text in enumerate(lines[:-1], start=1):
        try:
            valid = isinstance(json.loads(text), dict)
        except ValueError:
            valid = False
        if not valid:
            raise ValueError(f"{path}, line {number}: not a JSON object: {text[:80]!r}; remove it")
    return lines[:-1]


def _truncate(path: pathlib.Path, last_step: int | None) -> None:
    """Rewrites the file, all or nothing, without a torn last line and steps after `last_step`."""
    if not path.is_file():
        return
    kept = [
        text
        for text in _whole_lines(path)
        if last_step is None or json.loads(text)["step"] <= last_step
    ]
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_text("".join(text + "\n" for text in kept), encoding="utf-8")
    temporary.replace(path)
