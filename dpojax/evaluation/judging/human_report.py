"""The report of how judges agree with humans: `agreement.md`, `agreement.csv` and the figure."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping, Sequence

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, NullLocator

from dpojax import storage
from dpojax.evaluation import plots
from dpojax.evaluation.judging import human_study
from dpojax.evaluation.judging.agreement import Agreement
from dpojax.evaluation.judging.bootstrap import Measured
from dpojax.evaluation.judging.cautions import NOT_KNOWN, percent, share
from dpojax.evaluation.judging.figure import (
    DPI,
    LINE,
    draw_curves,
    draw_dot,
    look_of,
    name_dots,
    series_of,
    short_name,
)
from dpojax.evaluation.judging.human_study import (
    HUMANS,
    HumanStudy,
    JudgeStudy,
    confidence_levels,
)
from dpojax.evaluation.judging.verdicts import Outcome
from dpojax.evaluation.markdown import escaped_table
from dpojax.evaluation.plots import GREY, STYLE

WIDTH, CURVES = 3.7, 2.9  # inches of a panel; least height of the panel over confidence

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
    blocks += [escaped_table(["", "value"], about), table(study), READING]
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
        shares = [share(count / each.choices) if each.choices else NOT_KNOWN for count in counts]
        lines.append([judge.name, *_measured(each), *shares, str(each.choices), str(each.prompts)])
    heading += [outcome.value for outcome in undecided] + ["choices", "prompts"]
    return escaped_table(heading, lines)


def by_confidence(study: HumanStudy, levels: Sequence[float]) -> str:
    """One line per judge, a column for each level of confidence."""
    lines = [
        [judge.name, *(percent(judge.by_confidence[level].accuracy) for level in levels)]
        for judge in study.judges
    ]
    return escaped_table(["judge", *(f"confidence {level:g}" for level in levels)], lines)


def among_humans(study: HumanStudy) -> str:
    """Humans on each other, and judges on the same comparisons."""
    lines = [
        [judge.name, *_measured(judge.by_several)] for judge in study.judges if judge.by_several
    ]
    same = percent(study.humans.agreement)
    lines.append([HUMANS, same, same, _kappa(study.humans.kappa)])
    return escaped_table(["", "accuracy", "accuracy where decided", "kappa"], lines)


def draw(study: HumanStudy, *paths: str | os.PathLike) -> None:
    """Write `figure` to each path, see `plots.save`."""
    plots.save(figure(study), *paths)


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
        draw_dot(axes, same, len(judges), GREY, "o")
    for index, judge in enumerate(judges):
        if math.isfinite(judge.agreement.accuracy.value):
            draw_dot(axes, judge.agreement.accuracy, index, *look_of(index))
    name_dots(axes, names)
    axes.set_xlabel("accuracy against human choices")


def _confidence_panel(axes: Axes, judges: Sequence[JudgeStudy], levels: Sequence[float]) -> None:
    """Draw a line for each judge. A level at which humans called all a tie has no points."""
    points = {
        short_name(judge.name): [
            (place, *judge.by_confidence[level].accuracy)
            for place, level in enumerate(levels)
            if math.isfinite(judge.by_confidence[level].accuracy.value)
        ]
        for judge in judges
    }
    draw_curves(axes, series_of(points))
    axes.xaxis.set_major_locator(FixedLocator(range(len(levels))))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.set_xticklabels([f"{level:g}" for level in levels])
    axes.set_xlabel("the human's confidence")
    axes.set_ylabel("accuracy")


def _overall(judge: JudgeStudy) -> float:
    value = judge.agreement.accuracy.value
    return value if math.isfinite(value) else -math.inf


def _measured(each: Agreement) -> list[str]:
    return [percent(each.accuracy), percent(each.decided_accuracy), _kappa(each.kappa)]


def _kappa(measured: Measured) -> str:
    if not math.isfinite(measured.value):
        return NOT_KNOWN
    return f"{measured.value:.2f} ({measured.low:.2f} to {measured.high:.2f})"
