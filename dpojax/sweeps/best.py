"""Which member of a sweep is best by a metric, and how sure that is."""

from __future__ import annotations

import math
import shlex
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from dpojax import storage
from dpojax.config.command_line import UsageError
from dpojax.intervals import mean_interval
from dpojax.stages.registry import STAGES
from dpojax.sweeps.members import Changes
from dpojax.sweeps.seeds import Evaluations, Setting, interval_over_seeds
from dpojax.training import keep_best

FILE = "best.json"
# What a member's loss and rewards mean depends on the options of its loss: the loss of beta 0.1 and
# of beta 1 are different measures. These keys of a stage change nothing of that.
SAME_MEASURE = ("learning_rate", "warmup_steps", "warmup_ratio", "schedule", "decay_share")
SAME_MEASURE += ("min_learning_rate_ratio", "steps", "epochs", "batch_size", "optimizer.", "lora.")
SAME_MEASURE += ("keep_best", "patience", "stop_at")
LOSS_METRICS = ("loss", "rewards/margins", "rewards/chosen", "rewards/rejected")  # such measures


class Criterion(NamedTuple):
    """A metric of the evaluations, and whether it should be high (1) or low (-1)."""

    metric: str
    sign: int


class MeasuredSetting(NamedTuple):
    """A setting with the value of a metric for each of its seeds."""

    setting: Setting
    values: Mapping[int, float]

    @property
    def mean(self) -> float:
        return _mean(list(self.values.values()))


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
    if parsed.metric in LOSS_METRICS and varied:
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
    criterion: Criterion, settings: Sequence[Setting], evaluations: Evaluations
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
    measured = []
    for setting in settings:
        values = {
            seed: evaluations.get(name, {}).get(criterion.metric, math.nan)
            for seed, name in setting.members.items()
        }
        if all(map(math.isfinite, values.values())):
            measured.append(MeasuredSetting(setting, values))
    if not measured:
        return None
    ranked = sorted(measured, key=lambda one: -criterion.sign * one.mean)
    setting, values = ranked[0]
    interval = interval_over_seeds(criterion.metric, list(values.values()))
    best = {
        "metric": criterion.metric,
        "better": "high" if criterion.sign > 0 else "low",
        "setting": setting.name,
        "value": ranked[0].mean,
        "low": _finite(interval.low),
        "high": _finite(interval.high),
        "seeds": len(values),
        "members": list(setting.members.values()),
    }
    if len(ranked) > 1:
        best["next"] = _compared(criterion, *ranked[:2])
    return best


def _compared(
    criterion: Criterion, best: MeasuredSetting, other: MeasuredSetting
) -> dict[str, Any]:
    """How far the best is ahead of the next one; with an interval, paired by seed, of equal seeds.

    `paired_seeds` counts the pairs; 0: the two have other seeds.
    """
    low = high = math.nan
    pairs = 0
    if set(best.values) == set(other.values):
        gaps = [criterion.sign * (best.values[seed] - other.values[seed]) for seed in best.values]
        pairs, (low, high) = len(gaps), mean_interval(gaps)
    return {
        "setting": other.setting.name,
        "ahead": criterion.sign * (best.mean - other.mean),
        "low": _finite(low),
        "high": _finite(high),
        "paired_seeds": pairs,
    }


def describe_best(best: Mapping[str, Any], folder: storage.Path) -> str:
    """Lines for a person."""
    which = "highest" if best["better"] == "high" else "lowest"
    value = f"  {best['value']:.4g}"
    if best["low"] is not None:
        value += f" ({best['low']:.4g} to {best['high']:.4g} over {best['seeds']} seeds)"
    lines = [f"best by eval/{best['metric']} ({which}): {best['setting']}", value]
    second = best.get("next")
    if second and second["ahead"] == 0:
        lines.append(f"  level with {second['setting']}, which comes after it in the sweep")
    elif second:
        lines.append(f"  ahead of {second['setting']}")
        text = f"  by {second['ahead']:.3g}"
        if not second["paired_seeds"]:
            text += "; the two have different seeds, which does not say whether that is chance"
        elif second["low"] is None:
            text += "; from one seed each, which does not say whether that is chance"
        else:
            text += f" ({second['low']:.3g} to {second['high']:.3g})"
            text += "" if second["low"] > 0 else ": the seeds do not tell them apart"
        lines.append(text)
    workdir = shlex.quote(str(folder / best["members"][0]))
    lines.append(f"  dpojax export --workdir={workdir} --out=FOLDER")
    return "\n".join(lines)


def _mean(values: Sequence[float]) -> float:
    return math.fsum(values) / len(values)


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None
