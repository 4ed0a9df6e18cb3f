"""Judges against human choices, beside humans against each other: the numbers, a table, a CSV."""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Sequence
from typing import NamedTuple

from dpojax import storage
from dpojax.evaluation.judging import agreement
from dpojax.evaluation.judging.agreement import Agreement, HumanAgreement
from dpojax.evaluation.judging.asking import Judged, judge_comparisons
from dpojax.evaluation.judging.bootstrap import RESAMPLES, Measured
from dpojax.evaluation.judging.cache import VerdictCache
from dpojax.evaluation.judging.humans import HumanComparison
from dpojax.evaluation.judging.judge import Judge
from dpojax.evaluation.judging.verdicts import Outcome
from dpojax.storage.paths import PathLike
from dpojax.tables import blocks_table, terminal_width

HUMANS = "another human"
SEVERAL = "several humans"
UNDECIDED = ["tie", "inconsistent", "unparsed"]
COLUMNS = ["judge", "part", "accuracy", "accuracy_low", "accuracy_high"]
COLUMNS += [f"decided_accuracy{end}" for end in ("", "_low", "_high")]
COLUMNS += ["kappa", "kappa_low", "kappa_high", "right", "wrong", *UNDECIDED, "prompts"]


class JudgeStudy(NamedTuple):
    """How one judge agrees with humans.

    Attributes:
      name: of the judge.
      agreement: over all comparisons.
      by_confidence: over those on which the humans were that sure; {} where the file does not tell.
      by_several: over those on which several humans chose, beside humans on each other;
        None where there are none.
      judged: its judgements, one for each comparison.
    """

    name: str
    agreement: Agreement
    by_several: Agreement | None
    by_confidence: dict[float, Agreement]
    judged: Judged


class HumanStudy(NamedTuple):
    """How judges agree with humans, and humans with each other.

    Attributes:
      judges: in the order in which they were asked.
      humans: None where no comparison has the choices of two humans.
      comparisons, choices: how many there are; a comparison may have several choices.
    """

    judges: list[JudgeStudy]
    humans: HumanAgreement | None
    comparisons: int
    choices: int


def human_agreement(
    judges: Sequence[Judge],
    comparisons: Sequence[HumanComparison],
    *,
    cache: VerdictCache | None = None,
    max_cost: float | None = None,
    resamples: int = RESAMPLES,
    seed: int = 0,
) -> HumanStudy:
    """Ask judges about comparisons that humans have made, and hold their choices against those.

    Args:
      judges: are asked one after the other.
      comparisons: of `humans.read_humans`.
      cache: holds replies of earlier calls, and gets the new ones.
      max_cost: of each judge, see `judge_comparisons`.
      resamples, seed: of the intervals, which are over prompts.

    Raises:
      JudgeError: see `judge_comparisons`.
    """
    choices = [(i, choice) for i, each in enumerate(comparisons) for choice in each.choices]
    places, humans = [i for i, _ in choices], [choice.choice for _, choice in choices]
    ids = [comparisons[i].comparison.id for i in places]
    confidence = [choice.confidence for _, choice in choices]
    several = [True if len(comparisons[i].choices) > 1 else None for i in places]
    options = {"resamples": resamples, "seed": seed}
    studies, questions = [], [each.comparison for each in comparisons]
    for judge in judges:
        judged = judge_comparisons(judge, questions, cache=cache, max_cost=max_cost, repeat=0.0)
        judgements = [judged.judgements[i] for i in places]
        rows = judgements, humans, ids
        studies.append(
            JudgeStudy(
                judge.name,
                agreement.agreement(*rows, places, **options),
                agreement.by_bucket(*rows, several, places, **options).get(True),
                agreement.by_bucket(*rows, confidence, places, **options),
                judged,
            )
        )
    among = agreement.human_agreement(humans, ids, places, **options)
    return HumanStudy(studies, among, len(comparisons), len(choices))


def table(study: HumanStudy) -> list[str]:
    """Lines of a table of all judges, and of one by the humans' confidence, for a terminal.

    Where the terminal is too narrow, they are in blocks of columns.
    """
    width = terminal_width()
    rows = [["judge", "accuracy", "kappa", "decided", "several humans"]]
    for judge in study.judges:
        each, several = judge.agreement, judge.by_several
        decided = (each.right + each.wrong) / max(1, each.choices)
        numbers = [_shown(each.accuracy), _shown(each.kappa)]
        last = "-" if several is None else _shown(several.accuracy)
        rows.append([judge.name, *numbers, f"{decided:.0%}", last])
    if study.humans is not None:
        same = _shown(study.humans.agreement)
        rows.append([HUMANS, "-", _shown(study.humans.kappa), "100%", same])
    counts = f"{study.choices} human choices on {study.comparisons} comparisons"
    if study.humans is not None:
        counts += f", {study.humans.comparisons} of them with several humans"
    lines = [f"{counts}; 95 % intervals over prompts", *blocks_table(rows, width)]
    if levels := confidence_levels(study):
        rows = [["accuracy by confidence", *(f"{level:g}" for level in levels)]]
        for judge in study.judges:
            values = [judge.by_confidence[level].accuracy.value for level in levels]
            rows.append([judge.name, *(f"{x:.2f}" if math.isfinite(x) else "-" for x in values)])
        lines += ["", *blocks_table(rows, width)]
    return lines


def confidence_levels(study: HumanStudy) -> list[float]:
    """All levels of confidence, rising. Every judge has the same ones."""
    return sorted({level for judge in study.judges for level in judge.by_confidence})


def write_csv(study: HumanStudy, path: PathLike) -> None:
    """Write all numbers, one row for each judge and each of the parts of the comparisons.

    The column `part` is "all", "several humans", or "confidence N".
    """
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(COLUMNS)
    for judge in study.judges:
        parts = {"all": judge.agreement, SEVERAL: judge.by_several}
        parts |= {f"confidence {level:g}": each for level, each in judge.by_confidence.items()}
        for part, each in parts.items():
            if each is not None:
                undecided = [each.undecided[Outcome(name)] for name in UNDECIDED]
                counts = [each.right, each.wrong, *undecided, each.prompts]
                measured = (*each.accuracy, *each.decided_accuracy, *each.kappa)
                writer.writerow([judge.name, part, *map(_number, measured), *counts])
    if humans := study.humans:
        measured = (*humans.agreement, *humans.agreement, *humans.kappa)
        writer.writerow([HUMANS, SEVERAL, *map(_number, measured), *[""] * 6])
    storage.write_text(path, text.getvalue())


def _shown(measured: Measured) -> str:
    if math.isnan(measured.value):
        return "n/a"
    return f"{measured.value:.3f} [{measured.low:.3f}, {measured.high:.3f}]"


def _number(value: float) -> str:
    return "" if math.isnan(value) else f"{value:.6g}"
