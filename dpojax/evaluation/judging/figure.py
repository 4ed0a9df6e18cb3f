"""The figure of win rates: over sampling temperature, or policy by policy.

One panel per judge. Bars are 95 % intervals. The dashed line is a policy that is as good as its
opponent.
"""

from __future__ import annotations

import math
import os
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patheffects import withStroke
from matplotlib.ticker import FixedLocator, MaxNLocator, NullLocator, PercentFormatter

from dpojax.evaluation import plots
from dpojax.evaluation.judging.bootstrap import Measured
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
    """A line of a figure: one policy at several settings.

    Attributes:
      x: settings, such as temperatures, [points], rising.
      rates: shares with the ends of their intervals, [3, points].
    """

    name: str
    x: np.ndarray
    rates: np.ndarray


def draw(results: Sequence[Result], *paths: str | os.PathLike) -> None:
    """Write `figure` to each path, see `plots.save`."""
    plots.save(figure(results), *paths)


def figure(results: Sequence[Result]) -> Figure:
    """Draw a panel for each result that has rows.

    The horizontal axis is the temperature where two rows differ in it; rows without one are left
    out then. Otherwise each policy has a line of its own. Rows without a win rate are left out.
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
    if len({row.temperature for row in rows} - {None}) < 2:
        return _dots(axes, rows, result.opponent)
    series = _over_temperature(rows)
    draw_curves(axes, series)
    axes.set_xlabel("sampling temperature")
    axes.set_ylabel(f"win rate against {result.opponent}")
    _temperature_ticks(axes, series)
    return PANEL[1]


def _names(rows: Sequence[Row], *, with_temperature: bool) -> list[str]:
    """Labels without the settings that all rows share."""
    hidden: dict[str, int | None] = {}
    if not with_temperature or len({row.temperature for row in rows}) == 1:
        hidden["temperature"] = None
    if len({row.best_of for row in rows}) == 1:
        hidden["best_of"] = 1
    return [row._replace(**hidden).label for row in rows]


def _over_temperature(rows: Sequence[Row]) -> list[Series]:
    """Lines over temperature, in order of first appearance; rows without one are left out."""
    points_of: dict[str, list[tuple[float, ...]]] = {}
    for name, row in zip(_names(rows, with_temperature=False), rows):
        if row.temperature is not None:
            points_of.setdefault(name, []).append((row.temperature, *row.win_rate[:3]))
    return series_of(points_of)


def series_of(points_of: Mapping[str, Sequence[tuple[float, ...]]]) -> list[Series]:
    """Lines from their points (x, share, low, high), in any order; one without a point is none."""
    series = []
    for name, points in points_of.items():
        if not points:
            continue
        x, *rates = np.array(sorted(points), float).T
        series.append(Series(name, x, np.array(rates)))
    return series


def draw_curves(axes: Axes, series: Sequence[Series]) -> None:
    """Draw lines of shares with bars, and their names beside their right ends."""
    every_x = [x for line in series for x in line.x]
    width = max(every_x, default=0) - min(every_x, default=0)
    for index, line in enumerate(series):
        color, mark = look_of(index)
        shift = DODGE * width * (index - (len(series) - 1) / 2)  # bars do not hide each other
        value, low, high = line.rates
        axes.errorbar(
            line.x + shift, value, (value - low, high - value), fmt=f"{mark}-", color=color, ms=5,
            mec="white", mew=0.6, lw=1.6, elinewidth=1, capsize=2, zorder=3,
        )  # fmt: skip
    axes.margins(x=0.03)
    low = min([0.5, *(line.rates[1].min() for line in series)])
    high = max([0.5, *(line.rates[2].max() for line in series)])
    room = max(0.06 * (high - low), 0.01)
    axes.set_ylim(max(-0.02, low - room), min(1.02, high + room))
    axes.axhline(0.5, color=GREY, lw=1, ls=(0, (4, 3)), zorder=1.5)
    axes.yaxis.set_major_locator(MaxNLocator(6, steps=TICKS))
    axes.yaxis.set_major_formatter(PercentFormatter(1, decimals=0))
    ends = [(line.rates[0][-1], line.name, look_of(i)[0]) for i, line in enumerate(series)]
    _label_ends(axes, ends)


def _label_ends(axes: Axes, ends: Sequence[tuple[float, str, str]]) -> None:
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
        measured = Measured(*row.win_rate[:3])
        value = measured.value
        draw_dot(axes, measured, index, BLUE, "o")
        text = axes.annotate(
            f"{100 * value:.1f} %", (value, index), (0, 5), textcoords="offset points",
            ha="center", va="bottom", fontsize=7.5,
        )  # fmt: skip
        text.set_path_effects([withStroke(linewidth=2, foreground="white")])
    name_dots(axes, _names(rows, with_temperature=True))
    axes.set_xlabel(f"win rate against {opponent}")
    return 0.8 + LINE * len(rows)


def draw_dot(axes: Axes, measured: Measured, place: float, color: str, mark: str) -> None:
    """Draw a share and its interval on a line of its own."""
    value, low, high = measured
    axes.errorbar(
        value, place, xerr=[[value - low], [high - value]], fmt=mark, ms=5.5, mec="white",
        mew=0.6, color=color, elinewidth=1.4, capsize=2.5, zorder=3,
    )  # fmt: skip


def name_dots(axes: Axes, names: Sequence[str]) -> None:
    """Name the lines 0, 1, ... of a panel, the first at the top, with percentages below."""
    axes.axvline(0.5, color=GREY, lw=1, ls=(0, (4, 3)), zorder=1.5)
    axes.set_yticks(range(len(names)), names)
    axes.set_ylim(len(names) - 0.5, -0.75)
    axes.grid(visible=False, axis="y")
    axes.tick_params(axis="y", length=0)
    axes.margins(x=0.06)
    axes.xaxis.set_major_locator(MaxNLocator(6, steps=TICKS))
    axes.xaxis.set_major_formatter(PercentFormatter(1, decimals=0))


def _dark(color: str) -> np.ndarray:
    """The colour, dark enough for text on white."""
    return 0.8 * np.array(matplotlib.colors.to_rgb(color))
