"""The points of a frontier run, one per checkpoint: their file, their names and their hulls.

>>> from dpojax.evaluation import frontier_points
>>> frontier_points.name("ppo_gt"), frontier_points.name("ipo")
('PPO-GT', 'ipo')
"""

from __future__ import annotations

import csv
import io
import math
import os
import pathlib
import re
from collections.abc import Iterable, Sequence
from typing import NamedTuple

import numpy as np

from dpojax.evaluation.frontier import Points, best_of_n_kl_bound, pareto_hull

BEST_OF_N, REFERENCE = "best_of_n", "sft"

# How figure and report call the methods, in the order in which they list them.
NAMES = {
    "dpo": "DPO",
    "online_dpo": "Online DPO",
    "ppo": "PPO (learned reward)",
    "ppo_gt": "PPO-GT",
    BEST_OF_N: "Best of n",
    "unlikelihood": "Unlikelihood",
    "preferred_ft": "Preferred-FT",
    REFERENCE: "SFT (reference)",
}


class Point(NamedTuple):
    """What the samples of one checkpoint of one run are like; nan where it was not measured."""

    method: str  # one of `NAMES`, or the name of a loss
    setting: str  # what the sweep varies, as "beta=0.1"; "n=4" for best of n
    seed: int
    step: int
    kl: float  # of whole sequences from the reference, nats
    kl_error: float  # standard errors over prompts, here and below
    reward: float
    reward_error: float
    length: float  # mean, in tokens
    distinct_2: float
    repetition: float
    stopped: float  # share of the responses that ended by EOS, in [0, 1]
    accuracy: float  # of the implicit reward on held-out pairs, in [0, 1]
    # Spearman's, of the implicit and the exact reward on held-out responses of the reference.
    rank_correlation: float = math.nan
    rank_correlation_error: float = math.nan


TYPES = {"method": str, "setting": str, "seed": int, "step": int}  # all others are floats


def write_points(path: str | os.PathLike, points: Iterable[Point]) -> None:
    """Writes a CSV with a header, all or nothing; a float is written so that it reads back exactly.

    Args:
      path: its folder must exist.
    """
    text = io.StringIO(newline="")
    text.write(",".join(Point._fields) + "\n")
    # Quotes every string, as the default forgets those with a lone carriage return.
    writer = csv.writer(text, quoting=csv.QUOTE_NONNUMERIC, lineterminator="\n")
    for point in points:
        row = zip(Point._fields, point)
        writer.writerow([TYPES.get(column, float)(value) for column, value in row])
    path = pathlib.Path(path)
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_text(text.getvalue(), encoding="utf-8", newline="")
    temporary.replace(path)


def read_points(path: str | os.PathLike) -> list[Point]:
    """The points of `write_points`, equal to the last bit and in their order.

    Raises:
      ValueError: other columns, or a value that is no number, with file, line and column.
    """
    points = []
    with open(path, encoding="utf-8", newline="") as file:
        reader = csv.reader(file)
        header = next(reader, [])
        if tuple(header) != Point._fields:
            raise ValueError(f"{path}: columns must be {','.join(Point._fields)}, got {header}")
        for row in reader:
            points.append(_parse(row, f"{path}, line {reader.line_num}"))
    return points


def _parse(row: Sequence[str], where: str) -> Point:
    if len(row) != len(Point._fields):
        raise ValueError(f"{where}: {len(row)} columns instead of {len(Point._fields)}")
    values = []
    for column, text in zip(Point._fields, row):
        kind = TYPES.get(column, float)
        try:
            values.append(kind(text))
        except ValueError:
            raise ValueError(f"{where}: {column} must be {kind.__name__}, got {text!r}") from None
    return Point(*values)


def name(method: str) -> str:
    """How figure and report call a method: a loss goes by its own name."""
    return NAMES.get(method, method)


def by_method(points: Iterable[Point]) -> dict[str, list[Point]]:
    """The points of each method, in the order of `NAMES` and then as they came."""
    points = list(points)
    found = dict.fromkeys(point.method for point in points)
    order = [m for m in NAMES if m in found] + [m for m in found if m not in NAMES]
    return {method: [p for p in points if p.method == method] for method in order}


def without_base(points: Iterable[Point]) -> tuple[list[Point], Point]:
    """The points of the methods, and the one whose method is `REFERENCE`: the base, at KL 0.

    Raises:
      ValueError: there is no such point, or more than one.
    """
    points = list(points)
    found = [point for point in points if point.method == REFERENCE]
    if len(found) != 1:
        raise ValueError(f"need one point of the reference, method {REFERENCE}, got {len(found)}")
    return [point for point in points if point.method != REFERENCE], found[0]


def is_finite(point: Point) -> bool:
    """Whether KL and reward are numbers, so that it can be drawn and compared."""
    return bool(np.isfinite([point.kl, point.reward]).all())


def hull(points: Iterable[Point]) -> list[Point]:
    """The Pareto hull of points with finite KL and reward, by rising KL: see `pareto_hull`."""
    points = [point for point in points if is_finite(point)]
    index = pareto_hull([point.kl for point in points], [point.reward for point in points])
    return [points[i] for i in index]


def arrays(points: Sequence[Point]) -> Points:
    """KLs, rewards and their errors as arrays [points]."""
    return Points(*(np.array([getattr(p, field) for p in points]) for field in Points._fields))


def at_the_bound(point: Point) -> Point:
    """A point of best-of-n at log n - (n - 1) / n nats, which its KL cannot exceed.

    Its own `kl` is an estimate, lower where rewards tie. Any other point stays as it is.

    Raises:
      ValueError: the setting of a point of best-of-n is not like "n=4".
    """
    if point.method != BEST_OF_N:
        return point
    found = re.fullmatch(r"n=([1-9][0-9]*)", point.setting)
    if not found:
        raise ValueError(f'best_of_n: setting must be like "n=4", got {point.setting!r}')
    return point._replace(kl=float(best_of_n_kl_bound(int(found[1]))), kl_error=0.0)
