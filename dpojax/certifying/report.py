"""A certificate for a person: a table of variants, and what was found."""

from __future__ import annotations

import textwrap
from collections.abc import Mapping
from typing import Any

from dpojax.certifying.verdict import BOUNDS
from dpojax.tables import WIDTH, blocks_table, markdown_table, terminal_width

HEADING = ("variant", "log-prob", "signs", "gradient", "learned", "curve", "margin", "")
FIELDS = (
    "logprob_max",
    "sign_agreement",
    "gradient_error",
    "learned",
    "curve_distance",
    "margin_noise",
)
SHARES = ("sign_agreement", "learned")
LONGEST_NAME = 36  # characters of a variant in the terminal's table: 100 columns in all


def lines_of(certificate: Mapping[str, Any]) -> list[str]:
    """The table and the verdicts for a terminal; without one of 100 columns."""
    width = terminal_width() or WIDTH
    names = [_short(entry["name"]) for entry in certificate["variants"]]
    rows = [[name, *cells] for name, cells in zip(names, _cells(certificate))]
    notes = [f"{x['name']}: {x['why']}" for x in certificate["variants"] if x["why"]]
    about_all, *notes = [
        textwrap.fill(text, width, subsequent_indent="  ", break_on_hyphens=False)
        for text in (about(certificate), *notes, conclusion(certificate))
    ]
    lines = [about_all, "", *blocks_table([HEADING, *rows], width), "", *notes]
    return "\n".join(lines).splitlines()


def as_markdown(certificate: Mapping[str, Any]) -> str:
    """The same as a page: with the bounds."""
    rows = [
        [f"`{entry['name']}`", *cells]
        for entry, cells in zip(certificate["variants"], _cells(certificate))
    ]
    bounds = [
        [one.measure, _relation(one, one.exact), _relation(one, one.rounded), one.reason]
        for one in BOUNDS
    ]
    notes = [f"- `{x['name']}`: {x['why']}" for x in certificate["variants"] if x["why"]]
    return "\n".join(
        [
            "# Certificate",
            "",
            f"{about(certificate)} {conclusion(certificate)}",
            "",
            *markdown_table(HEADING, rows),
            "",
            *notes,
            *([""] if notes else []),
            *markdown_table(("measure", "in float32", "with fewer bits", "reason"), bounds),
            "",
        ]
    )


def about(certificate: Mapping[str, Any]) -> str:
    """What was measured, in a sentence."""
    exact, steps = certificate["float32"], certificate["steps"]
    begin, end = exact["first_batch"]
    in_small = ", in the small" if certificate["small"] else ""
    return (
        f"{certificate['stage']}, the first {steps} steps{in_small}, against {exact['name']}: "
        f"there the loss of the first batch went from {begin:.4f} to {end:.4f}."
    )


def conclusion(certificate: Mapping[str, Any]) -> str:
    failed = [entry["name"] for entry in certificate["variants"] if not entry["passes"]]
    if not failed:
        return f"All {len(certificate['variants'])} variants pass."
    return f"{len(failed)} of {len(certificate['variants'])} variants FAIL: {', '.join(failed)}."


def _cells(certificate: Mapping[str, Any]) -> list[list[str]]:
    return [_cells_of(entry) for entry in certificate["variants"]]


def _cells_of(entry: Mapping[str, Any]) -> list[str]:
    verdict = "passes" if entry["passes"] else "FAILS"
    if entry["measures"] is None:
        left_out = entry["passes"]
        return [*("" for _ in FIELDS), "left out" if left_out else verdict]
    return [*(_number(entry["measures"], field) for field in FIELDS), verdict]


def _number(measures: Mapping[str, float | None], field: str) -> str:
    value = measures[field]
    if value is None:
        return "-"
    if field in SHARES:
        return f"{100 * value:.1f}%"
    return f"{value:.1e}"


def _relation(bound, limit: float) -> str:
    if bound.measure == "norm_ratio":
        return f"1 ± {limit:g}"
    return f"{'≥' if bound.at_least else '≤'} {limit:g}"


def _short(name: str) -> str:
    return name if len(name) <= LONGEST_NAME else f"{name[: LONGEST_NAME - 3]}..."
