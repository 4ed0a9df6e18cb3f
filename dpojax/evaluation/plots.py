"""The figure of a run: how each stage learned, from the lines of its metrics files."""

from __future__ import annotations

import math
import os
import pathlib
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import MaxNLocator

# Okabe and Ito's colours, which readers with any colour vision tell apart.
BLUE, VERMILLION, GREEN, PURPLE, GREY = "#0072B2", "#D55E00", "#009E73", "#A85C90", "#6B6B6B"
COLUMNS, PANEL = 3, (10 / 3, 2.6)  # inches; two rows of three fill a README's width
TICKS = [1, 2, 2.5, 5, 10]

STYLE = {
    "font.size": 8.5,
    "axes.titlesize": 9.5,
    "axes.titlelocation": "left",
    "axes.titleweight": "bold",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": GREY,
    "axes.linewidth": 0.8,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": "#E6E6E6",
    "grid.linewidth": 0.7,
    "xtick.color": GREY,
    "ytick.color": GREY,
    "xtick.labelcolor": "black",
    "ytick.labelcolor": "black",
    "svg.fonttype": "none",
}


class Curve(NamedTuple):
    """One metric of a stage: its name in the file, its colour, and how it is called."""

    metric: str
    color: str | None = None  # None: blue for train and vermillion for eval
    label: str = ""


class Panel(NamedTuple):
    """One set of axes: what it shows of a stage, and in which unit."""

    stage: str
    title: str
    unit: str
    curves: tuple[Curve, ...]
    scale: float = 1.0
    level: tuple[float, str] | None = None  # a dashed line, already in `unit`, and its name


def training_curves(metrics: Mapping[str, Sequence[Mapping]], path: str | os.PathLike) -> None:
    """Draws the curves of a run's stages into `path` (png, pdf or svg), all or nothing.

    A stage whose lines have rewards gets loss, accuracy, rewards, KL and displacement; any other
    stage gets its loss; one that drew samples gets their reward and KL. What a stage did not log is
    left out. Every logged point is drawn; the
    thick line is a centred running mean of the training points.

    Args:
      metrics: stage name -> lines as `read_metrics` returns them, of any splits.
      path: the folder must exist.
    """
    panels = [panel for stage, lines in metrics.items() for panel in _panels(stage, lines)]
    columns = min(COLUMNS, max(1, len(panels)))
    rows = max(1, math.ceil(len(panels) / columns))
    with matplotlib.rc_context(STYLE):
        size = max(4.5, columns * PANEL[0]), rows * PANEL[1] + 0.3
        figure = Figure(size, dpi=160, layout="constrained")
        if not panels:
            figure.text(0.5, 0.5, "no metrics yet", ha="center", color=GREY)
        for index, panel in enumerate(panels):
            axes = figure.add_subplot(rows, columns, index + 1)
            _draw(axes, panel, metrics[panel.stage])
            if index + columns >= len(panels):
                axes.set_xlabel("iteration" if panel.stage == "ppo" else "optimiser step")
        if panels:
            _legend(figure)
        figure.get_layout_engine().set(w_pad=0.07, h_pad=0.06)
        path = pathlib.Path(path)
        temporary = path.with_name(f".{path.stem}.tmp{path.suffix}")
        try:
            figure.savefig(temporary)
            temporary.replace(path)
        finally:
            temporary.unlink(missing_ok=True)


def _panels(stage: str, lines: Sequence[Mapping]) -> list[Panel]:
    """The panels of a stage for which it has at least one finite point."""
    name = stage.upper() if len(stage) <= 4 else stage.capitalize()
    paired = _logged(lines, "rewards/margins")
    if not paired and not _logged(lines, "rewards/chosen"):
        classes = _logged(lines, "accuracy")
        unit = "nats per text" if classes else "nats per token"
        panels = [Panel(stage, f"{name} loss", unit, (Curve("loss"),))]
        if classes:
            panels.append(
                Panel(stage, f"{name} accuracy", "% of texts", (Curve("accuracy"),), scale=100)
            )
    else:
        levels = [line["loss/at_reference"] for line in lines if "loss/at_reference" in line]
        start = levels[0] if levels else None
        is_log_two = start is not None and math.isclose(start, math.log(2), rel_tol=1e-4)
        level = start and (start, "log 2" if is_log_two else "policy = reference")
        one = "pair" if paired else "response"
        rewards = (
            Curve("rewards/chosen", GREEN, "chosen"),
            Curve("rewards/rejected", PURPLE, "rejected"),
            Curve("rewards/margins", "#333333", "margin"),
        )
        panels = [
            Panel(stage, f"{name} loss", f"loss per {one}", (Curve("loss"),), level=level),
            Panel(
                stage,
                "Reward accuracy" if stage == "reward" else "Implicit-reward accuracy",
                f"% of {one}s",
                (Curve("rewards/accuracies"),),
                scale=100,
                level=(50, "chance"),
            ),
            Panel(stage, "Rewards" if stage == "reward" else "Implicit rewards", "nats", rewards),
            Panel(
                stage,
                "Divergence from reference",
                "KL estimate, nats per token",
                (Curve("kl/per_token"),),
            ),
            Panel(
                stage,
                "Chosen made less likely",
                f"% of {one}s",
                (Curve("displacement"),),
                scale=100,
            ),
        ]
    sampled = {
        "Reward of samples": ("mean reward", "objective/scores", "samples/reward"),
        "KL of samples": ("nats per response", "objective/kl", "samples/kl"),
    }
    panels += [
        Panel(stage, title, unit, (Curve(train), Curve(held_out)))
        for title, (unit, train, held_out) in sampled.items()
    ]
    return [p for p in panels if any(_logged(lines, curve.metric) for curve in p.curves)]


def _logged(lines: Sequence[Mapping], metric: str) -> bool:
    return any(len(_points(lines, metric, split)[0]) for split in ("train", "eval"))


def _points(lines: Sequence[Mapping], metric: str, split: str) -> tuple[np.ndarray, np.ndarray]:
    """Steps and finite values of a metric. Where policy == reference no accuracy is defined."""
    reward = lambda line: line.get("rewards/margins", line.get("rewards/chosen"))
    defined = lambda line: metric != "rewards/accuracies" or reward(line) != 0
    found = {
        line["step"]: line[metric]
        for line in lines
        if line["split"] == split and math.isfinite(line.get(metric, math.nan)) and defined(line)
    }
    steps = np.array(sorted(found))
    return steps, np.array([found[step] for step in steps])


def _draw(axes: Axes, panel: Panel, lines: Sequence[Mapping]) -> None:
    ends = []
    for curve in panel.curves:
        for split, color in (("train", BLUE), ("eval", VERMILLION)):
            steps, values = _points(lines, curve.metric, split)
            values = panel.scale * values
            color = curve.color or color
            if split == "eval":
                axes.plot(steps, values, "o-", color=color, ms=3.2, lw=0.9, mec="white", mew=0.5)
            elif len(steps) == 1:
                axes.plot(steps, values, ".", color=color)
            else:
                axes.plot(steps, values, color=color, lw=0.7, alpha=0.35)
                axes.plot(steps, _smooth(values), color=color, lw=1.7)
            if len(steps) and curve.label and (split == "train" or not ends):
                ends.append((_smooth(values)[-1], curve))
    axes.set_title(panel.title)
    axes.set_ylabel(panel.unit)
    axes.xaxis.set_major_locator(MaxNLocator(5, integer=True, steps=TICKS))
    axes.yaxis.set_major_locator(MaxNLocator(5, steps=TICKS))
    axes.margins(x=0.02)
    if panel.level is not None:
        height, name = panel.level
        axes.axhline(height, color=GREY, lw=1, ls=(0, (4, 3)), zorder=1.5)
        axes.annotate(
            name,
            (1, height),
            (0, 2),
            xycoords=axes.get_yaxis_transform(),
            textcoords="offset points",
            ha="right",
            va="bottom",
            color=GREY,
        )
    _label_ends(axes, ends)


def _smooth(values: np.ndarray) -> np.ndarray:
    """Centred running mean over a fifteenth of the points, over those there are at the ends."""
    half = len(values) // 30
    sums = np.concatenate([[0.0], np.cumsum(values)])
    at = np.arange(len(values))
    first, last = np.maximum(at - half, 0), np.minimum(at + half + 1, len(values))
    return (sums[last] - sums[first]) / (last - first)


def _label_ends(axes: Axes, ends: Sequence[tuple[float, Curve]]) -> None:
    """Names curves at their right ends, pushed apart where they would overlap."""
    low, high = axes.get_ylim()
    below = -math.inf
    for height, curve in sorted(ends, key=lambda end: end[0]):
        below = max((height - low) / (high - low), below + 0.085)
        axes.text(
            1.02, below, curve.label, color=curve.color, transform=axes.transAxes, va="center"
        )


def _legend(figure: Figure) -> None:
    """One legend for all panels, since a colour means the same in each that has no labels."""
    entries = {
        "train, running mean": Line2D([], [], color=BLUE, lw=1.7),
        "train, as logged": Line2D([], [], color=BLUE, lw=0.7, alpha=0.45),
        "held out": Line2D([], [], color=VERMILLION, lw=0.9, marker="o", ms=3.5),
    }
    figure.legend(
        entries.values(), entries.keys(), loc="outside upper right", ncols=3, frameon=False
    )
