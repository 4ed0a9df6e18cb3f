"""Labels of a figure, each placed where it hides the fewest marks and no other label."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import matplotlib.colors
import numpy as np
from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.collections import PathCollection
from matplotlib.lines import Line2D
from matplotlib.patheffects import withStroke
from matplotlib.text import Annotation

# Places of a label relative to its anchor: to the left, above or to the right, by lines up or down.
TRIES = [(side, rise) for rise in (0, 1, -1, 2, -2, 3, -3) for side in (1, 0, -1)]
CLASH, OUTSIDE, FAR, CLOSE = 1000.0, 500.0, 6.0, 0.4  # what a place costs, against a hidden mark
AROUND = 5  # pixels around a label that marks of others should not be in


class Label(NamedTuple):
    """A text beside one of several points.

    Attributes:
      text: of one line.
      anchors: where it may stand, in data units, the best first.
      color: of what it names; the text is darker.
      size: of the font, points.
      weight: of the font.
      cost: of the worst place that is taken; where all are worse, the label is left out.
    """

    text: str
    anchors: Sequence[tuple[float, float]]
    color: str
    size: float = 8.5
    weight: str = "bold"
    cost: float = np.inf


def place(axes: Axes, labels: Sequence[Label]) -> None:
    """Write the labels one after another; the first has the choice of all places."""
    axes.figure.draw_without_rendering()  # places everything
    drawn = [
        (_drawn_at(artist, axes), _color(artist)) for artist in (*axes.collections, *axes.lines)
    ]
    taken: list[np.ndarray] = []
    for label in labels:
        label_color = matplotlib.colors.to_hex(label.color)
        marks = np.concatenate([xy for xy, _ in drawn] or [np.zeros((0, 2))])
        others = [xy for xy, color in drawn if color != label_color]
        text = _annotate(axes, label)
        places = [(anchor, *way) for anchor in label.anchors for way in TRIES]
        costs = [
            _cost(_move(text, *at), axes, marks, np.concatenate([np.zeros((0, 2)), *others]), taken)
            + FAR * abs(at[2]) * label.size / 8.5
            for at in places
        ]
        best = int(np.argmin(costs))
        if costs[best] > label.cost:
            text.remove()
            continue
        taken.append(_move(text, *places[best]))


def _annotate(axes: Axes, label: Label) -> Annotation:
    text = axes.annotate(
        label.text, label.anchors[0], (0, 0), textcoords="offset points", va="center", zorder=7,
        color=dark(label.color), weight=label.weight, fontsize=label.size, annotation_clip=False,
    )  # fmt: skip
    text.set_in_layout(False)
    text.set_path_effects([withStroke(linewidth=2.0, foreground="white")])
    return text


def _move(text: Annotation, anchor: tuple[float, float], side: int, rise: int) -> np.ndarray:
    """Move a text beside an anchor; its corners in pixels, [2, 2]."""
    size = text.get_fontsize()
    text.xy = anchor
    text.set_position((0.8 * size * side, 1.25 * size * rise))
    text.set_horizontalalignment({1: "left", 0: "center", -1: "right"}[side])
    return text.get_window_extent().get_points()


def _cost(
    box: np.ndarray,
    axes: Axes,
    marks: np.ndarray,
    others: np.ndarray,
    taken: Sequence[np.ndarray],
) -> float:
    """How bad a place is: other labels and the frame count more than marks that are hidden.

    Args:
      box: corners of the text.
      marks: everything that is drawn, [n, 2] pixels.
      others: what the label does not name; a label close to it would be read as its name.
      taken: corners of other labels.
    """
    inside = axes.bbox.get_points()
    outside = (box[0] < inside[0]).any() or (box[1] > inside[1]).any()
    hidden = ((marks > box[0]) & (marks < box[1])).all(1).sum()
    close = ((others > box[0] - AROUND) & (others < box[1] + AROUND)).all(1).sum()
    clash = sum((box[0] < other[1]).all() and (other[0] < box[1]).all() for other in taken)
    return CLASH * clash + OUTSIDE * outside + hidden + CLOSE * close


def _drawn_at(artist: Artist, axes: Axes) -> np.ndarray:
    """Points [n, 2] of what an artist draws, in pixels: many on a line, none of a band."""
    if isinstance(artist, PathCollection):  # of a scatter plot
        return axes.transData.transform(np.asarray(artist.get_offsets()))
    if not isinstance(artist, Line2D):
        return np.zeros((0, 2))
    xy = axes.transData.transform(np.asarray(artist.get_xydata(), float).reshape(-1, 2))
    if artist.get_linestyle() == "None" or len(xy) < 2:
        return xy
    along = np.concatenate([[0], np.cumsum(np.hypot(*np.diff(xy, axis=0).T))])
    steps = np.linspace(0, along[-1], max(2, int(along[-1] / 4)))  # a point every 4 pixels
    return np.stack([np.interp(steps, along, xy[:, i]) for i in (0, 1)], axis=1)


def _color(artist: Artist) -> str:
    color = artist.get_facecolor() if isinstance(artist, PathCollection) else None
    if isinstance(artist, Line2D):
        color = artist.get_color()
    if color is None or not len(color):
        return ""
    rgb = color[0] if isinstance(color, np.ndarray) and color.ndim == 2 else color
    return matplotlib.colors.to_hex(rgb)


def dark(color: str) -> np.ndarray:
    """The colour, dark enough for text on white."""
    return 0.7 * np.array(matplotlib.colors.to_rgb(color))
