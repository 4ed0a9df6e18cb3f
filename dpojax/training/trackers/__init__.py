"""Programs that show metrics while a run trains: TensorBoard, Weights & Biases, Trackio.

metrics.jsonl has every number whatever `config.trackers` says; a tracker gets the same ones.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping, Sequence

import jax

from dpojax import display
from dpojax.training.trackers.tensorboard import open_tensorboard
from dpojax.training.trackers.tracker import TrackedRun, Tracker, TrackerKind
from dpojax.training.trackers.trackio import open_trackio
from dpojax.training.trackers.wandb import open_wandb

TENSORBOARD = "tensorboard"
KINDS: dict[str, TrackerKind] = {
    TENSORBOARD: TrackerKind(open_tensorboard, library="tensorboardX"),
    "wandb": TrackerKind(open_wandb, library="wandb"),
    "trackio": TrackerKind(open_trackio, library="trackio"),
}


def why_not(names: Sequence[str]) -> str:
    """Why these trackers cannot be opened; "" if they can."""
    for name in names:
        if name not in KINDS:
            return f"{name!r} is none of {', '.join(KINDS)}"
        if importlib.util.find_spec(KINDS[name].library) is None:
            return f"{name} is not installed: pip install {KINDS[name].library}"
    return ""


def open_trackers(names: Sequence[str], run: TrackedRun) -> list[Tracker]:
    """The trackers of a run's stage; none on all processes but the first.

    A tracker that fails is reported once and dropped, and the run goes on.
    """
    if jax.process_index() != 0:
        return []
    return [_Guarded(name, run) for name in names]


class _Guarded:
    """A tracker whose errors end no run: at the first one it is reported and dropped."""

    def __init__(self, name: str, run: TrackedRun):
        self._name, self._tracker = name, None
        try:
            self._tracker = KINDS[name].open(run)
        except Exception as error:
            self._drop(error)

    def write(self, step: int, split: str, values: Mapping[str, float]) -> None:
        if self._tracker is not None:
            try:
                self._tracker.write(step, split, values)
            except Exception as error:
                self._drop(error)

    def close(self) -> None:
        tracker, self._tracker = self._tracker, None
        if tracker is not None:
            try:
                tracker.close()
            except Exception as error:
                self._drop(error)

    def _drop(self, error: Exception) -> None:
        self._tracker = None
        text = " ".join(f"{type(error).__name__}: {error}".split())
        display.say(
            f"config.trackers: {self._name} has failed ({text}); the run goes on without it, and "
            "metrics.jsonl has all numbers"
        )


__all__ = ["KINDS", "TENSORBOARD", "TrackedRun", "Tracker", "open_trackers", "why_not"]
