"""Which evaluation of a training is its best, and when to stop waiting for a better one."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Collection, Mapping
from typing import Any

KEEP_BEST = "keep best"  # key of a checkpoint's metadata
SPLIT = "eval/"  # may stand before a metric's name, as TensorBoard shows it
# Parts of names that tell whether lower or higher is better.
LOWER = frozenset(("loss", "cross_entropy", "perplexity", "displacement"))
HIGHER = frozenset(("accuracy", "accuracies", "margins", "reward", "rank_correlation", "win_rate"))


@dataclasses.dataclass
class KeepBest:
    """Follows a metric over the evaluations of a training.

    Attributes:
      metric: its name in the evaluations.
      sign: 1 where higher is better, -1 where lower is.
      patience: evaluations without a better one after which training stops; 0: never.
      score: the best value times `sign`; -inf before the first.
      step: where it was found; None before the first.
      waited: evaluations since then.
      at_start: the value before the first step; it is told, and never kept.
      stopped_at: the step after which training stopped early; None while it has not.
    """

    metric: str
    sign: int
    patience: int = 0
    score: float = -math.inf
    step: int | None = None
    waited: int = 0
    at_start: float | None = None
    stopped_at: int | None = None

    def add(self, step: int, values: Mapping[str, float]) -> bool:
        """Take an evaluation into account; return whether it is the best so far.

        Of equal values the first is the best. NaN and infinity are never better. The evaluation
        before the first step only tells where training began.

        Raises:
          ValueError: the evaluation has no such metric; the message names those that it has.
        """
        require_known(self.metric, values)
        value = values[self.metric]
        if step == 0:
            self.at_start = _finite(value)
            return False
        score = self.sign * value
        if math.isfinite(score) and score > self.score:
            self.score, self.step, self.waited = score, step, 0
            return True
        self.waited += 1
        if self.patience and self.waited >= self.patience:
            self.stopped_at = step
        return False

    def state(self) -> dict[str, Any]:
        """What a checkpoint keeps, as JSON has it."""
        names = ("score", "step", "waited", "at_start", "stopped_at")
        return {name: getattr(self, name) for name in names} | {"score": _finite(self.score)}

    def restore(self, metadata: Mapping[str, Any]) -> None:
        """Take over what the checkpoint keeps from which training goes on."""
        state = metadata.get(KEEP_BEST)
        if state is not None:
            for name, value in state.items():
                setattr(self, name, value)
            self.score = -math.inf if state["score"] is None else state["score"]

    def describe(self, steps: int) -> str:
        """Which step is kept and why, and why training stopped: for a person."""
        extreme = "highest" if self.sign > 0 else "lowest"
        if self.step is None:
            text = f"no evaluation gave a number for {SPLIT}{self.metric}: the last step is kept"
        else:
            value = self.sign * self.score
            where = f"where {SPLIT}{self.metric} was {extreme}"
            text = f"step {self.step} of {steps}, {where}: {value:.4g}"
            if self.at_start is not None and self.sign * self.at_start >= self.score:
                text += f" (before training it was {self.at_start:.4g}, no worse)"
        if self.stopped_at is not None and self.stopped_at < steps:
            text += (
                f"; stopped at step {self.stopped_at} after {self.waited} evaluation(s) without a "
                "better one"
            )
        return text


def parse(name: str, patience: int) -> KeepBest | None:
    """Read a config's `keep_best`; None where it is empty.

    Raises:
      ValueError: it does not tell whether higher or lower is better, or nothing can be waited for.
    """
    if not name:
        if patience:
            raise ValueError(f"it is empty, but patience = {patience}: name the metric to wait for")
        return None
    sign = {"-": -1, "+": 1}.get(name[0], 0)
    metric = name.lstrip("+-").removeprefix(SPLIT)
    parts = set(metric.split("/"))
    sign = sign or (-1 if parts & LOWER else 1 if parts & HIGHER else 0)
    if not sign:
        raise ValueError(
            f"{name!r}: say whether it should be high ({'+' + name!r}) or low ({'-' + name!r})"
        )
    return KeepBest(metric, sign, patience)


def require_known(metric: str, names: Collection[str]) -> None:
    """Raise ValueError unless an evaluation has the metric; it names those that it has."""
    if metric not in names:
        known = ", ".join(SPLIT + name for name in sorted(names))
        raise ValueError(f"evaluations have no {SPLIT}{metric}; they have {known}")


def _finite(value: float) -> float | None:
    """The value, or None for what JSON cannot hold."""
    return float(value) if math.isfinite(value) else None
