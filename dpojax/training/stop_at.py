"""Whether a metric of the evaluations has reached the value at which a training is to stop."""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Mapping
from typing import Any

from dpojax.training.keep_best import SPLIT, require_known

STOP_AT = "stop at"  # key of a checkpoint's metadata
CONDITION = re.compile(r"\s*(?P<metric>[^\s<>=]+)\s*(?P<sign>>=|<=)\s*(?P<value>[^\s<>=]+)\s*")
EXAMPLE = f"{SPLIT}samples/win_rate>=0.6"


@dataclasses.dataclass
class StopAt:
    """Follows a metric over the evaluations of a training until it reaches a value.

    Attributes:
      metric: its name in the evaluations.
      sign: 1 where the metric has to be at least `value`, -1 where at most.
      value: where training stops.
      at_start: the metric before the first step; it is told, and stops nothing.
      closest: of the later evaluations the one nearest to `value` or furthest beyond it; None
        before the first that gave a number.
      step: where that was.
      stopped_at: the step whose evaluation reached `value`; None while none has.
    """

    metric: str
    sign: int
    value: float
    at_start: float | None = None
    closest: float | None = None
    step: int | None = None
    stopped_at: int | None = None

    def add(self, step: int, values: Mapping[str, float]) -> bool:
        """Take an evaluation into account; return whether it reached the value.

        NaN reaches nothing. The evaluation before the first step only tells where training began.

        Raises:
          ValueError: the evaluation has no such metric; the message names those that it has.
        """
        require_known(self.metric, values)
        measured = float(values[self.metric])
        if not math.isfinite(measured):
            return False
        if step == 0:
            self.at_start = measured
            return False
        if self.closest is None or self.sign * measured > self.sign * self.closest:
            self.closest, self.step = measured, step
        if self.has_reached(measured):
            self.stopped_at = step
        return self.stopped_at == step

    def has_reached(self, measured: float) -> bool:
        return self.sign * measured >= self.sign * self.value

    @property
    def condition(self) -> str:
        """As the config has it: `eval/samples/win_rate >= 0.6`."""
        return f"{SPLIT}{self.metric} {'>=' if self.sign > 0 else '<='} {self.value:g}"

    def state(self) -> dict[str, Any]:
        """What a checkpoint keeps, as JSON has it."""
        names = ("at_start", "closest", "step", "stopped_at")
        return {name: getattr(self, name) for name in names}

    def restore(self, metadata: Mapping[str, Any]) -> None:
        """Take over what the checkpoint keeps from which training goes on."""
        for name, value in (metadata.get(STOP_AT) or {}).items():
            setattr(self, name, value)

    def describe(self, steps: int) -> str:
        """At which step training ended and why: for a person."""
        if self.stopped_at is not None:
            text = f"step {self.stopped_at} of {steps}, the first evaluation with {self.condition}"
            text += f": {self.closest:.4g}"
        elif self.closest is None:
            text = f"{self.condition} was never reached: no evaluation gave a number for it"
        else:
            extreme = "highest" if self.sign > 0 else "lowest"
            text = f"{self.condition} was never reached: the {extreme} was {self.closest:.4g}, at "
            text += f"step {self.step} of {steps}"
        if self.at_start is not None and self.has_reached(self.at_start):
            text += f" (before training it was {self.at_start:.4g}, which does not count)"
        return text


def parse(condition: str) -> StopAt | None:
    """Read a config's `stop_at`, METRIC>=VALUE or METRIC<=VALUE; None where it is empty.

    Raises:
      ValueError: it is nothing of the kind, or the value is not a finite number.
    """
    if not condition:
        return None
    parts = CONDITION.fullmatch(condition)
    metric = parts["metric"].removeprefix(SPLIT) if parts else ""
    try:
        value = float(parts["value"]) if parts else math.nan
    except ValueError:
        value = math.nan
    if not metric or not math.isfinite(value):
        raise ValueError(
            f"{condition!r}: name a metric and the value to stop at, such as '{EXAMPLE}' or "
            f"'{SPLIT}loss<=0.5' (in quotes on a command line)"
        )
    return StopAt(metric, 1 if parts["sign"] == ">=" else -1, value)
