"""The report of win rates: `report.md`, `samples.md`, tables as CSV, and the figure.

Every sentence is computed from the result. Percentages stand with the ends of their 95 % interval.
"""

from __future__ import annotations

import csv
import io
import math
import os
from collections.abc import Iterable, Mapping, Sequence

from dpojax import storage
from dpojax.evaluation.judging import figure
from dpojax.evaluation.judging.cautions import NOT_KNOWN, cautions, percent, share
from dpojax.evaluation.judging.result import NamedDifference, Result, Row
from dpojax.evaluation.judging.verdicts import Judgement, Outcome, Reply
from dpojax.evaluation.markdown import escaped, escaped_table

MANY_DIFFERENCES = 24  # lines of the table
LONGEST_SAMPLE = 1500  # characters of each text in samples.md
READING = (
    "Each comparison was judged in both orders. Its score is the mean over the two orders of 1 "
    "where A, the policy, is preferred, 1/2 for a tie and 0 where B is. The win rate is the mean "
    "score; every prompt counts the same. *Inconsistent*: the judge contradicts itself when the "
    "order changes. *Unparsed*: a reply could not be read, and the comparison has no score. "
    "*Position bias*: how much more often the judge chooses the first response than the second. "
    "*Flip rate*: share of inconsistent ones among those that could be read. *Repeatability*: "
    "share of questions with the same choice when they are asked again. In brackets: 95 % "
    "intervals over prompts. `docs/judging.md` of dpojax defines every number."
)
SYMMETRIC = (
    "The judge does not see an order, so that it has no position bias and no flip rate. "
    "A comparison's score is 1 where A, the policy, is preferred, 1/2 for a tie and 0 where B is. "
    "The win rate is the mean score; every prompt counts the same. In brackets: 95 % intervals "
    "over prompts. `docs/judging.md` of dpojax defines every number."
)


def write(folder: str | os.PathLike, *results: Result) -> None:
    """Write the report of one judge or several into a folder; `report.md` comes last.

    Makes `win_rates.csv`, `differences.csv`, `samples.md`, `win_rates.png`, `win_rates.pdf` and
    `report.md`.

    Raises:
      ValueError: there is no result, or no side was judged.
    """
    if not any(result.rows for result in results):
        raise ValueError("a report needs at least one side that was judged")
    folder = storage.as_path(folder)
    storage.write_text(folder / "win_rates.csv", win_rates_csv(results))
    storage.write_text(folder / "differences.csv", differences_csv(results))
    storage.write_text(folder / "samples.md", samples(results))
    figure.draw(results, folder / "win_rates.png", folder / "win_rates.pdf")
    storage.write_text(folder / "report.md", report(results))


def report(results: Sequence[Result]) -> str:
    """The report as Markdown."""
    opponents = " and ".join(dict.fromkeys(escaped(result.opponent) for result in results))
    blocks = [f"# Win rates against {opponents}"]
    blocks += [f"![Win rates against {opponents}](win_rates.png)"]
    for result in results:
        title = "Win rates" if len(results) == 1 else f"Judge: {escaped(result.judge)}"
        blocks += [f"## {title}", _about(result), table(result)]
        blocks += [SYMMETRIC if result.is_symmetric else READING]
        if doubts := cautions(result):
            blocks += ["### To be careful with", "\n".join(f"* {doubt}" for doubt in doubts)]
        if result.differences:
            blocks += ["### Paired differences", differences(result), _about_differences(result)]
        blocks += ["### The judge and the responses", details(result)]
    blocks += ["Some of the judged responses are in [samples.md](samples.md)."]
    return "\n\n".join(blocks) + "\n"


def table(result: Result) -> str:
    """One line per side: its win rate and how often each outcome came."""
    outcomes = [Outcome.WIN, Outcome.TIE, Outcome.LOSS, Outcome.INCONSISTENT, Outcome.UNPARSED]
    if result.is_symmetric:
        outcomes.remove(Outcome.INCONSISTENT)
    columns = _setting_columns(result.rows)
    columns["win rate"] = [percent(row.win_rate) for row in result.rows]
    columns["at equal lengths"] = [percent(row.length_controlled) for row in result.rows]
    for outcome in outcomes:
        columns[outcome.value] = [share(row.win_rate.share(outcome)) for row in result.rows]
    columns["comparisons"] = [str(row.win_rate.comparisons) for row in result.rows]
    columns["prompts"] = [str(row.win_rate.prompts) for row in result.rows]
    return _table_of(columns)


def details(result: Result) -> str:
    """One line per side: what the two orders say of the judge, and the responses' lengths."""
    columns = _setting_columns(result.rows)
    if not result.is_symmetric:
        columns["position bias, points"] = [
            percent(row.win_rate.position_bias, sign=True) for row in result.rows
        ]
        columns["flip rate"] = [percent(row.win_rate.flip_rate) for row in result.rows]
    columns["repeatability"] = [
        percent(row.repeatability) if row.repeatability else "" for row in result.rows
    ]
    columns["length of A"] = [_length(row.length_a) for row in result.rows]
    columns["length of B"] = [_length(row.length_b) for row in result.rows]
    columns["cut"] = ["" if row.cut is None else share(row.cut) for row in result.rows]
    return _table_of(columns)


def _setting_columns(rows: Sequence[Row]) -> dict[str, list[str]]:
    return {
        "policy": [row.policy for row in rows],
        "temperature": [_number(row.temperature) for row in rows],
        "best of": [_number(row.best_of) if row.best_of > 1 else "" for row in rows],
    }


def _table_of(columns: Mapping[str, Sequence[str]]) -> str:
    """A table without the columns that are empty."""
    used = {name: cells for name, cells in columns.items() if any(cells)}
    return escaped_table(list(used), list(zip(*used.values())))


def differences(result: Result) -> str:
    """A line for each pair of sides, or for those with the first policy if they are many."""
    lines = []
    for first, second, gap in _shown_differences(result):
        says = "higher" if gap.low > 0 else "lower" if gap.high < 0 else "not settled"
        lines.append([first, second, percent(gap, sign=True), str(gap.prompts), says])
    heading = ["win rate of", "minus that of", "difference, points", "prompts", "the first is"]
    return escaped_table(heading, lines)


def _shown_differences(result: Result) -> list[NamedDifference]:
    if len(result.differences) <= MANY_DIFFERENCES:
        return list(result.differences)
    policy = result.rows[0].policy
    labels = {row.label for row in result.rows if row.policy == policy}
    return [gap for gap in result.differences if labels & {gap.first, gap.second}]


def _about_differences(result: Result) -> str:
    count, shown = len(result.differences), len(_shown_differences(result))
    rest = "" if shown == count else f" All {count} of them are in differences.csv."
    several = f" The intervals are not corrected for there being {count} of them."
    return (
        "Differences are in percentage points, paired by prompt: both sides answered the same "
        "prompts and met the same B. A side is called higher or lower if the 95 % interval does "
        f"not contain 0.{several if count > 1 else ''}{rest}"
    )


def _about(result: Result) -> str:
    facts = {"judge": result.judge, "fingerprint": result.fingerprint}
    if result.template:
        facts["template"] = result.template
    if result.repeatability:
        again = f"{percent(result.repeatability)} of {result.repeatability.asked} questions"
        facts["repeatability"] = again
    facts |= {"B": result.opponent, "unit of lengths": result.length_unit, **result.facts}
    return escaped_table(["", "value"], [[name, str(value)] for name, value in facts.items()])


def samples(results: Sequence[Result]) -> str:
    """Judged comparisons for people to read, as Markdown."""
    blocks = ["# Some of the judged responses"]
    for result in results:
        blocks.append(f"## Judge: {escaped(result.judge)}")
        for side, comparison, judgement in result.examples:
            blocks += [f"### {escaped(side)}: {judgement.outcome.value}", _verdict(judgement)]
            texts = {"Prompt": comparison.prompt, "A": comparison.a, "B": comparison.b}
            blocks += [f"**{name}**\n\n{_quoted(text)}" for name, text in texts.items()]
            replies = {"A stands first": judgement.a_first, "B stands first": judgement.b_first}
            blocks += [
                f"**The judge, where {name}**\n\n{_quoted(reply.text)}"
                for name, reply in replies.items()
                if reply.text
            ]
    return "\n\n".join(blocks) + "\n"


def win_rates_csv(results: Sequence[Result]) -> str:
    """One line per policy, setting and judge; shares are between 0 and 1, unknown ones empty."""
    lines = [_csv_row(result, row) for result in results for row in result.rows]
    return _csv(list(lines[0]), [line.values() for line in lines])


def differences_csv(results: Sequence[Result]) -> str:
    """One line per pair of sides and judge."""
    heading = ["judge", "first", "second", "difference", "difference_low", "difference_high"]
    lines = [
        [result.judge, first, second, *gap]
        for result in results
        for first, second, gap in result.differences
    ]
    return _csv([*heading, "prompts"], lines)


def _csv_row(result: Result, row: Row) -> dict:
    rate = row.win_rate
    return {
        "policy": row.policy,
        "temperature": row.temperature,
        "best_of": row.best_of,
        "opponent": result.opponent,
        "judge": result.judge,
        "fingerprint": result.fingerprint,
        "template": result.template,
        "win_rate": rate.value,
        "low": rate.low,
        "high": rate.high,
        **_ends("length_controlled", row.length_controlled),
        **{outcome.value: count for outcome, count in rate.counts.items()},
        "comparisons": rate.comparisons,
        "prompts": rate.prompts,
        "prompts_left_out": rate.prompts_left_out,
        **_ends("position_bias", rate.position_bias),
        **_ends("flip_rate", rate.flip_rate),
        **_ends("repeatability", row.repeatability),
        "asked_again": row.repeatability.asked if row.repeatability else 0,
        "length_a": row.length_a,
        "length_b": row.length_b,
        "length_unit": result.length_unit,
        "cut": row.cut,
    }


def _ends(name: str, measured) -> dict[str, float | None]:
    value, low, high = (None, None, None) if measured is None else measured[:3]
    return {name: value, f"{name}_low": low, f"{name}_high": high}


def _csv(heading: Sequence[str], lines: Sequence[Iterable]) -> str:
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(heading)
    writer.writerows([["" if _is_nan(cell) else cell for cell in line] for line in lines])
    return text.getvalue()


def _is_nan(cell: object) -> bool:
    return isinstance(cell, float) and math.isnan(cell)


def _verdict(judgement: Judgement) -> str:
    return (
        f"Where A stands first the judge chose: {_choice(judgement.a_first)}. "
        f"Where B stands first: {_choice(judgement.b_first)}."
    )


def _choice(reply: Reply) -> str:
    preference = reply.preference
    sure = "" if math.isnan(preference) else f" (P(first is better) = {preference:.2f})"
    return f"{reply.choice.value}{sure}"


def _quoted(text: str) -> str:
    """A block of literal text, which Markdown shows as it is."""
    if len(text) > LONGEST_SAMPLE:
        text = f"{text[:LONGEST_SAMPLE]} [... {len(text) - LONGEST_SAMPLE} characters more]"
    fence = "```"
    while fence in text:
        fence += "`"
    return f"{fence}text\n{text}\n{fence}"


def _length(value: float) -> str:
    return f"{value:.1f}" if math.isfinite(value) else NOT_KNOWN


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:g}"
