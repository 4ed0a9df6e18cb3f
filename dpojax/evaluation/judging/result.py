"""What a report of win rates holds: the sides that were judged, and what is measured of them.

Whoever has judged fills in `Side`s; `summarise` measures; `report.write` writes.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np

from dpojax.evaluation.judging.bootstrap import RESAMPLES, Measured
from dpojax.evaluation.judging.length_control import length_controlled
from dpojax.evaluation.judging.statistics import (
    Difference,
    Repeatability,
    WinRate,
    difference,
    repeatability,
    win_rate,
)
from dpojax.evaluation.judging.verdicts import Comparison, Judgement, Outcome, Reply

EXAMPLES = 3  # of each side, if there are as many


@dataclass(frozen=True)
class Side:
    """One policy at one setting, judged against the opponent B.

    Attributes:
      policy: its name, as the report is to show it.
      comparisons: each has A's response, the policy's, and B's.
      judgements: one per comparison.
      repeats: replies to questions that were asked again, as `judge_comparisons` returns them.
      temperature: of sampling; None if it is not known (responses from a file).
      best_of: how many responses a reward chose the judged one from.
      cut: share of A's responses that ended at the limit of new tokens; None if it is not known.
    """

    policy: str
    comparisons: Sequence[Comparison]
    judgements: Sequence[Judgement]
    repeats: Sequence[tuple[Reply, Reply]] = ()
    temperature: float | None = None
    best_of: int = 1
    cut: float | None = None

    @property
    def ids(self) -> list[str]:
        """The prompt of each comparison."""
        return [comparison.id for comparison in self.comparisons]

    @property
    def label(self) -> str:
        """Policy and setting in a few words."""
        return label(self.policy, self.temperature, self.best_of)


class Row(NamedTuple):
    """What was measured of one side.

    Attributes:
      length_controlled: win rate at equal lengths; None if it is not known.
      length_a: mean length of A's responses, in the result's unit.
      length_b: of B's.
      repeatability: None if nothing of this side was asked again.
      cut: see `Side`.
    """

    policy: str
    temperature: float | None
    best_of: int
    win_rate: WinRate
    length_controlled: Measured | None
    length_a: float
    length_b: float
    repeatability: Repeatability | None
    cut: float | None = None

    @property
    def label(self) -> str:
        """Policy and setting in a few words."""
        return label(self.policy, self.temperature, self.best_of)


class NamedDifference(NamedTuple):
    """The first side's win rate minus the second's."""

    first: str
    second: str
    difference: Difference


class Example(NamedTuple):
    """One judged comparison, for people to read."""

    side: str
    comparison: Comparison
    judgement: Judgement


@dataclass(frozen=True)
class Result:
    """All that one judge said of several sides against one opponent.

    Attributes:
      judge: the judge's name.
      fingerprint: the judge's fingerprint.
      opponent: B's name, such as "references".
      rows: one per side.
      differences: between sides, paired by prompt.
      examples: a few comparisons of each side.
      template: name and version of the judge's prompt; "" for a judge that reads none.
      is_symmetric: the judge was asked in one order.
      length_unit: of the rows' lengths.
      facts: what else the report is to show, name -> value, such as the prompts' file.
      repeatability: of the judge, over all sides; None if nothing was asked again.
    """

    judge: str
    fingerprint: str
    opponent: str
    rows: Sequence[Row]
    differences: Sequence[NamedDifference] = ()
    examples: Sequence[Example] = ()
    template: str = ""
    is_symmetric: bool = False
    length_unit: str = "characters"
    facts: dict[str, str] = field(default_factory=dict)
    repeatability: Repeatability | None = None


def label(policy: str, temperature: float | None, best_of: int) -> str:
    """Policy and setting in a few words.

    >>> label("DPO", 0.5, best_of=4)
    'DPO, best of 4, temperature 0.5'
    """
    settings = [policy]
    if best_of > 1:
        settings.append(f"best of {best_of}")
    if temperature is not None:
        settings.append(f"temperature {temperature:g}")
    return ", ".join(settings)


def summarise(
    sides: Sequence[Side],
    *,
    judge: str,
    fingerprint: str,
    opponent: str,
    template: str = "",
    is_symmetric: bool = False,
    length: Callable[[str], float] = len,
    length_unit: str = "characters",
    facts: dict[str, str] | None = None,
    repeats: Sequence[tuple[Reply, Reply]] = (),
    resamples: int = RESAMPLES,
    seed: int = 0,
) -> Result:
    """Measure everything that the report shows.

    Args:
      sides: all judged by one judge against one opponent.
      length: of a response, for the length-controlled win rate.
      repeats: of questions that were asked again, beside those of the sides.
      seed: of resamples, and of the choice of examples.
    """
    options = dict(resamples=resamples, seed=seed)
    differences = [
        NamedDifference(a.label, b.label, _difference(a, b, options)) for a, b in _pairs(sides)
    ]
    return Result(
        judge,
        fingerprint,
        opponent,
        rows=[_row(side, is_symmetric, length, options) for side in sides],
        differences=differences,
        examples=[example for side in sides for example in _examples(side, seed)],
        template=template,
        is_symmetric=is_symmetric,
        length_unit=length_unit,
        facts=dict(facts or {}),
        repeatability=repeatability([*repeats, *(pair for side in sides for pair in side.repeats)]),
    )


def _row(side: Side, is_symmetric: bool, length: Callable[[str], float], options: dict) -> Row:
    lengths_a = np.array([length(comparison.a) for comparison in side.comparisons], float)
    lengths_b = np.array([length(comparison.b) for comparison in side.comparisons], float)
    judgements, ids = side.judgements, side.ids
    asked = [comparison.a != comparison.b for comparison in side.comparisons]
    return Row(
        side.policy,
        side.temperature,
        side.best_of,
        win_rate(judgements, ids, is_symmetric=is_symmetric, asked=asked, **options),
        length_controlled(judgements, ids, lengths_a, lengths_b, **options),
        float(lengths_a.mean()) if len(lengths_a) else math.nan,
        float(lengths_b.mean()) if len(lengths_b) else math.nan,
        repeatability(side.repeats),
        side.cut,
    )


def _difference(first: Side, second: Side, options: dict) -> Difference:
    return difference(first.judgements, first.ids, second.judgements, second.ids, **options)


def _pairs(sides: Sequence[Side]) -> list[tuple[Side, Side]]:
    """Sides that differ in policy or best-of alone; and each side with its policy's first one."""
    pairs = [
        (first, second)
        for first, second in itertools.combinations(sides, 2)
        if first.temperature == second.temperature
    ]
    first_of: dict[tuple[str, int], Side] = {}
    for side in sides:
        earliest = first_of.setdefault((side.policy, side.best_of), side)
        if earliest is not side:
            pairs.append((side, earliest))
    return pairs


def _examples(side: Side, seed: int) -> list[Example]:
    """Random comparisons, of other outcomes first: an example of each before two of one."""
    order = np.random.default_rng(seed).permutation(len(side.comparisons))
    seen: dict[Outcome, int] = {}
    ranked = []
    for index in map(int, order):
        outcome = side.judgements[index].outcome
        seen[outcome] = seen.get(outcome, 0) + 1
        ranked.append((seen[outcome], len(ranked), index))
    chosen = [index for _, _, index in sorted(ranked)[:EXAMPLES]]
    return [Example(side.label, side.comparisons[i], side.judgements[i]) for i in chosen]
