"""Tables of text: columns of equal width."""

import doctest

from dpojax import tables
from dpojax.tables import markdown_table, ruled_table, text_table

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


def test_the_example_of_the_docstring_is_what_is_printed():
    result = doctest.testmod(tables)
    assert result.attempted
    assert not result.failed
