"""The figure of win rates: over sampling temperature, over training steps, or policy by policy.

One panel per judge. Bars are 95 % intervals. The dashed line is a policy that is as good as its
opponent.
"""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from typing import NamedTuple

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patheffects import withStroke
from matplotlib.ticker import FixedLocator, MaxNLocator, NullLocator, PercentFormatter

from dpojax import storage
from dpojax.evaluation.judging.result import Result, Row
from dpojax.evaluation.plots import BLUE, GREEN, GREY, PURPLE, STYLE, TICKS, VERMILLION

# Okabe and Ito's colours as in `plots`. Marks differ too, so that no policy needs its colour.
COLORS = (BLUE, VERMILLION, GREEN, PURPLE, "#B07400", "#3A9BD0", "#333333", "#7A5C00")
MARKS = ("o", "s", "^", "D", "v", "p", "h", "X", "P")
PANEL, DPI = (4.6, 3.2), 200  # inches
COLUMNS = 2
LINE = 0.34  # inches that a policy takes where it has a line of its own
LETTERS, LETTER = 12, 0.085  # a name that a panel has room for; inches of each further letter
APART = 0.075  # least distance of two labels, as a share of the axes' height
DODGE = 0.012  # sideways distance of two policies' marks, as a share of the axis


class Series(NamedTuple):
    """A line of the figure: one policy at several settings.

    Attributes:
      x: temperatures or steps, [points], rising.
      rates: win rates with the ends of their intervals, [3, points], as shares.
    """

    name: str
    x: np.ndarray
    rates: np.ndarray


def draw(results: Sequence[Result], *paths: str | os.PathLike) -> None:
    """Write `figure` to each path (png, pdf or svg by its suffix), all or nothing.

    Args:
      paths: local files, or objects of a bucket; their folders are made.
    """
    drawn = figure(results)
    for path in map(storage.as_path, paths):
        dated = {"CreationDate": None} if path.suffix == ".pdf" else None
        with storage.replacing(path) as unfinished, matplotlib.rc_context(STYLE):
            drawn.savefig(unfinished, metadata=dated)


def figure(results: Sequence[Result]) -> Figure:
    """Draw a panel for each result that has rows.

    The horizontal axis is the training step where two rows differ in it, else the temperature where
    two rows differ in that. Otherwise each policy has a line of its own. Rows without a win rate,
    or without a step or temperature that the axis needs, are left out.
    """
    results = [result for result in results if result.rows]
    columns = min(COLUMNS, max(1, len(results)))
    lines = math.ceil(len(results) / columns)
    with matplotlib.rc_context(STYLE):
        drawn = Figure(dpi=DPI, layout="constrained")
        heights = []
        for index, result in enumerate(results):
            axes = drawn.add_subplot(lines, columns, index + 1)
            heights.append(_panel(axes, result))
            if len(results) > 1:
                axes.set_title(short_name(result.judge))
        width = PANEL[0] + LETTER * max(0, _longest_name(drawn) - LETTERS)
        drawn.set_size_inches(columns * width, lines * max(heights, default=PANEL[1]))
        drawn.get_layout_engine().set(w_pad=0.07, h_pad=0.06)
    return drawn


def _longest_name(drawn: Figure) -> int:
    """Letters of the longest name beside a panel."""
    names = [text.get_text() for axes in drawn.axes for text in axes.texts]
    names += [text.get_text() for axes in drawn.axes for text in axes.get_yticklabels()]
    return max(map(len, names), default=0)


def short_name(judge: str) -> str:
    """A judge's name for a figure: without the address and the path of a folder.

    >>> short_name("openai:org/model@http://localhost:8000/v1"), short_name("local:/models/judge")
    ('openai:model', 'local:judge')
    """
    kind, colon, rest = judge.split("@")[0].partition(":")
    return kind + colon + rest.rstrip("/").split("/")[-1]


def look_of(index: int) -> tuple[str, str]:
    """Colour and mark of a line."""
    return COLORS[index % len(COLORS)], MARKS[index % len(MARKS)]


def _panel(axes: Axes, result: Result) -> float:
    """Draw one result; return the height that the panel needs, in inches."""
    rows = [row for row in result.rows if math.isfinite(row.win_rate.value)]
    if len({row.step for row in rows} - {None}) > 1:
        _curves(axes, _series(rows, "step"))
        axes.set_xlabel("training step")
        axes.xaxis.set_major_locator(MaxNLocator(5, integer=True, steps=TICKS))
    elif len({row.temperature for row in rows} - {None}) > 1:
        series = _series(rows, "temperature")
        _curves(axes, series)
        axes.set_xlabel("sampling temperature")
        _temperature_ticks(axes, series)
    else:
        return _dots(axes, rows, result.opponent)
    axes.set_ylabel(f"win rate against {result.opponent}")
    axes.axhline(0.5, color=GREY, lw=1, ls=(0, (4, 3)), zorder=1.5)
    axes.yaxis.set_major_locator(MaxNLocator(6, steps=TICKS))
    axes.yaxis.set_major_formatter(PercentFormatter(1, decimals=0))
    return PANEL[1]


def _names(rows: Sequence[Row], leave_out: str) -> list[str]:
    """Labels without the setting on the axis, and without those that all rows share."""
    shared = {leave_out} | {
        setting
        for setting in ("temperature", "best_of", "step")
        if len({getattr(row, setting) for row in rows}) == 1
    }
    plain = {"temperature": None, "best_of": 1, "step": None}
    hidden = {setting: plain[setting] for setting in shared if setting in plain}
    return [row._replace(**hidden).label for row in rows]


def _series(rows: Sequence[Row], setting: str) -> list[Series]:
    """Lines over a setting, in order of first appearance; rows without the setting are left out."""
    points_of: dict[str, list[tuple[float, ...]]] = {}
    for name, row in zip(_names(rows, setting), rows):
        if getattr(row, setting) is not None:
            points = points_of.setdefault(name, [])
            points.append((getattr(row, setting), *row.win_rate[:3]))
    series = []
    for name, points in points_of.items():
        x, *rates = np.array(sorted(points), float).T
        series.append(Series(name, x, np.array(rates)))
    return series


def _curves(axes: Axes, series: Sequence[Series]) -> None:
    """Draw lines with bars, and their names beside their right ends."""
    width = max(np.ptp(np.concatenate([line.x for line in series])), 1e-9)
    for index, line in enumerate(series):
        color, mark = look_of(index)
        shift = DODGE * width * (index - (len(series) - 1) / 2)  # bars do not hide each other
        value, low, high = line.rates
        axes.errorbar(
            line.x + shift, value, (value - low, high - value), fmt=f"{mark}-", color=color, ms=5,
            mec="white", mew=0.6, lw=1.6, elinewidth=1, capsize=2, zorder=3,
        )  # fmt: skip
    axes.margins(x=0.03)
    low = min(0.5, *(line.rates[1].min() for line in series))
    high = max(0.5, *(line.rates[2].max() for line in series))
    room = 0.06 * (high - low)
    axes.set_ylim(max(-0.02, low - room), min(1.02, high + room))
    ends = [(line.rates[0][-1], line.name, look_of(i)[0]) for i, line in enumerate(series)]
    label_ends(axes, ends)


def label_ends(axes: Axes, ends: Sequence[tuple[float, str, str]]) -> None:
    """Write names at the right of the axes, moved apart where they would overlap.

    Args:
      ends: height in data units, name and colour of each line. The axes have their final limits.
    """
    bottom, top = axes.get_ylim()
    ends = sorted(ends)
    heights = [(height - bottom) / (top - bottom) for height, _, _ in ends]
    for height, (_, name, color) in zip(_spread(heights), ends):
        axes.text(
            1.02, height, name, transform=axes.transAxes, va="center", color=_dark(color),
            weight="bold",
        )  # fmt: skip


def _spread(heights: Sequence[float]) -> np.ndarray:
    """Rising heights, moved apart by at least `APART` and as little as that needs.

    Labels that would overlap become a block, which is centred on its members' heights.
    """
    blocks: list[list[float]] = []
    for height in heights:
        blocks.append([height])
        while len(blocks) > 1 and _ends(blocks[-2])[1] + APART > _ends(blocks[-1])[0]:
            last = blocks.pop()
            blocks[-1] += last
    return np.array([x for block in blocks for x in np.linspace(*_ends(block), len(block))])


def _ends(block: Sequence[float]) -> tuple[float, float]:
    """Where the lowest and the highest label of a block stand."""
    half = APART * (len(block) - 1) / 2
    return np.mean(block) - half, np.mean(block) + half


def _temperature_ticks(axes: Axes, series: Sequence[Series]) -> None:
    """Ticks at the temperatures themselves, as there are few."""
    places = sorted({x for line in series for x in line.x})
    if len(places) <= 9:
        axes.xaxis.set_major_locator(FixedLocator(places))
        axes.xaxis.set_minor_locator(NullLocator())
        axes.xaxis.set_major_formatter(lambda x, _: f"{x:g}")


def _dots(axes: Axes, rows: Sequence[Row], opponent: str) -> float:
    """Draw one line of the panel per row, the first at the top; return the panel's height."""
    for index, row in enumerate(rows):
        value, low, high = row.win_rate[:3]
        axes.errorbar(
            value, index, xerr=[[value - low], [high - value]], fmt="o", ms=5.5, mec="white",
            mew=0.6, color=BLUE, elinewidth=1.4, capsize=2.5, zorder=3,
        )  # fmt: skip
        text = axes.annotate(
            f"{100 * value:.1f} %", (value, index), (0, 5), textcoords="offset points",
            ha="center", va="bottom", fontsize=7.5,
        )  # fmt: skip
        text.set_path_effects([withStroke(linewidth=2, foreground="white")])
    axes.axvline(0.5, color=GREY, lw=1, ls=(0, (4, 3)), zorder=1.5)
    axes.set_yticks(range(len(rows)), _names(rows, ""))
    axes.set_ylim(len(rows) - 0.5, -0.75)
    axes.grid(visible=False, axis="y")
    axes.tick_params(axis="y", length=0)
    axes.margins(x=0.06)
    axes.xaxis.set_major_locator(MaxNLocator(6, steps=TICKS))
    axes.xaxis.set_major_formatter(PercentFormatter(1, decimals=0))
    axes.set_xlabel(f"win rate against {opponent}")
    return 0.8 + LINE * len(rows)


def _dark(color: str) -> np.ndarray:
    """The colour, dark enough for text on white."""
    return 0.8 * np.array(matplotlib.colors.to_rgb(color))
