"""Tables of text: columns of equal width."""

import doctest
import io
import itertools
import os

import pytest

from dpojax import tables
from dpojax.tables import (
    blocks_table,
    fitted_markdown,
    markdown_table,
    ruled_table,
    terminal_width,
    text_table,
)

ROWS = [["", "before", "after"], ["loss (nats)", "0.693", "0.512"]]


def test_the_first_column_is_left_aligned_and_the_others_right_aligned():
    assert text_table(ROWS) == [
        "             before  after",
        "loss (nats)   0.693  0.512",
    ]


def test_other_columns_can_be_left_aligned_and_no_line_ends_with_spaces():
    rows = [["a", "1", "long example"], ["bb", "22", "x"]]
    assert text_table(rows, left=(0, 2)) == ["a    1  long example", "bb  22  x"]


def test_the_gap_between_columns_can_be_chosen():
    assert text_table([["a", "b"], ["cc", "d"]], gap=" | ") == ["a  | b", "cc | d"]


def test_a_table_without_rows_has_no_lines():
    assert text_table([]) == []


def test_a_ruled_table_has_a_title_and_three_rules_as_wide_as_its_heading():
    rule = "-" * 26
    assert ruled_table("Before and after", ROWS) == [
        "Before and after",
        rule,
        "             before  after",
        rule,
        "loss (nats)   0.693  0.512",
        rule,
    ]


def test_a_markdown_table_is_aligned_and_has_at_least_three_dashes_below_a_heading():
    assert markdown_table(["", "value"], [["a", "1"], ["name", "22"]]) == [
        "|      | value |",
        "| ---- | ----- |",
        "| a    | 1     |",
        "| name | 22    |",
    ]
    assert markdown_table(["k"], [["v"]])[1] == "| --- |"


def test_a_markdown_column_of_long_texts_is_not_padded():
    long = 60 * "x"
    assert markdown_table(["name", "text"], [["a", long], ["b", "y"]]) == [
        "| name | text |",
        "| ---- | --- |",
        f"| a    | {long} |",
        "| b    | y   |",
    ]


WIDE = [["", *(f"metric {n}" for n in range(9))]]
WIDE += [[f"beta-{row}", *(str(10**n + row) for n in range(9))] for row in range(2)]


def cells_of(lines):
    """Every cell of blocks: {(the line's first cell, the column's heading): cell}."""
    cells = {}
    for is_gap, block in itertools.groupby(lines, lambda line: not line):
        if not is_gap:
            heading, *body = (line.replace("metric ", "metric").split() for line in block)
            cells |= {(name, at): x for name, *rest in body for at, x in zip(heading, rest)}
    return cells


@pytest.mark.parametrize("width", [24, 25, 40, 60, 80])
def test_blocks_of_a_table_hold_every_cell_and_no_line_is_wider(width):
    lines = blocks_table(WIDE, width)
    assert max(map(len, lines)) <= width
    assert "" in lines
    names = [heading.replace(" ", "") for heading in WIDE[0][1:]]
    want = {(row[0], at): x for row in WIDE[1:] for at, x in zip(names, row[1:])}
    assert cells_of(lines) == want


def test_a_table_that_fits_or_that_nobody_measures_is_one_block():
    whole = text_table(WIDE)
    width = max(map(len, whole))
    assert blocks_table(WIDE, width) == blocks_table(WIDE, None) == whole
    assert len(blocks_table(WIDE, width - 1)) == 2 * len(whole) + 1


def test_blocks_repeat_the_columns_that_tell_rows_apart_where_there_is_room():
    rows = [
        ["method", "at", "reward", "length"],
        ["DPO", "1", "0.5", "9"],
        ["DPO", "2", "0.6", "8"],
    ]
    assert blocks_table(rows, 20) == [
        "method  at  reward",
        "DPO      1     0.5",
        "DPO      2     0.6",
        "",
        "method  at  length",
        "DPO      1       9",
        "DPO      2       8",
    ]
    assert blocks_table(rows, 18)[4] == "method  length"  # two names would take most of it


def test_a_column_that_is_too_wide_by_itself_stays_whole():
    rows = [["name", "a", "b" * 30, "c"], ["x", "1", "2", "3"]]
    blocks = blocks_table(rows, 20)
    assert blocks == ["name  a", "x     1", "", f"name  {'b' * 30}", f"x     {'2':>30}"] + [
        "",
        "name  c",
        "x     3",
    ]
    assert blocks_table([], 20) == []


def test_a_report_on_a_terminal_is_wrapped_and_loses_no_word_or_cell():
    table = markdown_table(
        ["method", "reward", "what it"], [["DPO", "0.5", r"a\|b"], ["PPO", "1", ""]]
    )
    report = "\n".join(["# Title", "", "Some words " * 9, "", *table, "- item " + "word " * 9, ""])
    fitted = fitted_markdown(report, 20)
    assert max(map(len, fitted.split("\n"))) <= 20
    assert fitted.startswith("# Title\n\nSome words Some\nwords Some words\n")
    assert (
        "method  reward\nDPO        0.5\nPPO          1\n\nmethod  what it\nDPO        a\\|b\n"
        in fitted
    )
    assert fitted.endswith("\n  word word word\n  word\n")
    assert fitted_markdown(report, 40).count("\n| ") == 4  # the table fits
    assert fitted_markdown(report, None) == report


def test_only_a_terminal_has_a_width(monkeypatch):
    monkeypatch.setattr("sys.stdout", io.StringIO())
    assert terminal_width() is None
    monkeypatch.setattr("sys.stdout.isatty", lambda: True)
    monkeypatch.setattr("shutil.get_terminal_size", lambda: os.terminal_size((73, 24)))
    assert terminal_width() == 73


def test_the_example_of_the_docstring_is_what_is_printed():
    result = doctest.testmod(tables)
    assert result.attempted
    assert not result.failed
