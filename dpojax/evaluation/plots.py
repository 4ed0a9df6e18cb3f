"""The figure of a run: how each stage learned, from the lines of its metrics files."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import MaxNLocator

from dpojax import storage

# Okabe and Ito's colours, which can be told apart with any colour vision.
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
    """One metric of a stage."""

    metric: str  # its name in the metrics file
    color: str | None = None  # None: blue for train and vermillion for eval
    label: str = ""  # written at the curve's end


class Panel(NamedTuple):
    """One set of axes with curves of a stage."""

    stage: str
    title: str
    unit: str
    curves: tuple[Curve, ...]
    scale: float = 1.0  # turns the metrics into `unit`
    level: tuple[float, str] | None = None  # height of a dashed line, in `unit`, and its name


def training_curves(metrics: Mapping[str, Sequence[Mapping]], path: str | os.PathLike) -> None:
    """Draw the curves of a run's stages into `path` (png, pdf or svg), all or nothing.

    A stage that logs rewards gets panels of loss, accuracy, rewards, KL and displacement. Any other
    stage gets its loss, and its accuracy if it is a classifier. A stage that draws samples also
    gets their reward and KL. A panel without a logged metric is left out. Every logged point is
    drawn; the thick line is a centred running mean of the training points.

    Args:
      metrics: stage name -> lines as `read_metrics` returns them, of any splits.
      path: a local file, or an object of a bucket; its folder is made.
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
        save(figure, path)


def save(figure: Figure, *paths: str | os.PathLike) -> None:
    """Write a figure to each path (png, pdf or svg by its suffix), all or nothing.

    Args:
      paths: local files, or objects of a bucket; their folders are made.
    """
    for path in map(storage.as_path, paths):
        undated = {"CreationDate": None} if path.suffix == ".pdf" else None
        with storage.replacing(path) as unfinished, matplotlib.rc_context(STYLE):
            figure.savefig(unfinished, metadata=undated)


def _panels(stage: str, lines: Sequence[Mapping]) -> list[Panel]:
    """The panels of a stage that have at least one finite point."""
    if _logged(lines, "rewards/margins") or _logged(lines, "rewards/chosen"):
        panels = _preference_panels(stage, lines)
    else:
        panels = _likelihood_panels(stage, lines)
    panels += _sample_panels(stage)
    return [p for p in panels if any(_logged(lines, curve.metric) for curve in p.curves)]


def _title(stage: str) -> str:
    return stage.upper() if len(stage) <= 4 else stage.capitalize()


def _likelihood_panels(stage: str, lines: Sequence[Mapping]) -> list[Panel]:
    """The panels of SFT or of a classifier."""
    title = _title(stage)
    if not _logged(lines, "accuracy"):
        return [Panel(stage, f"{title} loss", "nats per token", (Curve("loss"),))]
    accuracy = Curve("accuracy")
    return [
        Panel(stage, f"{title} loss", "nats per text", (Curve("loss"),)),
        Panel(stage, f"{title} accuracy", "% of texts", (accuracy,), scale=100),
    ]


def _preference_panels(stage: str, lines: Sequence[Mapping]) -> list[Panel]:
    """The panels of a stage with rewards: explicit ones of a reward model, or implicit ones."""
    unit = "pair" if _logged(lines, "rewards/margins") else "response"
    explicit = stage == "reward"
    rewards = (
        Curve("rewards/chosen", GREEN, "chosen"),
        Curve("rewards/rejected", PURPLE, "rejected"),
        Curve("rewards/margins", "#333333", "margin"),
    )
    return [
        Panel(
            stage,
            f"{_title(stage)} loss",
            f"loss per {unit}",
            (Curve("loss"),),
            level=_loss_at_reference(lines),
        ),
        Panel(
            stage,
            "Reward accuracy",
            f"% of {unit}s",
            (Curve("rewards/accuracies"),),
            scale=100,
            level=(50, "chance"),
        ),
        Panel(
            stage, "Rewards", "logits" if explicit else "in the unit of the loss's reward", rewards
        ),
        Panel(
            stage,
            "Divergence from reference",
            "KL, nats per token",
            (Curve("kl/per_token"),),
        ),
        Panel(
            stage, "Chosen made less likely", f"% of {unit}s", (Curve("displacement"),), scale=100
        ),
    ]


def _loss_at_reference(lines: Sequence[Mapping]) -> tuple[float, str] | None:
    """The loss of a policy that equals its reference, where it was logged, and its name."""
    losses = [line["loss/at_reference"] for line in lines if "loss/at_reference" in line]
    if not losses or not losses[0]:
        return None
    is_log_two = math.isclose(losses[0], math.log(2), rel_tol=1e-4)
    return losses[0], "log 2" if is_log_two else "policy = reference"


def _sample_panels(stage: str) -> list[Panel]:
    """The panels of samples that were drawn in training or in evaluations."""
    reward = Curve("objective/scores"), Curve("samples/reward")
    kl = Curve("objective/kl"), Curve("samples/kl")
    return [
        Panel(stage, "Reward of samples", "mean reward", reward),
        Panel(stage, "KL of samples", "nats per response", kl),
    ]


def _logged(lines: Sequence[Mapping], metric: str) -> bool:
    return any(len(_points(lines, metric, split)[0]) for split in ("train", "eval"))


def _points(lines: Sequence[Mapping], metric: str, split: str) -> tuple[np.ndarray, np.ndarray]:
    """Steps and finite values of a metric, both [points]."""
    values = {
        line["step"]: line[metric]
        for line in lines
        if line["split"] == split
        and math.isfinite(line.get(metric, math.nan))
        and is_defined(metric, line)
    }
    steps = np.array(sorted(values))
    return steps, np.array([values[step] for step in steps])


def is_defined(metric: str, line: Mapping) -> bool:
    """Whether a metric means something: where policy == reference, no reward ranks a pair."""
    reward = line.get("rewards/margins", line.get("rewards/chosen"))
    return metric != "rewards/accuracies" or reward != 0


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
    """Centred running mean over a fifteenth of the points; at the ends over fewer."""
    half = len(values) // 30
    sums = np.concatenate([[0.0], np.cumsum(values)])
    at = np.arange(len(values))
    first, last = np.maximum(at - half, 0), np.minimum(at + half + 1, len(values))
    return (sums[last] - sums[first]) / (last - first)


def _label_ends(axes: Axes, ends: Sequence[tuple[float, Curve]]) -> None:
    """Write labels at the right ends of curves, moved apart where they would overlap."""
    low, high = axes.get_ylim()
    below = -math.inf
    for height, curve in sorted(ends, key=lambda end: end[0]):
        below = max((height - low) / (high - low), below + 0.085)
        axes.text(
            1.02, below, curve.label, color=curve.color, transform=axes.transAxes, va="center"
        )


def _legend(figure: Figure) -> None:
    """Draw one legend for all panels without labels: a colour means the same in each of them."""
    entries = {
        "train, running mean": Line2D([], [], color=BLUE, lw=1.7),
        "train, as logged": Line2D([], [], color=BLUE, lw=0.7, alpha=0.45),
        "held out": Line2D([], [], color=VERMILLION, lw=0.9, marker="o", ms=3.5),
    }
    figure.legend(
        entries.values(), entries.keys(), loc="outside upper right", ncols=3, frameon=False
    )
