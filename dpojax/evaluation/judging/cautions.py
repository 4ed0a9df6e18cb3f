"""What a reader of win rates has to know before believing them."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import NamedTuple

from dpojax.evaluation.judging.bootstrap import Measured
from dpojax.evaluation.judging.result import Result, Row
from dpojax.evaluation.judging.statistics import Difference, Repeatability, WinRate
from dpojax.evaluation.judging.verdicts import Outcome
from dpojax.evaluation.markdown import escaped

FEW_PROMPTS = 100
MANY_FLIPS = 0.2
MANY_UNPARSED = 0.05
MANY_CUT = 0.05
UNREPEATABLE = 0.9
UNEQUAL_LENGTHS = 1.25  # ratio of mean lengths
NAMED = 4  # sides that a sentence names; of more it names the worst one
NOT_KNOWN = "n/a"


class Caution(NamedTuple):
    """Something that holds for one side.

    Attributes:
      sentence: what it is; the same for all sides.
      detail: a number of this side; "" if there is none.
      severity: how bad it is, to be compared with other sides.
    """

    sentence: str
    detail: str
    severity: float


def cautions(result: Result) -> list[str]:
    """What to be careful with, one sentence of Markdown for each kind."""
    sentences = []
    again = result.repeatability
    if again and again.value < UNREPEATABLE:
        sentences.append(
            "Asked the same question again, the judge often makes another choice: it made the same "
            f"one in {percent(again)} of {again.asked} questions."
        )
    sides_of: dict[str, list[tuple[Caution, str]]] = {}
    for row in result.rows:
        for caution in _of_side(row):
            name = escaped(row.label) + (f": {caution.detail}" if caution.detail else "")
            sides_of.setdefault(caution.sentence, []).append((caution, name))
    return sentences + [f"{text} {_list(sides)}" for text, sides in sides_of.items()]


def _list(sides: list[tuple[Caution, str]]) -> str:
    if len(sides) <= NAMED:
        return f"({'; '.join(name for _, name in sides)})"
    _, worst = max(sides, key=lambda side: side[0].severity)
    return f"({len(sides)} sides, such as {worst})"


def _of_side(row: Row) -> Iterator[Caution]:
    rate = row.win_rate
    bias, unparsed, flips = rate.position_bias, rate.share(Outcome.UNPARSED), rate.flip_rate
    if rate.prompts < FEW_PROMPTS:
        yield Caution("Few prompts have a score.", str(rate.prompts), -rate.prompts)
    if unparsed > MANY_UNPARSED:
        yield Caution(
            f"More than {100 * MANY_UNPARSED:g} % of the comparisons have a reply that could not "
            "be read, and no score. The win rate is that of the others.",
            f"{share(unparsed)}, {rate.prompts_left_out} prompts without a score",
            unparsed,
        )
    if flips.value > MANY_FLIPS:
        yield Caution(
            "The judge often contradicts itself when the order changes. Such a comparison counts "
            "1/2, which draws the win rate to 50 %.",
            percent(flips),
            flips.value,
        )
    for is_biased, position in ((bias.low > 0, "first"), (bias.high < 0, "second")):
        if is_biased:
            yield Caution(
                f"The judge favours the response that it reads {position}. Both orders were asked: "
                "this draws the win rate to 50 %, but favours neither side.",
                f"{percent(bias, sign=True)} points",
                abs(bias.value),
            )
    yield from _of_lengths(row)


def _of_lengths(row: Row) -> Iterator[Caution]:
    rate, controlled = row.win_rate, row.length_controlled
    if row.cut is not None and row.cut > MANY_CUT:
        yield Caution(
            "Many responses were cut at the limit of new tokens.", share(row.cut), row.cut
        )
    if not math.isfinite(rate.value):
        return
    if controlled is None:
        yield Caution(
            "The win rate at equal lengths is not known: A is nearly always the longer or the "
            "shorter one, lengths alone say who wins, or one side always wins.",
            "",
            0.0,
        )
    elif (rate.value - 0.5) * (controlled.value - 0.5) < 0:
        yield Caution(
            "Which side is better changes when lengths are taken into account.",
            f"{percent(controlled)} at equal lengths",
            abs(controlled.value - rate.value),
        )
    longer = row.length_a / max(1e-9, row.length_b)
    uneven = max(longer, 1 / max(1e-9, longer))
    if uneven > UNEQUAL_LENGTHS:
        yield Caution("A and B differ much in length.", f"A is {longer:.2f} times as long", uneven)


def percent(
    measured: Measured | WinRate | Difference | Repeatability | None, *, sign: bool = False
) -> str:
    """A share with its interval, in percent; a signed one without the unit.

    >>> percent(Measured(0.613, 0.582, 0.644)), percent(Measured(0.1, -0.05, 0.25), sign=True)
    ('61.3 % (58.2 to 64.4)', '+10.0 (-5.0 to +25.0)')
    """
    if measured is None or not math.isfinite(measured.value):
        return NOT_KNOWN
    ends = measured.value, measured.low, measured.high
    if sign:
        value, low, high = (f"{100 * x:+.1f}" for x in ends)
        return f"{value} ({low} to {high})"
    value, low, high = (f"{100 * x:.1f}" for x in ends)
    return f"{value} % ({low} to {high})"


def share(value: float) -> str:
    """A share in percent, without an interval."""
    return f"{100 * value:.1f} %" if math.isfinite(value) else NOT_KNOWN
