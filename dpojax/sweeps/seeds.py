"""Members that differ in their seed alone: the mean of each metric, with a 95 % interval."""

from __future__ import annotations

import csv
import io
import json
import math
from collections.abc import Mapping, Sequence

from dpojax.intervals import Interval, mean_interval
from dpojax.sweeps.members import Changes, member_names
from dpojax.training.metrics import RESERVED

SEED = "seed"
ENDS = ("_low", "_high")  # of the interval of a metric
SPREAD_SUFFIXES = (*ENDS, "_error")  # NAME_low is no metric of its own where there is NAME
# Metrics between 0 and 1. With several data sources, the same of one source: SOURCE/NAME.
SHARES = (
    "rewards/accuracies",
    "logps/accuracies",
    "displacement",
    "mean_token_accuracy",
    "accuracy",
    "samples/stopped",
    "samples/distinct_1",
    "samples/distinct_2",
    "samples/repetition",
    "samples/win_rate",
    "samples/ties",
    "samples/unparsed",
    "policy/clipfrac_avg",
    "val/stopped",
    "updates/lost",
    "goodput/share",
)

Evaluations = Mapping[str, Mapping[str, float]]  # the kept evaluation of each finished member


class Setting:
    """What members have in common that differ in their seed alone.

    Attributes:
      name: as that of a member without a seed.
      changes: without the seed.
      members: their names by their seeds, in the order of the sweep.
    """

    def __init__(self, name: str, changes: Changes):
        self.name, self.changes = name, changes
        self.members: dict[int, str] = {}


def settings_of(members: Mapping[str, Changes], stage: str, seed: int) -> list[Setting]:
    """The settings of a sweep, in order; without seeds each member is one.

    A sweep that got --seeds later may have the same run twice, with its seed and without one. Only
    the first of them is in the setting, so that no seed counts twice.

    Args:
      stage: the last one, which names of members leave out.
      seed: of the config, which members without a seed have.
    """
    settings: dict[str, Setting] = {}
    for name, changes in members.items():
        shared = {key: value for key, value in changes.items() if key != SEED}
        key = json.dumps(shared, sort_keys=True, default=str)
        if key not in settings:
            settings[key] = Setting(member_names([shared], stage)[0], shared)
        settings[key].members.setdefault(changes.get(SEED, seed), name)
    return list(settings.values())


def interval_over_seeds(metric: str, values: Sequence[float]) -> Interval:
    """Student's 95 % interval of a metric's mean; that of a share stays between 0 and 1."""
    is_share = f"/{metric}".endswith(tuple(f"/{share}" for share in SHARES))
    return mean_interval(values, bounds=(0.0, 1.0) if is_share else (-math.inf, math.inf))


def mean_line(lines: Sequence[Mapping[str, float]]) -> dict[str, float]:
    """The mean of each metric that all lines have, and the ends of its interval.

    With one line the ends are nan.
    """
    shared = set.intersection(*(set(line) for line in lines)) - {"split", "time"}
    means: dict[str, float] = {}
    for metric in sorted(shared):
        base = next((metric[: -len(end)] for end in SPREAD_SUFFIXES if metric.endswith(end)), None)
        if base in shared:
            continue
        values = [float(line[metric]) for line in lines]
        means[metric] = math.fsum(values) / len(values)
        means |= zip((f"{metric}{end}" for end in ENDS), interval_over_seeds(metric, values))
    return means


def mean_lines(settings: Sequence[Setting], evaluations: Evaluations) -> dict[str, dict]:
    """`mean_line` of the members that are finished, by setting; those with none are left out."""
    lines = {}
    for setting in settings:
        names = setting.members.values()
        if finished := [evaluations[name] for name in names if name in evaluations]:
            lines[setting.name] = mean_line(finished)
    return lines


def seeds_csv(settings: Sequence[Setting], evaluations: Evaluations) -> str:
    """A line for each setting: its keys, how many seeds finished of how many, and all means."""
    means = mean_lines(settings, evaluations)
    keys = list(dict.fromkeys(key for setting in settings for key in setting.changes))
    metrics = sorted({metric for line in means.values() for metric in line} - set(RESERVED))
    metrics = [metric for metric in metrics if not metric.startswith("step_")]
    table = io.StringIO()
    out = csv.writer(table)
    out.writerow(["setting", *keys, "seeds_finished", "seeds", *metrics])
    for setting in settings:
        finished = sum(name in evaluations for name in setting.members.values())
        line = means.get(setting.name, {})
        changed = [setting.changes.get(key, "") for key in keys]
        values = [line.get(metric, math.nan) for metric in metrics]
        out.writerow([setting.name, *changed, finished, len(setting.members), *values])
    return table.getvalue()
