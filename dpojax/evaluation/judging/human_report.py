"""The report of how judges agree with humans: `agreement.md`, `agreement.csv` and the figure."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping, Sequence

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, MaxNLocator, NullLocator, PercentFormatter

from dpojax import storage
from dpojax.evaluation.frontier_report import escaped
from dpojax.evaluation.judging import human_study
from dpojax.evaluation.judging.agreement import Agreement
from dpojax.evaluation.judging.bootstrap import Measured
from dpojax.evaluation.judging.cautions import UNKNOWN, percent, share
from dpojax.evaluation.judging.figure import DPI, LINE, label_ends, look_of, short_name
from dpojax.evaluation.judging.human_study import HumanStudy, JudgeStudy
from dpojax.evaluation.judging.verdicts import Outcome
from dpojax.evaluation.plots import GREY, STYLE, TICKS
from dpojax.tables import markdown_table

HUMANS = "another human"
WIDTH, CURVES = 3.7, 2.9  # inches of a panel; least height of the panel over confidence
DODGE = 0.05  # steps of confidence between the marks of two judges

READING = (
    "A judge *decides* a comparison if it prefers the same response in both orders, and it is "
    "*right* if the human chose that response. Accuracy is the share of right ones among all "
    "comparisons: ties, inconsistent and unparsed judgements are not right. Kappa is Cohen's, of "
    "the decided comparisons: 0 is chance and 1 is perfect. A judge that guesses is right in 50 % "
    "of those that it decides, and has a kappa of 0. Comparisons that a human called a tie are "
    "left out. If several humans chose, each comparison counts once. In brackets: 95 % intervals "
    "over prompts."
)


def write(
    folder: str | os.PathLike, study: HumanStudy, facts: Mapping[str, str] | None = None
) -> None:
    """Write `agreement.csv`, `agreement.png`, `agreement.pdf` and, last, `agreement.md`.

    Args:
      facts: what else the report is to show, name -> value, such as the file of human choices.

    Raises:
      ValueError: there is no judge.
    """
    if not study.judges:
        raise ValueError("a report of agreement needs at least one judge")
    folder = storage.as_path(folder)
    human_study.write_csv(study, folder / "agreement.csv")
    draw(study, folder / "agreement.png", folder / "agreement.pdf")
    storage.write_text(folder / "agreement.md", report(study, facts or {}))


def report(study: HumanStudy, facts: Mapping[str, str]) -> str:
    """The report as Markdown."""
    counts = {"comparisons": study.comparisons, "human choices": study.choices}
    if study.humans:
        counts["comparisons with several humans"] = study.humans.comparisons
    about = [[name, str(value)] for name, value in {**facts, **counts}.items()]
    blocks = ["# Judges against human choices", "![Agreement with humans](agreement.png)"]
    blocks += [_markdown(["", "value"], about), table(study), READING]
    if levels := confidence_levels(study):
        blocks += ["## By the humans' confidence", by_confidence(study, levels)]
        blocks += ["Accuracy over all comparisons. The larger the number, the surer the human was."]
    if study.humans:
        blocks += ["## Where several humans chose", among_humans(study)]
        blocks += [
            f"Two humans on the same comparison, {study.humans.pairs} pairs in all; each "
            "comparison counts once. A judge that always says what most humans say agrees with one "
            "of them more often than they agree with each other."
        ]
    return "\n\n".join(blocks) + "\n"


def table(study: HumanStudy) -> str:
    """One line per judge, over all comparisons."""
    heading = ["judge", "accuracy", "accuracy where decided", "kappa", "right", "wrong"]
    undecided = [Outcome.TIE, Outcome.INCONSISTENT, Outcome.UNPARSED]
    lines = []
    for judge in study.judges:
        each = judge.agreement
        counts = [each.right, each.wrong, *(each.undecided[outcome] for outcome in undecided)]
        shares = [share(count / each.choices) if each.choices else UNKNOWN for count in counts]
        lines.append([judge.name, *_measured(each), *shares, str(each.choices), str(each.prompts)])
    heading += [outcome.value for outcome in undecided] + ["choices", "prompts"]
    return _markdown(heading, lines)


def by_confidence(study: HumanStudy, levels: Sequence[float]) -> str:
    """One line per judge, a column for each level of confidence."""
    lines = [
        [judge.name, *(percent(_accuracy(judge, level)) for level in levels)]
        for judge in study.judges
    ]
    return _markdown(["judge", *(f"confidence {level:g}" for level in levels)], lines)


def among_humans(study: HumanStudy) -> str:
    """Humans on each other, and judges on the same comparisons."""
    lines = [
        [judge.name, *_measured(judge.by_several)] for judge in study.judges if judge.by_several
    ]
    same = percent(study.humans.agreement)
    lines.append([HUMANS, same, same, _kappa(study.humans.kappa)])
    return _markdown(["", "accuracy", "accuracy where decided", "kappa"], lines)


def confidence_levels(study: HumanStudy) -> list[float]:
    """All levels of confidence, rising."""
    return sorted({level for judge in study.judges for level in judge.by_confidence})


def draw(study: HumanStudy, *paths: str | os.PathLike) -> None:
    """Write `figure` to each path (png, pdf or svg by its suffix), all or nothing."""
    drawn = figure(study)
    for path in map(storage.as_path, paths):
        dated = {"CreationDate": None} if path.suffix == ".pdf" else None
        with storage.replacing(path) as unfinished, matplotlib.rc_context(STYLE):
            drawn.savefig(unfinished, metadata=dated)


def figure(study: HumanStudy) -> Figure:
    """Draw the accuracy of each judge, and on the right by the humans' confidence, if known.

    Judges stand in the order of their accuracy. Bars are 95 % intervals. The dashed line is
    guessing; the grey band is a human on another one.
    """
    judges = sorted(study.judges, key=_overall, reverse=True)
    levels = confidence_levels(study)
    columns = 2 if len(levels) > 1 else 1
    height = 0.85 + LINE * (len(judges) + 1)
    with matplotlib.rc_context(STYLE):
        size = columns * WIDTH + 1.2, max(height, CURVES if columns == 2 else 0)
        drawn = Figure(size, dpi=DPI, layout="constrained")
        _overall_panel(drawn.add_subplot(1, columns, 1), judges, study)
        if columns == 2:
            _confidence_panel(drawn.add_subplot(1, columns, 2), judges, levels)
        drawn.get_layout_engine().set(w_pad=0.07, h_pad=0.06)
    return drawn


def _overall_panel(axes: Axes, judges: Sequence[JudgeStudy], study: HumanStudy) -> None:
    names = [short_name(judge.name) for judge in judges]
    if study.humans:
        same = study.humans.agreement
        axes.axvspan(same.low, same.high, color="#EAEAEA", lw=0, zorder=0)
        names.append(HUMANS)
        _bar(axes, same, len(judges), GREY, "o")
    for index, judge in enumerate(judges):
        _bar(axes, judge.agreement.accuracy, index, *look_of(index))
    axes.axvline(0.5, color=GREY, lw=1, ls=(0, (4, 3)), zorder=1.5)
    axes.set_yticks(range(len(names)), names)
    axes.set_ylim(len(names) - 0.5, -0.75)
    axes.grid(visible=False, axis="y")
    axes.tick_params(axis="y", length=0)
    axes.margins(x=0.06)
    axes.xaxis.set_major_locator(MaxNLocator(5, steps=TICKS))
    axes.xaxis.set_major_formatter(PercentFormatter(1, decimals=0))
    axes.set_xlabel("accuracy against human choices")


def _bar(axes: Axes, measured: Measured, place: float, color: str, mark: str) -> None:
    value, low, high = measured
    if math.isfinite(value):
        axes.errorbar(
            value, place, xerr=[[value - low], [high - value]], fmt=mark, ms=5.5, mec="white",
            mew=0.6, color=color, elinewidth=1.4, capsize=2.5, zorder=3,
        )  # fmt: skip


def _confidence_panel(axes: Axes, judges: Sequence[JudgeStudy], levels: Sequence[float]) -> None:
    ends = []
    for index, judge in enumerate(judges):
        color, mark = look_of(index)
        known = [
            (place, *_accuracy(judge, level))
            for place, level in enumerate(levels)
            if _accuracy(judge, level) and math.isfinite(_accuracy(judge, level).value)
        ]
        if not known:
            continue
        x, value, low, high = np.array(known).T
        shift = DODGE * (index - (len(judges) - 1) / 2)  # bars do not hide each other
        axes.errorbar(
            x + shift, value, (value - low, high - value), fmt=f"{mark}-", color=color, ms=5,
            mec="white", mew=0.6, lw=1.6, elinewidth=1, capsize=2, zorder=3,
        )  # fmt: skip
        ends.append((value[-1], short_name(judge.name), color))
    axes.axhline(0.5, color=GREY, lw=1, ls=(0, (4, 3)), zorder=1.5)
    axes.xaxis.set_major_locator(FixedLocator(range(len(levels))))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.set_xticklabels([f"{level:g}" for level in levels])
    axes.set_xlabel("the human's confidence")
    axes.yaxis.set_major_locator(MaxNLocator(6, steps=TICKS))
    axes.yaxis.set_major_formatter(PercentFormatter(1, decimals=0))
    axes.set_ylabel("accuracy")
    label_ends(axes, ends)


def _overall(judge: JudgeStudy) -> float:
    value = judge.agreement.accuracy.value
    return value if math.isfinite(value) else -math.inf


def _accuracy(judge: JudgeStudy, level: float) -> Measured | None:
    each = judge.by_confidence.get(level)
    return each.accuracy if each else None


def _measured(each: Agreement) -> list[str]:
    return [percent(each.accuracy), percent(each.decided_accuracy), _kappa(each.kappa)]


def _kappa(measured: Measured) -> str:
    if not math.isfinite(measured.value):
        return UNKNOWN
    return f"{measured.value:.2f} ({measured.low:.2f} to {measured.high:.2f})"


def _markdown(heading: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    return "\n".join(markdown_table(heading, [[escaped(cell) for cell in row] for row in rows]))
