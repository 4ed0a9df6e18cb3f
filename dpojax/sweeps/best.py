"""Which member of a sweep is best by a metric, and how sure that is."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from dpojax import storage
from dpojax.config.command_line import UsageError
from dpojax.intervals import mean_interval
from dpojax.stages.registry import STAGES
from dpojax.sweeps.members import Changes
from dpojax.sweeps.seeds import Evaluations, Setting, settings_of
from dpojax.training import keep_best

FILE = "best.json"
# What a member's loss and rewards mean depends on the options of its loss: the loss of beta 0.1 and
# of beta 1 are different measures. These keys of a stage change nothing of that.
SAME_MEASURE = ("learning_rate", "warmup_steps", "warmup_ratio", "schedule", "decay_share")
SAME_MEASURE += ("min_learning_rate_ratio", "steps", "epochs", "batch_size", "optimizer.", "lora.")
SAME_MEASURE += ("keep_best", "patience", "stop_at")
OF_THE_LOSS = ("loss", "rewards/margins", "rewards/chosen", "rewards/rejected")  # such measures


class Criterion(NamedTuple):
    """A metric of the evaluations, and whether it should be high (1) or low (-1)."""

    metric: str
    sign: int


def parse_best(name: str, stage: str, members: Sequence[Changes]) -> Criterion | None:
    """What --best means; None where it is empty.

    Args:
      name: as `keep_best` takes it: "eval/rewards/accuracies", "-kl/per_token".
      stage: the last one of the members.
      members: their changes.

    Raises:
      UsageError: it does not say whether high or low is better, or members whose losses have other
        options cannot be compared by it.
    """
    if not name:
        return None
    try:
        parsed = keep_best.parse(name, 0)
    except ValueError as error:
        raise UsageError(f"--best: {error}") from error
    varied = measure_keys(members, stage)
    if parsed.metric in OF_THE_LOSS and varied:
        raise UsageError(
            f"--best={name}: members differ in {', '.join(varied)}, so that {parsed.metric} is "
            "another measure in each of them; take one that means the same, such as "
            "eval/rewards/accuracies or eval/samples/win_rate"
        )
    return Criterion(parsed.metric, parsed.sign)


def measure_keys(members: Sequence[Changes], stage: str) -> list[str]:
    """The keys in which members differ and that make their losses different measures."""
    keys = {key for changes in members for key in changes if changes_measure(key, stage)}
    return [key for key in sorted(keys) if _varies(key, members)]


def changes_measure(key: str, stage: str) -> bool:
    """Whether runs of a stage that differ in a key have losses that cannot be compared."""
    group, _, option = key.partition(".")
    return group in STAGES and group == stage and not option.startswith(SAME_MEASURE)


def _varies(key: str, members: Sequence[Changes]) -> bool:
    return len({repr(changes.get(key)) for changes in members}) > 1


def choose_best(
    criterion: Criterion, members: Mapping[str, Changes], stage: str, evaluations: Evaluations
) -> dict[str, Any] | None:
    """The setting with the best mean over its seeds, as best.json holds it; None if there is none.

    A setting of which a seed failed, or has no finite value, is not chosen.

    Raises:
      UsageError: no evaluation has such a metric; the message names those that there are.
    """
    known = {metric for line in evaluations.values() for metric in line}
    if evaluations and criterion.metric not in known:
        try:
            keep_best.require_known(criterion.metric, known - {"step", "split", "time"})
        except ValueError as error:
            raise UsageError(f"--best: {error}") from error
    values = {}
    for setting in settings_of(members, stage):
        of_seeds = [
            evaluations.get(name, {}).get(criterion.metric, math.nan) for name in setting.members
        ]
        if all(map(math.isfinite, of_seeds)):
            values[setting.name] = setting, of_seeds
    if not values:
        return None
    ranked = sorted(values, key=lambda name: -criterion.sign * _mean(values[name][1]))
    setting, of_seeds = values[ranked[0]]
    interval = mean_interval(of_seeds)
    best = {
        "metric": criterion.metric,
        "better": "high" if criterion.sign > 0 else "low",
        "setting": setting.name,
        "value": _mean(of_seeds),
        "low": _finite(interval.low),
        "high": _finite(interval.high),
        "seeds": len(of_seeds),
        "members": setting.members,
    }
    if len(ranked) > 1:
        best["next"] = _compared(criterion, setting, of_seeds, *values[ranked[1]])
    return best


def _compared(
    criterion: Criterion,
    best: Setting,
    of_best: Sequence[float],
    other: Setting,
    of_other: Sequence[float],
) -> dict[str, Any]:
    """How far the best is ahead of the next one; paired by seed, where both have the same seeds."""
    if len(of_best) == len(of_other) and len(best.members) == len(other.members):
        gaps = [criterion.sign * (a - b) for a, b in zip(of_best, of_other)]
        ahead, interval = _mean(gaps), mean_interval(gaps)
    else:
        ahead = criterion.sign * (_mean(of_best) - _mean(of_other))
        interval = mean_interval([ahead])
    return {
        "setting": other.name,
        "ahead": ahead,
        "low": _finite(interval.low),
        "high": _finite(interval.high),
    }


def describe_best(best: Mapping[str, Any], folder: storage.Path) -> str:
    """Lines for a person."""
    which = "highest" if best["better"] == "high" else "lowest"
    value = f"  {best['value']:.4g}"
    if best["low"] is not None:
        value += f" ({best['low']:.4g} to {best['high']:.4g} over {best['seeds']} seeds)"
    lines = [f"best by eval/{best['metric']} ({which}): {best['setting']}", value]
    if second := best.get("next"):
        text = f"  ahead of {second['setting']}"
        lines.append(text)
        text = f"  by {second['ahead']:.3g}"
        if second["low"] is None:
            text += "; from one seed each, which does not say whether that is chance"
        else:
            text += f" ({second['low']:.3g} to {second['high']:.3g})"
            text += "" if second["low"] > 0 else ": the seeds do not tell them apart"
        lines.append(text)
    lines.append(f"  dpojax export --workdir={folder / best['members'][0]} --out=FOLDER")
    return "\n".join(lines)


def _mean(values: Sequence[float]) -> float:
    return math.fsum(values) / len(values)


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None
