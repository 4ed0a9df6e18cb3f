"""The figure of a sweep: how each member learned, and where its evaluations lie."""

from __future__ import annotations

import math
import os
from collections.abc import Collection, Mapping, Sequence
from typing import NamedTuple

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import MaxNLocator

from dpojax.evaluation.plots import GREY, PANEL, STYLE, TICKS, is_defined, save

COLORS = matplotlib.colormaps["viridis"]
MOST = 6  # panels


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
    Panel("Implicit-reward accuracy", "% of pairs", "rewards/accuracies", 100),
    Panel("Accuracy", "% of texts", "accuracy", 100),
    Panel("Reward margin", "nats", "rewards/margins"),
    Panel("Divergence from reference", "KL estimate, nats per token", "kl/per_token"),
    Panel(
        "Accuracy against divergence",
        "% of pairs",
        "rewards/accuracies",
        100,
        ("kl/per_token", "KL estimate, nats per token"),
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


def draw(
    members: Mapping[str, Sequence[Mapping]],
    path: str | os.PathLike,
    *,
    failed: Collection[str] = (),
) -> None:
    """Draw the evaluations of all members of a sweep, a colour for each; all or nothing.

    No file is written if no metric of any panel is finite.

    Args:
      members: name -> lines of its metrics file, of the split `eval`, in the order of the legend.
      path: .png, .pdf or .svg.
      failed: names of members whose curves end before the last step; a cross marks where.
    """
    panels = [p for p in PANELS if any(_points(lines, p)[0] for lines in members.values())]
    panels = panels[-MOST:]
    if not panels:
        return
    columns = min(3, len(panels))
    rows = math.ceil(len(panels) / columns)
    colors = [COLORS(0.92 * i / max(1, len(members) - 1)) for i in range(len(members))]
    with matplotlib.rc_context(STYLE):
        size = columns * PANEL[0] + 1.4, rows * PANEL[1] + 0.1
        figure = Figure(size, dpi=160, layout="constrained")
        handles = {}
        for index, panel in enumerate(panels):
            axes = figure.add_subplot(rows, columns, index + 1)
            for (name, lines), color in zip(members.items(), colors):
                label = f"{name} (failed)" if name in failed else name
                handles[label] = _draw(axes, panel, lines, color, "X" if name in failed else "o")
            _label(axes, panel)
        figure.legend(handles.values(), handles.keys(), loc="outside right center", frameon=False)
        figure.get_layout_engine().set(w_pad=0.07, h_pad=0.06)
        save(figure, path)


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
