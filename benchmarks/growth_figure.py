"""The figure of benchmarks/growth.py: points as measured, and what the mathematics gives."""

from __future__ import annotations

import pathlib
from collections.abc import Sequence
from typing import NamedTuple

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FuncFormatter, MaxNLocator
from scipy.interpolate import PchipInterpolator

from benchmarks.growth_laws import MIB, Curve, Record, instead, sent_bytes
from dpojax.evaluation.plots import BLUE, GREEN, GREY, PURPLE, STYLE, TICKS, VERMILLION

SIZE = (10.4, 7.6)  # inches
# Hollow and larger where another mark lies at the same place.
MARKS = {
    "data": {"color": BLUE, "marker": "o", "ms": 4, "mew": 0.5, "mec": "white"},
    "fsdp": {"color": VERMILLION, "marker": "s", "ms": 8, "mew": 1.2, "mfc": "none"},
    "tensor": {"color": GREEN, "marker": "^", "ms": 4.5, "mew": 0.5, "mec": "white"},
    "sweep": {"color": PURPLE, "marker": "D", "ms": 7, "mew": 1.2, "mfc": "none"},
}


class Panel(NamedTuple):
    study: str
    quantity: str
    title: str
    unit: str
    scale: float
    below: str  # the x axis


ABOUT = {
    "tokens": ("Tokens per row", "tokens per row T (4,096 in all)"),
    "vocabulary": ("Vocabulary", "vocabulary V, thousands"),
    "responses": ("Responses", "responses per prompt K"),
    "members": ("Members of a sweep", "members on one device"),
}
PANELS = (
    *(Panel(s, "seconds", title, "s per step", 1, below) for s, (title, below) in ABOUT.items()),
    *(
        Panel(s, "temporary", title, "temporary MiB", 1 / MIB, below)
        for s, (title, below) in ABOUT.items()
    ),
    Panel("devices", "collective bytes", "Communication", "MiB in collectives", 1 / MIB, "devices"),
    Panel(
        "chunks",
        "collective bytes",
        "With the head in chunks",
        "MiB in collectives, 4 devices",
        1 / MIB,
        "vocabulary V, thousands",
    ),
    *(
        Panel("devices", quantity, title, unit, scale, "devices")
        for quantity, title, unit, scale in (
            ("arguments", "Arguments", "MiB per device", 1 / MIB),
            ("temporary", "Temporaries", "MiB per device", 1 / MIB),
        )
    ),
)


def draw(curves: Sequence[Curve], records: Sequence[Record], path: pathlib.Path) -> None:
    """All studies in three rows of panels: time, memory, devices; all or nothing."""
    with matplotlib.rc_context(STYLE):
        figure = Figure(SIZE, dpi=160, layout="constrained")
        for i, (axes, panel) in enumerate(zip(figure.subplots(3, 4).flat, PANELS)):
            drawn = [c for c in curves if (c.study, c.quantity) == (panel.study, panel.quantity)]
            points = [record for record in records if record["study"] == panel.study]
            if panel.study == "devices":
                _draw_devices(axes, panel, drawn, points)
            else:
                _draw(axes, panel, drawn[0], points)
            axes.set_title("" if 4 <= i < 8 else panel.title)
            axes.set_xlabel("" if i < 4 else panel.below)
            axes.set_ylabel(panel.unit)
            axes.set_ylim(bottom=0)
            axes.yaxis.set_major_locator(MaxNLocator(5, steps=TICKS))
        _legend(figure)
        figure.get_layout_engine().set(w_pad=0.06, h_pad=0.08)
        temporary = path.with_name(f".{path.stem}.tmp{path.suffix}")
        try:
            figure.savefig(temporary)
            temporary.replace(path)
        finally:
            temporary.unlink(missing_ok=True)


def _draw(axes: Axes, panel: Panel, curve: Curve, records: Sequence[Record]) -> None:
    scale = panel.scale
    bent = (panel.study, panel.quantity) == ("vocabulary", "temporary")  # where the cap is reached
    expected = [sent_bytes(r) for r in records] if panel.study == "chunks" else curve.expected
    line = (curve.x, scale * np.array(expected))
    axes.plot(*(line if bent else _smooth(*line)), "-", color=GREY, lw=1.3)
    top = scale * 1.12 * max(curve.measured.max(), curve.expected.max())
    other = instead(curve, records)
    if other is not None:
        dashed = {"color": VERMILLION, "lw": 1.2, "ls": (0, (4, 3))}
        axes.plot(*_smooth(curve.x, scale * other.values), **dashed)
        _name(axes, curve.x, scale * other.values, top, other.name)
    axes.plot(curve.x, scale * curve.measured, "o", color=BLUE, ms=5, mec="white", mew=0.6)
    axes.set_ylim(0, top)
    axes.set_xlim(0, 1.05 * curve.x[-1])
    axes.set_xticks(curve.x[-3:] if len(curve.x) > 4 else curve.x)
    if panel.study in ("vocabulary", "chunks"):
        axes.xaxis.set_major_formatter(FuncFormatter(_thousands))


def _thousands(x: float, _: int) -> str:
    return f"{x / 1024:.0f}"


def _smooth(x: np.ndarray, y: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """A line through the points that adds no bump."""
    grid = np.linspace(x[0], x[-1], 300)
    return grid, PchipInterpolator(x, y)(grid) if len(x) > 2 else np.interp(grid, x, y)


def _name(axes: Axes, x: np.ndarray, y: np.ndarray, top: float, name: str) -> None:
    """Write at the line, beside where it leaves the panel, on the wider side."""
    grid, line = _smooth(x, y)
    at = grid[line < 0.84 * top][-1]
    left = at > 0.45 * x[-1]
    axes.annotate(
        name,
        (at, min(0.84 * top, line[-1])),
        (-6 if left else 9, 0),
        textcoords="offset points",
        ha="right" if left else "left",
        va="center",
        color=VERMILLION,
        linespacing=1.05,
    )


def _draw_devices(axes: Axes, panel: Panel, curves: Sequence[Curve], records: Sequence[Record]):
    """A mark for every mesh; lines are the laws, in communication the closed forms themselves."""
    for curve in curves:
        mark = MARKS[curve.mesh]
        line = curve.expected
        if panel.quantity == "collective bytes":
            line = np.array([sent_bytes(r) for r in records if r["mesh"] == curve.mesh])
            line = line[-len(curve.x) :]
        at, height = _smooth(np.log2(curve.x), panel.scale * line)
        axes.plot(2**at, height, "-", color=mark["color"], lw=1.1, alpha=0.75)
        axes.plot(curve.x, panel.scale * curve.measured, ls="", zorder=3, clip_on=False, **mark)
    axes.set_xscale("log", base=2)
    axes.set_xticks([1, 2, 4, 8], ["1", "2", "4", "8"])
    axes.set_xlim(0.85, 9.5)
    axes.margins(y=0.12)


def _legend(figure: Figure) -> None:
    entries = {
        "measured": Line2D([], [], color=BLUE, marker="o", ls="", ms=5),
        "what the mathematics gives": Line2D([], [], color=GREY, lw=1.3),
        "what another way would take": Line2D([], [], color=VERMILLION, lw=1.2, ls=(0, (4, 3))),
    }
    for name, mark in MARKS.items():
        entries[name] = Line2D([], [], lw=1.1, **mark)
    figure.legend(
        entries.values(), entries.keys(), loc="outside lower center", ncols=7, frameon=False
    )
