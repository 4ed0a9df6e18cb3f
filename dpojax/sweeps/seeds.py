"""Members that differ in their seed alone: the mean of each metric, with a 95 % interval."""

from __future__ import annotations

import csv
import io
import json
import math
from collections.abc import Mapping, Sequence

from dpojax.intervals import mean_interval
from dpojax.sweeps.members import Changes, member_names
from dpojax.training.metrics import RESERVED

SEED = "seed"
ENDS = ("_low", "_high")  # of the interval of a metric
OF_OTHERS = (*ENDS, "_error")  # how the names of metrics end that belong to another metric

Evaluations = Mapping[str, Mapping[str, float]]  # the kept evaluation of each finished member


class Setting:
    """What members have in common that differ in their seed alone.

    Attributes:
      name: as that of a member without a seed.
      changes: without the seed.
      members: names, in the order of the sweep.
    """

    def __init__(self, name: str, changes: Changes):
        self.name, self.changes = name, changes
        self.members: list[str] = []


def settings_of(members: Mapping[str, Changes], stage: str) -> list[Setting]:
    """The settings of a sweep, in order; without seeds each member is one.

    Args:
      stage: the last one, which names of members leave out.
    """
    settings: dict[str, Setting] = {}
    for name, changes in members.items():
        shared = {key: value for key, value in changes.items() if key != SEED}
        key = json.dumps(shared, sort_keys=True, default=str)
        if key not in settings:
            settings[key] = Setting(member_names([shared], stage)[0], shared)
        settings[key].members.append(name)
    return list(settings.values())


def mean_line(lines: Sequence[Mapping[str, float]]) -> dict[str, float]:
    """The mean of each metric that all lines have, and the ends of its interval.

    With one line the ends are nan.
    """
    shared = set.intersection(*(set(line) for line in lines)) - {"split", "time"}
    means: dict[str, float] = {}
    for metric in sorted(shared):
        base = next((metric[: -len(end)] for end in OF_OTHERS if metric.endswith(end)), None)
        if base in shared:
            continue
        values = [float(line[metric]) for line in lines]
        means[metric] = math.fsum(values) / len(values)
        means |= zip((f"{metric}{end}" for end in ENDS), mean_interval(values))
    return means


def mean_lines(settings: Sequence[Setting], evaluations: Evaluations) -> dict[str, dict]:
    """`mean_line` of the members that are finished, by setting; those with none are left out."""
    lines = {}
    for setting in settings:
        if finished := [evaluations[name] for name in setting.members if name in evaluations]:
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
        finished = sum(name in evaluations for name in setting.members)
        line = means.get(setting.name, {})
        changed = [setting.changes.get(key, "") for key in keys]
        values = [line.get(metric, math.nan) for metric in metrics]
        out.writerow([setting.name, *changed, finished, len(setting.members), *values])
    return table.getvalue()
