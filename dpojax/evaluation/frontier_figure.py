"""The figure of a frontier run: reward against KL of every checkpoint, and the theoretical limit.

The lower panel shows the share of the optimal gain that each method's Pareto hull reaches. Bars and
the band around the limit are two standard errors to either side.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import matplotlib
import numpy as np
from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.collections import PathCollection
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patheffects import withStroke
from matplotlib.text import Annotation
from matplotlib.ticker import FixedLocator, MaxNLocator, NullLocator, PercentFormatter

from dpojax.evaluation import frontier_points, plots
from dpojax.evaluation.frontier import Estimate
from dpojax.evaluation.frontier_points import BEST_OF_N, REFERENCE, Point
from dpojax.evaluation.optimum import (
    Optimum,
    optimal_reward_at,
    share_of_optimal_gain,
    trusted_up_to,
)
from dpojax.evaluation.plots import BLUE, GREEN, GREY, PURPLE, STYLE, VERMILLION

# Okabe and Ito's colours as in `plots`. Marks differ too, so that no method needs its colour.
LOOKS = {
    "dpo": (BLUE, "o"),
    "online_dpo": ("#56B4E9", "s"),
    "ppo": (VERMILLION, "^"),
    "ppo_gt": ("#E69F00", "D"),
    BEST_OF_N: ("#333333", "*"),
    "unlikelihood": (PURPLE, "v"),
    "preferred_ft": (GREEN, "p"),
    REFERENCE: (GREY, "."),
}
SPARE = [("#7A5C00", "X"), (GREEN, "h"), (PURPLE, "<"), (GREY, "P"), (VERMILLION, ">")]
SIZE, DPI = (7.0, 5.9), 200  # inches: a README's 700 pixels, and a paper's text width
BARS = 2.0  # standard errors
CAPTION = "faint: every checkpoint of every run; lines: Pareto hulls; bars and band: ± 2 s.e."
FAR = 3.0  # the figure does not show a method beyond this many times the KL of all others
TICKS = [0.1, 0.5, 1, 2, 3, 5, 7, 10, 15, 20, 30, 40, 60, 80, 100]
# Places of a label relative to its point, in the order of preference.
TRIES = [(side, rise) for rise in (0, 1, -1, 2, -2, 3, -3, 4, -4) for side in (1, 0, -1)]


def figure(points: Sequence[Point], optimum: Optimum, base: Point) -> Figure:
    """Draw all points with finite KL and reward, the hulls, the limit, best-of-n and the base.

    The KL axis has a square-root scale, on which the limit starts as a straight line. Best-of-n is
    placed at the upper bound of its KL, with an open mark at its measured KL if that is lower. The
    limit and the shares end where the limit is no longer trusted. If one method goes `FAR` beyond
    all others, the axis ends before it, and the title counts the points that are not shown.

    Args:
      points: one per checkpoint, without the reference.
      optimum: the theoretical limit.
      base: the point of the reference, at KL 0.
    """
    methods = frontier_points.by_method(filter(frontier_points.is_finite, points))
    looks = looks_of(methods)
    with matplotlib.rc_context(STYLE):
        drawn = Figure(SIZE, dpi=DPI, layout="constrained")
        rewards, shares = drawn.subplots(2, 1, sharex=True, height_ratios=(2.9, 1))
        largest = _largest(methods)
        _sqrt_scale(rewards, largest)
        _limit(rewards, optimum)
        for method, members in methods.items():
            draw = _best_of_n if method == BEST_OF_N else _method
            draw(rewards, members, *looks[method])
            _shares(shares, members, optimum, base, *looks[method])
        rewards.plot(base.kl, base.reward, "o", ms=7, mfc="white", mec="black", mew=1.4, zorder=6)
        rewards.set_ylabel("mean reward")
        title = CAPTION + _not_shown(methods, largest)
        rewards.set_title(title, fontsize=7.5, weight="normal", color=GREY)
        _dress_shares(shares, optimum)
        drawn.get_layout_engine().set(w_pad=0.06, h_pad=0.05)
        _label(rewards, _ends(methods, looks, optimum, base, largest))
    return drawn


def draw(points: Sequence[Point], optimum: Optimum, base: Point, *paths: str | os.PathLike) -> None:
    """Write `figure` to each path, see `plots.save`."""
    plots.save(figure(points, optimum, base), *paths)


def looks_of(methods: Sequence[str] | Mapping) -> dict[str, tuple[str, str]]:
    """Colour and mark of each method: those in `LOOKS`, else spare ones."""
    others = [method for method in methods if method not in LOOKS]
    spare = {method: SPARE[i % len(SPARE)] for i, method in enumerate(others)}
    return {method: LOOKS.get(method) or spare[method] for method in methods}


def _largest(methods: Mapping[str, Sequence[Point]]) -> float:
    """The KL where the axis ends: the largest of all points, or without one far method."""
    ends = sorted((max(p.kl for p in members) for members in methods.values()), reverse=True)
    if not ends:
        return 1.0
    return ends[1] if len(ends) > 1 and ends[0] > FAR * ends[1] > 0 else ends[0]


def _not_shown(methods: Mapping[str, Sequence[Point]], largest: float) -> str:
    """The line of the title that counts the points beyond the end of the axis."""
    counts = []
    for method, members in methods.items():
        kls = [point.kl for point in members if point.kl > largest]
        if kls:
            name = frontier_points.name(method)
            counts.append(f"{len(kls)} of {name}, to {max(kls):.0f} nats")
    return f"\nnot shown: {'; '.join(counts)}" if counts else ""


def _sqrt_scale(axes: Axes, largest: float) -> None:
    def root(x: np.ndarray) -> np.ndarray:
        return np.sign(x) * np.sqrt(np.abs(x))  # a measured KL may lie just below 0

    def square(x: np.ndarray) -> np.ndarray:
        return np.sign(x) * x**2

    axes.set_xscale("function", functions=(root, square))
    axes.set_xlim(-0.002 * largest, 1.1 * largest)
    axes.xaxis.set_major_locator(FixedLocator([0, *(t for t in TICKS if t > largest / 200)]))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_major_formatter(lambda x, _: f"{x:g}")


def _limit(axes: Axes, optimum: Optimum) -> None:
    end = trusted_up_to(optimum)
    if np.isnan(end):
        return
    kl = end * np.linspace(0, 1, 400) ** 2
    best = optimal_reward_at(kl, optimum)
    low, high = best.value - BARS * best.error, best.value + BARS * best.error
    axes.fill_between(kl, low, high, color="black", alpha=0.13, lw=0)
    axes.plot(kl, best.value, color="black", lw=2, zorder=4, label="limit")


def _method(axes: Axes, points: Sequence[Point], color: str, mark: str) -> None:
    kl, reward = [p.kl for p in points], [p.reward for p in points]
    axes.scatter(kl, reward, s=13, c=color, marker=mark, alpha=0.28, lw=0, zorder=2)
    hull = frontier_points.arrays(frontier_points.hull(points))
    axes.plot(hull.kl, hull.reward, color=color, lw=1.7, zorder=3)
    axes.errorbar(
        hull.kl,
        hull.reward,
        BARS * hull.reward_error,
        BARS * hull.kl_error,
        fmt=mark,
        color=color,
        ms=4.5,
        mec="white",
        mew=0.5,
        elinewidth=0.7,
        ecolor=(color, 0.6),
        zorder=3.5,
    )


def _best_of_n(axes: Axes, points: Sequence[Point], color: str, mark: str) -> None:
    bound = sorted(map(frontier_points.at_the_bound, points), key=lambda p: p.kl)
    x, y = [p.kl for p in bound], [p.reward for p in bound]
    axes.plot(x, y, ls=(0, (1, 1.2)), color=color, lw=1.3, zorder=4)
    axes.plot(x, y, mark, color=color, ms=8, mec="white", mew=0.6, zorder=5)
    lower = [p for p in points if p.kl < 0.98 * frontier_points.at_the_bound(p).kl]
    axes.plot(
        [p.kl for p in lower], [p.reward for p in lower], mark, ms=6, mfc="none", mec=color, mew=0.7
    )


def _shares(
    axes: Axes, points: Sequence[Point], optimum: Optimum, base: Point, color: str, mark: str
) -> None:
    hull = frontier_points.arrays(frontier_points.hull(map(frontier_points.at_the_bound, points)))
    share = share_of_optimal_gain(
        hull.reward,
        hull.kl,
        optimum,
        base=Estimate(base.reward, base.reward_error),
        reward_error=hull.reward_error,
        kl_error=hull.kl_error,
    )
    style = dict(color=color, ms=7 if mark == "*" else 4, mec="white", mew=0.5, elinewidth=0.7)
    axes.plot(hull.kl, share.value, color=color, lw=1.1, alpha=0.7)
    axes.errorbar(hull.kl, share.value, BARS * share.error, fmt=mark, ecolor=(color, 0.6), **style)


def _dress_shares(axes: Axes, optimum: Optimum) -> None:
    end = trusted_up_to(optimum)
    axes.axhline(1, color="black", lw=1.5, zorder=1.5)
    if np.isfinite(end) and end < axes.get_xlim()[1]:
        axes.axvspan(end, axes.get_xlim()[1], color="#F2F2F2", lw=0, zorder=0)
        axes.annotate(
            "limit not known here",
            ((end + axes.get_xlim()[1]) / 2, 0.5),
            xycoords=axes.get_xaxis_transform(),
            ha="center",
            va="center",
            color=GREY,
        )
    axes.set_ylim(0, 1.19)
    axes.yaxis.set_major_locator(MaxNLocator(4, steps=[2.5, 5, 10]))
    axes.yaxis.set_major_formatter(PercentFormatter(1))
    axes.set_ylabel("share of\noptimal gain")
    axes.set_xlabel("KL(policy || reference), nats per sequence")


class End(NamedTuple):
    """A label, the point that it names, and its colour."""

    text: str
    kl: float
    reward: float
    color: str


def _ends(
    methods: Mapping[str, Sequence[Point]],
    looks: Mapping,
    optimum: Optimum,
    base: Point,
    largest: float,
) -> list[End]:
    """The labels of the figure, where hull, limit or base is to be named."""
    ends = []
    for method, members in methods.items():
        hull = frontier_points.hull(map(frontier_points.at_the_bound, members))
        last = [point for point in hull if point.kl <= largest or point is hull[0]][-1]
        color, _ = looks[method]
        ends.append(End(frontier_points.name(method), last.kl, last.reward, color))
    steep = 0.3 * trusted_up_to(optimum)  # there is no mark to the left of the limit
    if np.isfinite(steep):
        best = float(optimal_reward_at(steep, optimum).value)
        ends.append(End("theoretical limit", steep, best, "black"))
    return [*ends, End("SFT (reference)", base.kl, base.reward, "black")]


def _label(axes: Axes, ends: Sequence[End]) -> None:
    """Write each label beside its point, where it hides the fewest marks and other labels."""
    axes.figure.draw_without_rendering()  # places everything
    drawn = [
        axes.transData.transform(xy)
        for artist in (*axes.collections, *axes.lines)
        for xy in _drawn_at(artist)
    ]
    marks, taken = np.array(drawn).reshape(-1, 2), []
    for end in sorted(ends, key=lambda end: -end.kl):
        label = axes.annotate(
            end.text, (end.kl, end.reward), (0, 0), textcoords="offset points", va="center",
            zorder=7, color=_dark(end.color), weight="bold", annotation_clip=False,
        )  # fmt: skip
        label.set_in_layout(False)
        label.set_path_effects([withStroke(linewidth=2.2, foreground="white")])
        costs = []
        for side, rise in TRIES:
            box = _move(label, side, rise)
            costs.append(_cost(box, axes, marks, taken) + 5 * abs(rise))
        taken.append(_move(label, *TRIES[int(np.argmin(costs))]))


def _move(label: Annotation, side: int, rise: int) -> np.ndarray:
    """Move a label by steps to the right and up of its point; its corners in pixels, [2, 2]."""
    label.set_position((8 * side, 11 * rise))
    label.set_horizontalalignment({1: "left", 0: "center", -1: "right"}[side])
    return label.get_window_extent().get_points()


def _cost(box: np.ndarray, axes: Axes, marks: np.ndarray, taken: Sequence[np.ndarray]) -> float:
    """How bad a place of a label is: other labels and the frame count more than hidden marks."""
    (x0, y0), (x1, y1) = box
    inside = axes.bbox.get_points()
    outside = x0 < inside[0, 0] or y0 < inside[0, 1] or x1 > inside[1, 0] or y1 > inside[1, 1]
    hidden = ((marks > box[0]) & (marks < box[1])).all(1).sum()
    clash = sum((box[0] < other[1]).all() and (other[0] < box[1]).all() for other in taken)
    return 1000 * clash + 500 * outside + hidden


def _drawn_at(artist: Artist) -> np.ndarray:
    """Points [n, 2] of what an artist draws, in data units: many on a line, none of a band."""
    if isinstance(artist, PathCollection):  # of a scatter plot
        return np.asarray(artist.get_offsets())
    if not isinstance(artist, Line2D):
        return np.zeros((0, 2))
    xy = np.asarray(artist.get_xydata(), float)
    if artist.get_linestyle() == "None" or len(xy) < 2:
        return xy
    steps = np.linspace(0, len(xy) - 1, 60 * (len(xy) - 1) + 1 if len(xy) < 50 else len(xy))
    at = np.arange(len(xy))
    return np.stack([np.interp(steps, at, xy[:, i]) for i in (0, 1)], axis=1)


def _dark(color: str) -> np.ndarray:
    """The colour, dark enough for text on white."""
    return 0.7 * np.array(matplotlib.colors.to_rgb(color))
