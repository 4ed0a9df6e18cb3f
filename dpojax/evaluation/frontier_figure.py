"""The figure of a frontier run: reward against KL of every checkpoint, and the theoretical limit.

The lower panel shows the share of the optimal gain that each method's Pareto front reaches. Bars
and the band around the limit are two standard errors to either side.
"""

from __future__ import annotations

import itertools
import os
from collections.abc import Mapping, Sequence

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, MaxNLocator, NullLocator, PercentFormatter

from dpojax.evaluation import frontier_points, plots
from dpojax.evaluation.figure_labels import Label, place
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
ALPHA = "\N{GREEK SMALL LETTER ALPHA}"
CAPTION = (
    "faint: every checkpoint of every run; lines: Pareto fronts; bars and band: ± 2 s.e.\n"
    "beside the points: DPO's β, PPO's target KL, unlikelihood's " + ALPHA + ", best-of-n's n"
)
FAR = 3.0  # the figure does not show a method beyond this many times the KL of all others
TICKS = [0.1, 0.5, 1, 2, 3, 5, 7, 10, 15, 20, 30, 40, 60, 80, 100]
# What a run's setting is called beside its point: beta, alpha, PPO's target KL, best-of-n's n.
SETTING_NAMES = {
    "beta": "\N{GREEK SMALL LETTER BETA}=",
    "alpha": ALPHA + "=",
    "kl": "target ",
    "n": "n=",
}


def figure(points: Sequence[Point], optimum: Optimum, base: Point) -> Figure:
    """Draw all points with finite KL and reward, the fronts, the limit, best-of-n and the base.

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
        place(rewards, _labels(methods, looks, optimum, base, largest))
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
    front = frontier_points.arrays(frontier_points.front(points))
    axes.plot(front.kl, front.reward, color=color, lw=1.7, zorder=3)
    axes.errorbar(
        front.kl,
        front.reward,
        BARS * front.reward_error,
        BARS * front.kl_error,
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
    front = frontier_points.arrays(frontier_points.front(map(frontier_points.at_the_bound, points)))
    share = share_of_optimal_gain(
        front.reward,
        front.kl,
        optimum,
        base=Estimate(base.reward, base.reward_error),
        reward_error=front.reward_error,
        kl_error=front.kl_error,
    )
    style = dict(color=color, ms=7 if mark == "*" else 4, mec="white", mew=0.5, elinewidth=0.7)
    axes.plot(front.kl, share.value, color=color, lw=1.1, alpha=0.7)
    axes.errorbar(front.kl, share.value, BARS * share.error, fmt=mark, ecolor=(color, 0.6), **style)


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
    axes.set_xlabel("KL(policy || reference), nats per sequence (square-root scale)")


def _labels(
    methods: Mapping[str, Sequence[Point]],
    looks: Mapping,
    optimum: Optimum,
    base: Point,
    largest: float,
) -> list[Label]:
    """The labels of limit, base and fronts, and those of single runs."""
    names, runs = [Label("SFT (reference)", [(base.kl, base.reward)], "black")], []
    steep = 0.3 * trusted_up_to(optimum)  # there is no mark to the left of the limit
    if np.isfinite(steep):
        best = float(optimal_reward_at(steep, optimum).value)
        names.append(Label("theoretical limit", [(steep, best)], "black"))
    for method, members in methods.items():
        color, _ = looks[method]
        placed = [frontier_points.at_the_bound(point) for point in members]
        on_axis = [point for point in placed if point.kl <= largest]
        front = frontier_points.front(on_axis)
        if not front:  # all of it is beyond the axis; the title says so
            continue
        names.append(Label(frontier_points.name(method), _along(front), color))
        for setting, point in _points_to_label(on_axis, front).items():
            text = setting_label(setting)
            if text:
                at = [(point.kl, point.reward)]
                runs.append(Label(text, at, color, size=6.3, weight="normal", cost=60.0))
    return [*names, *runs]


def _along(front: Sequence[Point]) -> list[tuple[float, float]]:
    """Places along a front for the method's name: its points and those between, the last first."""
    points = [(point.kl, point.reward) for point in front]
    between = [
        (a[0] + (b[0] - a[0]) * part, a[1] + (b[1] - a[1]) * part)
        for a, b in itertools.pairwise(points)
        for part in (0.25, 0.5, 0.75)
    ]
    return [*points[::-1], *between]


def _points_to_label(points: Sequence[Point], front: Sequence[Point]) -> dict[str, Point]:
    """Of each setting its last point on the front; where it has none there, its last checkpoint."""
    labelled = {point.setting: point for point in points}
    return labelled | {point.setting: point for point in front}


def setting_label(setting: str) -> str:
    """A setting as the figure shows it; "" where it tells nothing.

    >>> setting_label("beta=0.1"), setting_label("kl=6"), setting_label("seed=3")
    ('β=0.1', 'target 6', '')
    """
    key, _, value = setting.partition("=")
    return f"{SETTING_NAMES[key]}{value}" if key in SETTING_NAMES and value else ""
