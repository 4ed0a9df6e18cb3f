"""The figure of a sweep: results against what was swept, and how each member learned.

Members whose losses have different options, such as another beta, have losses that are different
measures. Then no panel shows the loss.
"""

from __future__ import annotations

import math
import os
from collections.abc import Collection, Mapping, Sequence
from typing import Any, NamedTuple

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import MaxNLocator, NullLocator

from dpojax.evaluation.plots import GREY, PANEL, STYLE, TICKS, is_defined, save

COLORS = matplotlib.colormaps["viridis"]
MOST, COLUMNS = 6, 3  # panels, and those in a row
SEED, LOSS = "seed", "loss"
BASE = "base"  # stands for the value of the config, where a member changes nothing
WIDE = 8.0  # a key whose largest value is so many times its smallest gets a logarithmic axis


class Panel(NamedTuple):
    """One set of axes: a metric over steps, or over another metric."""

    title: str
    unit: str
    metric: str
    scale: float = 1.0
    over: tuple[str, str] | None = None  # another metric and its unit; None: steps
    interval: tuple[str, str] | None = None  # metrics of its lower and upper end


PANELS = (
    Panel("Held-out loss", "nats", "loss"),
    Panel("Reward accuracy", "% of pairs", "rewards/accuracies", 100),
    Panel("Accuracy", "% of texts", "accuracy", 100),
    Panel("Reward margin", "in the unit of the loss's reward", "rewards/margins"),
    Panel("Divergence from reference", "KL, nats per token", "kl/per_token"),
    Panel(
        "Accuracy against divergence",
        "% of pairs",
        "rewards/accuracies",
        100,
        ("kl/per_token", "KL, nats per token"),
    ),
    Panel(
        "Reward of samples against KL",
        "mean reward",
        "samples/reward",
        1,
        ("samples/kl", "nats per response"),
    ),
    Panel(
        "Win rate against the reference",
        "%, with 95 % interval",
        "samples/win_rate",
        100,
        interval=("samples/win_rate_low", "samples/win_rate_high"),
    ),
)
# What is drawn against a key, the most telling first; the results of each member.
AGAINST = (
    Panel(
        "Win rate",
        "%, with 95 % interval",
        "samples/win_rate",
        100,
        interval=("samples/win_rate_low", "samples/win_rate_high"),
    ),
    Panel("Reward of samples", "mean reward", "samples/reward"),
    Panel("Reward accuracy", "% of held-out pairs", "rewards/accuracies", 100),
    Panel("Accuracy", "% of held-out texts", "accuracy", 100),
    Panel("KL of samples", "nats per response", "samples/kl"),
    Panel("KL from the reference", "nats per token", "kl/per_token"),
    Panel("Chosen less likely", "% of held-out pairs", "displacement", 100),
    Panel("Held-out loss", "nats", LOSS),
)

Changes = Mapping[str, Any]


class Swept(NamedTuple):
    """What stands on the x axis of a sweep's results.

    Attributes:
      key: that members change, such as "preference.beta".
      places: its values -> where they stand on the axis.
      others: keys that differ as well, but for the seed.
    """

    key: str
    places: Mapping[Any, float]
    others: Sequence[str]

    @property
    def is_logarithmic(self) -> bool:
        values = list(self.places)
        if not all(isinstance(value, int | float) and value > 0 for value in values):
            return False
        return max(values) >= WIDE * min(values)


def draw(
    members: Mapping[str, Sequence[Mapping]],
    path: str | os.PathLike,
    *,
    failed: Collection[str] = (),
    changes: Mapping[str, Changes] | None = None,
    results: Mapping[str, Mapping] | None = None,
    same_measure: bool = True,
) -> None:
    """Draw the members of a sweep, a colour for each; all or nothing.

    Where members change a key, the first row shows their results against it: a point for each
    member, a line through the means over seeds. Below, or alone, are their evaluations over steps.
    No file is written if no metric of any panel is finite.

    Args:
      members: name -> lines of its metrics file, of the split `eval`, in the order of the legend.
      path: .png, .pdf or .svg.
      failed: names of members whose curves end before the last step; a cross marks where.
      changes: name -> the config keys that a member changes, with their values; None: no results.
      results: name -> the evaluation that a finished member kept; None: its last one.
      same_measure: whether the members' losses can be compared.
    """
    if results is None:
        results = {name: lines[-1] for name, lines in members.items() if lines}
        results = {name: line for name, line in results.items() if name not in failed}
    swept = _swept({name: changes[name] for name in results}) if changes else None
    against = [] if swept is None else _against(results, same_measure)
    curves = _curves(members, same_measure)[-(MOST - COLUMNS if against else MOST) :]
    if not against and not curves:
        return
    columns = min(COLUMNS, max(len(against), len(curves)))
    rows_against = math.ceil(len(against) / columns)
    rows = rows_against + math.ceil(len(curves) / columns)
    colors = {name: COLORS(0.92 * i / max(1, len(members) - 1)) for i, name in enumerate(members)}
    with matplotlib.rc_context(STYLE):
        size = columns * PANEL[0] + 1.4, rows * PANEL[1] + 0.1
        figure = Figure(size, dpi=160, layout="constrained")
        handles = {}
        for index, panel in enumerate(against, 1):
            axes = figure.add_subplot(rows, columns, index)
            _draw_results(axes, panel, results, swept, changes, colors)
            _label_results(axes, panel, swept)
        for index, panel in enumerate(curves, rows_against * columns + 1):
            axes = figure.add_subplot(rows, columns, index)
            handles = _draw_curves(axes, panel, members, colors, failed)
        if handles:
            figure.legend(
                handles.values(), handles.keys(), loc="outside right center", frameon=False
            )
        figure.get_layout_engine().set(w_pad=0.07, h_pad=0.06)
        save(figure, path)


def _curves(members: Mapping[str, Sequence[Mapping]], same_measure: bool) -> list[Panel]:
    """The panels over steps that have a finite point."""
    panels = [panel for panel in PANELS if same_measure or panel.metric != LOSS]
    return [p for p in panels if any(_points(lines, p)[0] for lines in members.values())]


def _draw_curves(
    axes: Axes,
    panel: Panel,
    members: Mapping[str, Sequence[Mapping]],
    colors: Mapping[str, Any],
    failed: Collection[str],
) -> dict[str, Line2D]:
    """Draw a panel over steps; return the members' lines by their labels."""
    handles = {}
    for name, lines in members.items():
        label = f"{name} (failed)" if name in failed else name
        handles[label] = _draw(axes, panel, lines, colors[name], "X" if name in failed else "o")
    _label(axes, panel)
    return handles


def _swept(changes: Mapping[str, Changes]) -> Swept | None:
    """The key with the most values, the first of several.

    None where members differ in no key, or in more than two: their results are then no function of
    a key that a line could show.
    """
    values: dict[str, list] = {}
    for key in dict.fromkeys(key for of_member in changes.values() for key in of_member):
        distinct = list(dict.fromkeys(_plain(of_member.get(key)) for of_member in changes.values()))
        if key != SEED and len(distinct) > 1:
            values[key] = distinct
    if not 1 <= len(values) <= 2:
        return None
    key = max(values, key=lambda name: len(values[name]))
    distinct = values[key]
    if all(isinstance(value, int | float) for value in distinct):
        places = {value: float(value) for value in sorted(distinct)}
    else:
        places = {value: float(index) for index, value in enumerate(distinct)}
    return Swept(key, places, [name for name in values if name != key])


def _plain(value: Any) -> Any:
    """A value that can be a key of a dict; numbers stay numbers, and None is the config's own."""
    if value is None:
        return BASE
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    return value if is_number else str(value)


def _against(results: Mapping[str, Mapping], same_measure: bool) -> list[Panel]:
    """The panels of results, at most a row."""
    known = [
        panel
        for panel in AGAINST
        if any(math.isfinite(_result(panel, line)) for line in results.values())
        and (same_measure or panel.metric != LOSS)
    ]
    of_samples = any(panel.metric == "samples/kl" for panel in known)
    known = [panel for panel in known if not (of_samples and panel.metric == "kl/per_token")]
    return known[:COLUMNS]


def _result(panel: Panel, line: Mapping) -> float:
    """A member's result in a panel; nan where there is none."""
    value = line.get(panel.metric, math.nan)
    return panel.scale * value if is_defined(panel.metric, line) else math.nan


def _draw_results(
    axes: Axes,
    panel: Panel,
    results: Mapping[str, Mapping],
    swept: Swept,
    changes: Mapping[str, Changes],
    colors: Mapping[str, Any],
) -> None:
    """Draw each member's point, and a line through the means of those that share other keys."""
    lines: dict[tuple, dict[float, list[float]]] = {}
    for name, line in results.items():
        y = _result(panel, line)
        if not math.isfinite(y):
            continue
        x = swept.places[_plain(changes[name].get(swept.key))]
        axes.plot([x], [y], "o", color=colors[name], ms=5, mec="white", mew=0.7, zorder=3)
        if panel.interval:
            low, high = (panel.scale * line.get(end, math.nan) for end in panel.interval)
            axes.plot([x, x], [low, high], "-", color=colors[name], lw=0.9)
        group = tuple(_plain(changes[name].get(key)) for key in swept.others)
        lines.setdefault(group, {}).setdefault(x, []).append(y)
    for group, by_place in lines.items():
        x = sorted(by_place)
        means = [math.fsum(by_place[place]) / len(by_place[place]) for place in x]
        axes.plot(x, means, "-", color=GREY, lw=1.0, zorder=2)
        if len(lines) > 1:
            text = ", ".join(f"{_short(k)}={_text(v)}" for k, v in zip(swept.others, group))
            label = axes.annotate(
                text, (x[-1], means[-1]), (4, 0), textcoords="offset points", va="center",
                color=GREY, fontsize=6.5,
            )  # fmt: skip
            label.set_in_layout(False)  # a long one may not squeeze the axes


def _label_results(axes: Axes, panel: Panel, swept: Swept) -> None:
    axes.set_title(panel.title)
    axes.set_ylabel(panel.unit)
    axes.set_xlabel(_short(swept.key) + (" (logarithmic)" if swept.is_logarithmic else ""))
    if swept.is_logarithmic:
        axes.set_xscale("log")
    places = list(swept.places.values())
    axes.set_xticks(places, [_text(value) for value in swept.places])
    axes.xaxis.set_minor_locator(NullLocator())
    if len(places) > 6:
        axes.tick_params(axis="x", labelrotation=45)
    axes.yaxis.set_major_locator(MaxNLocator(5, steps=TICKS))
    axes.margins(x=0.08)
    axes.tick_params(color=GREY)


def _short(key: str) -> str:
    """A key without its stage: beta of preference.beta."""
    return key.rpartition(".")[2]


def _text(value: Any) -> str:
    return f"{value:g}" if isinstance(value, float) else str(value)


def _points(lines: Sequence[Mapping], panel: Panel) -> tuple[list[float], list[float]]:
    """The finite points of a panel: x and y."""
    x_metric = "step" if panel.over is None else panel.over[0]
    x, y = [], []
    for line in lines:
        finite = all(math.isfinite(line.get(name, math.nan)) for name in (x_metric, panel.metric))
        if finite and is_defined(panel.metric, line):
            x.append(line[x_metric])
            y.append(panel.scale * line[panel.metric])
    return x, y


def _draw(axes: Axes, panel: Panel, lines: Sequence[Mapping], color, end: str) -> Line2D:
    """Draw the curve of one member, and mark its last evaluation, the result."""
    x, y = _points(lines, panel)
    (drawn,) = axes.plot(x, y, "-", color=color, lw=1.3)
    if panel.interval:
        low, high = (_points(lines, panel._replace(metric=end))[1] for end in panel.interval)
        axes.fill_between(x, low, high, color=color, alpha=0.12, lw=0)
    if x:
        axes.plot(x[-1:], y[-1:], end, color=color, ms=5, mec="white", mew=0.7, zorder=3)
    return drawn


def _label(axes: Axes, panel: Panel) -> None:
    axes.set_title(panel.title)
    axes.set_ylabel(panel.unit)
    axes.set_xlabel("optimiser step" if panel.over is None else panel.over[1])
    axes.xaxis.set_major_locator(MaxNLocator(5, integer=panel.over is None, steps=TICKS))
    axes.yaxis.set_major_locator(MaxNLocator(5, steps=TICKS))
    axes.margins(x=0.04)
    axes.tick_params(color=GREY)
