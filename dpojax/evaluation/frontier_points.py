"""The points of a frontier run, one per checkpoint: their file, their names and their fronts.

>>> from dpojax.evaluation import frontier_points
>>> frontier_points.name("ppo_gt"), frontier_points.name("ipo")
('PPO-GT', 'ipo')
"""

from __future__ import annotations

import csv
import io
import math
import os
import re
from collections.abc import Iterable, Sequence
from typing import NamedTuple

import numpy as np

from dpojax import storage
from dpojax.evaluation.frontier import Points, best_of_n_kl_bound, pareto_front

BEST_OF_N, REFERENCE = "best_of_n", "sft"

# Names of the methods in figure and report, in the order in which they list them.
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
    """Measurements on the samples of one checkpoint of one run; nan where not measured."""

    method: str  # one of `NAMES`, or the name of a loss
    setting: str  # what the sweep varies, such as "beta=0.1"; "n=4" for best of n
    seed: int
    step: int
    kl: float  # KL(policy || reference) of whole sequences, nats
    kl_error: float  # standard errors over prompts, here and below
    reward: float
    reward_error: float
    length: float  # mean, in tokens
    distinct_2: float
    repetition: float
    stopped: float  # share of the responses that ended by EOS, in [0, 1]
    accuracy: float  # of the implicit reward on held-out pairs, in [0, 1]
    # Spearman's, between implicit and exact reward on held-out responses of the reference.
    rank_correlation: float = math.nan
    rank_correlation_error: float = math.nan


TYPES = {"method": str, "setting": str, "seed": int, "step": int}  # all others are floats


def write_points(path: str | os.PathLike, points: Iterable[Point]) -> None:
    """Write a CSV with a header, all or nothing. Floats read back exactly."""
    text = io.StringIO(newline="")
    text.write(",".join(Point._fields) + "\n")
    # Quotes every string: the default does not quote those with a lone carriage return.
    writer = csv.writer(text, quoting=csv.QUOTE_NONNUMERIC, lineterminator="\n")
    for point in points:
        row = zip(Point._fields, point)
        writer.writerow([TYPES.get(column, float)(value) for column, value in row])
    storage.write_text(path, text.getvalue())


def read_points(path: str | os.PathLike) -> list[Point]:
    """Read what `write_points` wrote: the same points, bit for bit, in the same order.

    Raises:
      ValueError: other columns, or a value that is no number. It names file, line and column.
    """
    points = []
    text = storage.as_path(path).read_bytes().decode()  # bytes keep carriage returns
    reader = csv.reader(io.StringIO(text, newline=""))
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
    """The name of a method in figure and report; a loss without one has its own name."""
    return NAMES.get(method, method)


def by_method(points: Iterable[Point]) -> dict[str, list[Point]]:
    """Group points by method: first those in `NAMES`, in that order, then others as they come."""
    groups: dict[str, list[Point]] = {}
    for point in points:
        groups.setdefault(point.method, []).append(point)
    order = [m for m in NAMES if m in groups] + [m for m in groups if m not in NAMES]
    return {method: groups[method] for method in order}


def without_base(points: Iterable[Point]) -> tuple[list[Point], Point]:
    """Separate the base, the one point of the reference, at KL 0, from the points of the methods.

    Raises:
      ValueError: there is no point whose method is `REFERENCE`, or more than one.
    """
    points = list(points)
    bases = [point for point in points if point.method == REFERENCE]
    if len(bases) != 1:
        raise ValueError(f"need one point of the reference, method {REFERENCE}, got {len(bases)}")
    return [point for point in points if point.method != REFERENCE], bases[0]


def is_finite(point: Point) -> bool:
    """Whether KL and reward are finite, so that the point can be drawn and compared."""
    return bool(np.isfinite([point.kl, point.reward]).all())


def front(points: Iterable[Point]) -> list[Point]:
    """The Pareto front of points with finite KL and reward, by rising KL: see `pareto_front`."""
    points = [point for point in points if is_finite(point)]
    index = pareto_front([point.kl for point in points], [point.reward for point in points])
    return [points[i] for i in index]


def arrays(points: Sequence[Point]) -> Points:
    """KLs, rewards and their errors as arrays [points]."""
    return Points(*(np.array([getattr(p, field) for p in points]) for field in Points._fields))


def at_the_bound(point: Point) -> Point:
    """Move a point of best-of-n to the upper bound of its KL, log n - (n - 1) / n nats.

    The `kl` of such a point is an estimate, which is lower if rewards tie. Points of other methods
    are returned unchanged.

    Raises:
      ValueError: the setting of a point of best-of-n is not like "n=4".
    """
    if point.method != BEST_OF_N:
        return point
    match = re.fullmatch(r"n=([1-9][0-9]*)", point.setting)
    if not match:
        raise ValueError(f'best_of_n: setting must be like "n=4", got {point.setting!r}')
    return point._replace(kl=float(best_of_n_kl_bound(int(match[1]))), kl_error=0.0)
