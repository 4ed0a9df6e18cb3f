"""Figures of a recipe: the win rate over training steps, and loss and KL over epochs."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from dpojax.evaluation.judging.figure import draw_curves, series_of
from dpojax.evaluation.plots import GREY, PANEL, STYLE, save

BY_BETA = matplotlib.colormaps["viridis"]


class LearningCurve(NamedTuple):
    """Evaluations of a training run.

    Attributes:
      epochs: of training, at each evaluation.
      loss: held out, in nats per pair.
      kl: to the reference, in nats per token; nan where it was not measured.
    """

    epochs: Sequence[float]
    loss: Sequence[float]
    kl: Sequence[float]


def draw_over_steps(
    points: Mapping[str, Sequence[tuple[float, ...]]],
    title: str,
    paths: Sequence[str | os.PathLike],
) -> None:
    """Draw win rates with their intervals over training steps, a colour for each policy.

    Args:
      points: policy -> (step, win rate, low, high) of each of its checkpoints.
      paths: see `plots.save`.
    """
    with matplotlib.rc_context(STYLE):
        figure = Figure((1.6 * PANEL[0], 1.2 * PANEL[1]), dpi=160, layout="constrained")
        axes = figure.add_subplot()
        draw_curves(axes, series_of(points))
        _set_labels(axes, title, "optimiser step", "win rate (95 % interval)")
        save(figure, *paths)


def draw_learning(
    curves: Mapping[str, LearningCurve], x_label: str, paths: Sequence[str | os.PathLike]
) -> None:
    """Draw held-out loss, and KL per token, of training runs over epochs.

    Args:
      curves: run -> its evaluations, in the order of the legend.
      x_label: "epoch", or "optimiser step".
      paths: see `plots.save`.
    """
    with matplotlib.rc_context(STYLE):
        figure = Figure((2 * PANEL[0] + 1.2, PANEL[1] + 0.1), dpi=160, layout="constrained")
        left, right = figure.subplots(1, 2)
        for number, (name, curve) in enumerate(curves.items()):
            color = BY_BETA(0.92 * number / max(1, len(curves) - 1))
            left.plot(curve.epochs, curve.loss, "-o", color=color, ms=2.5, lw=1.3, label=name)
            right.plot(curve.epochs, curve.kl, "-o", color=color, ms=2.5, lw=1.3)
        _set_labels(left, "Held-out loss", x_label, "nats per pair")
        _set_labels(right, "Divergence from SFT", x_label, "KL, nats per token")
        figure.legend(loc="outside right center", frameon=False)
        figure.get_layout_engine().set(w_pad=0.07, h_pad=0.06)
        save(figure, *paths)


def _set_labels(axes: Axes, title: str, x: str, y: str) -> None:
    axes.set_title(title)
    axes.set_xlabel(x)
    axes.set_ylabel(y)
    axes.tick_params(color=GREY)
