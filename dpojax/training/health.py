"""A line at each evaluation that says in words how the training does, and what may be changed.

It is made of the held-out metrics alone, by these rules. It names the first state that holds:

    getting worse   the loss is `WORSE` times that of the first evaluation or more
    overfitting     the loss is `RISEN` times its lowest value or more, after it had fallen
    not learning    the accuracy is below `CHANCE`
    saturated       the accuracy is `CERTAIN` or more: the pairs tell the policy no more
    level           the loss is within `STILL` times the first one of the evaluation before
    learning        else

then what is seen, where it is:

    chosen falls with rejected   both log-probs are lower than at step 0
    chosen falls                 that of chosen alone is
    KL ... nats a token          the policy is `FAR` or further from its reference

then one or two things to change. At step 0 there is nothing to say. docs/training.md explains them.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple

WORSE = 1.02
RISEN = 1.03
CHANCE = 0.53
CERTAIN = 0.99
STILL = 0.002
FAR = 0.2  # nats a token: 20 nats for a response of 100 tokens
LOSS, ACCURACY, KL = "loss", "rewards/accuracies", "kl/per_token"
CHOSEN, REJECTED = "logps/chosen", "logps/rejected"

LOWER_RATE = "lower the rate"
RAISE_RATE = "raise the rate, or look at the data"
STOP_EARLIER = "stop earlier (keep_best), or take fewer epochs"
STAY_NEAR = "lower the rate or raise beta"


class Evaluation(NamedTuple):
    """Metrics of the held-out data after a step."""

    step: int
    values: Mapping[str, float]

    def get(self, name: str) -> float:
        """A metric; nan where it is not there."""
        return self.values.get(name, math.nan)


class Health:
    """Follows the evaluations of a stage.

    Args:
      earlier: lines of metrics.jsonl of the split eval, of a run that resumes.
    """

    def __init__(self, earlier: Iterable[Mapping[str, float]] = ()):
        self._evaluations = [Evaluation(int(line["step"]), line) for line in earlier]

    def add(self, step: int, values: Mapping[str, float]) -> str:
        """Add an evaluation, and return the line; "" where there is nothing to say."""
        before = [one for one in self._evaluations if one.step < step]
        self._evaluations = [*before, Evaluation(step, dict(values))]
        return describe(self._evaluations)


def describe(evaluations: Sequence[Evaluation]) -> str:
    """`learning; chosen falls with rejected, KL 0.40 nats a token: lower the rate or raise beta`.

    Args:
      evaluations: in order; the last one is described.
    """
    if len(evaluations) < 2 or not math.isfinite(evaluations[-1].get(LOSS)):
        return ""
    first, now = evaluations[0], evaluations[-1]
    state, change = _state(evaluations)
    seen = list(filter(None, (_likelihood(first, now), _distance(now))))
    changes = [change, STAY_NEAR if now.get(KL) >= FAR else ""]
    if state == "getting worse" and changes[1]:
        changes = changes[1:]  # it says to lower the rate, too
    advice = "; ".join(filter(None, changes))
    text = "; ".join(filter(None, [state, ", ".join(seen)]))
    return f"{text}: {advice}" if advice else text


def _state(evaluations: Sequence[Evaluation]) -> tuple[str, str]:
    """The state, and what to change."""
    first, before, now = evaluations[0], evaluations[-2], evaluations[-1]
    loss, accuracy = now.get(LOSS), now.get(ACCURACY)
    lowest = min(evaluations, key=lambda one: one.get(LOSS))
    if loss >= WORSE * first.get(LOSS) > 0:
        return "getting worse", LOWER_RATE
    if 0 < lowest.step < now.step and loss >= RISEN * lowest.get(LOSS) > 0:
        rise = f"loss {lowest.get(LOSS):.3f} at step {lowest.step}, {loss:.3f} now"
        return f"overfitting ({rise})", STOP_EARLIER
    if accuracy < CHANCE:
        return "not learning", RAISE_RATE
    if accuracy >= CERTAIN:
        return "saturated", ""
    if abs(loss - before.get(LOSS)) < STILL * abs(first.get(LOSS)):
        return "level", ""
    return "learning", ""


def _likelihood(first: Evaluation, now: Evaluation) -> str:
    """What became of the responses' log-probs since step 0, where the first evaluation was."""
    if first.step != 0 or not now.get(CHOSEN) < first.get(CHOSEN) or REJECTED not in now.values:
        return ""
    falls = now.get(REJECTED) < first.get(REJECTED)
    return "chosen falls with rejected" if falls else "chosen falls"


def _distance(now: Evaluation) -> str:
    kl = now.get(KL)
    return f"KL {kl:.2f} nats a token" if kl >= FAR else ""
