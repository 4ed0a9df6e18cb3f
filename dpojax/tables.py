"""Tables of text: columns of equal width, for a terminal, a text file or Markdown.

>>> print("\\n".join(text_table([["", "before", "after"], ["loss (nats)", "0.693", "0.512"]])))
             before  after
loss (nats)   0.693  0.512
"""

from __future__ import annotations

import itertools
import re
import shutil
import sys
import textwrap
from collections.abc import Collection, Sequence

Row = Sequence[str]

WIDTH = 100  # characters of a line that `fitted` makes, with two spaces between columns
INDENT = " " * 6  # of what `fitted` puts below a row
LONG_CELL = 60  # characters; Markdown columns with a longer cell are not padded
SHORTEST_RULE = 3  # dashes that Markdown needs below a heading
CELL_END = re.compile(r"(?<!\\)\|")  # in a line of a Markdown table; `\|` is part of a cell


def text_table(rows: Sequence[Row], *, left: Collection[int] = (0,), gap: str = "  ") -> list[str]:
    """Align the columns of a table.

    Args:
      rows: the cells of each line, all of the same number of columns.
      left: indices of the left-aligned columns; all other columns are right-aligned.
      gap: text between two columns.

    Returns:
      One line per row, without spaces at its end.
    """
    columns = range(len(rows[0])) if rows else ()
    widths = [max(len(row[column]) for row in rows) for column in columns]
    return [gap.join(_padded(row, widths, left)).rstrip() for row in rows]


def fitted(rows: Sequence[Row]) -> list[list[str]]:
    """Rows for `text_table` whose last column stands in rows of its own if it is too wide.

    Args:
      rows: the cells of each line; a last cell is a list with ", " between its items.
    """
    lengths = [max(map(len, column)) for column in zip(*rows)]
    if sum(lengths) + 2 * (len(lengths) - 1) <= WIDTH:
        return [list(row) for row in rows]
    result = []
    for *cells, last in rows:
        result.append(cells)
        is_heading = last == rows[0][-1]
        whole = len(last) + len(INDENT) <= lengths[0]
        for item in () if is_heading or not last else (last,) if whole else last.split(", "):
            result.append([INDENT + item, *("" for _ in cells[1:])])
    return result


def terminal_width() -> int | None:
    """Columns of the terminal that shows what is printed; None where none does, as in a pipe."""
    return shutil.get_terminal_size().columns if sys.stdout.isatty() else None


def blocks_table(rows: Sequence[Row], width: int | None) -> list[str]:
    """`text_table`; where it is too wide, blocks of its columns that all begin with the first one.

    Where several rows have the same first cell, the blocks begin with as many columns as tell the
    rows apart, if these take no more than half of the width. A column that is too wide by itself
    still stands whole in a block of its own.

    Args:
      rows: the cells of each line, all of the same number of columns.
      width: characters of a line; None takes lines of any length.

    Returns:
      One line per row and block, with an empty line between blocks.
    """
    lines: list[str] = []
    for columns in _blocks(rows, width):
        block = text_table([[row[column] for column in columns] for row in rows])
        lines += ["", *block] if lines else block
    return lines


def fitted_markdown(text: str, width: int | None) -> str:
    """Markdown for a terminal: wrapped lines, and the tables that are too wide in blocks.

    Args:
      text: with tables whose cells are escaped, as `markdown_table` takes them.
      width: characters of a line; None changes nothing.
    """
    if width is None:
        return text
    result, table = [], []
    for line in [*text.split("\n"), ""]:
        if line.startswith("|"):
            table.append(line)
            continue
        if table:
            result += _fitted_table(table, width)
            table = []
        result += _wrapped(line, width)
    return "\n".join(result[:-1])


def _wrapped(line: str, width: int) -> list[str]:
    """A line of text, at most `width` wide unless a word is longer; items of lists are indented."""
    indent = "  " if line.startswith(("- ", "* ", "> ")) else ""
    wrapper = textwrap.TextWrapper(
        width, subsequent_indent=indent, break_long_words=False, break_on_hyphens=False
    )
    return wrapper.wrap(line) or [""]


def _fitted_table(lines: Sequence[str], width: int) -> list[str]:
    """The lines of a Markdown table, in blocks if they are too wide."""
    if max(map(len, lines)) <= width:
        return list(lines)
    heading, _, *body = [[cell.strip() for cell in CELL_END.split(line)[1:-1]] for line in lines]
    return blocks_table([heading, *body], width)


def _blocks(rows: Sequence[Row], width: int | None) -> list[list[int]]:
    """The columns of each block of `blocks_table`."""
    if not rows:
        return []
    widths = [max(map(len, column)) for column in zip(*rows)]
    repeated = list(range(_naming_columns(rows)))
    if width is not None and 2 * _total(widths, repeated) > width:
        repeated = [0]
    blocks = [repeated]
    for column in range(len(repeated), len(widths)):
        longer = [*blocks[-1], column]
        if width is not None and _total(widths, longer) > width and blocks[-1] != repeated:
            blocks.append([*repeated, column])
        else:
            blocks[-1] = longer
    return blocks


def _naming_columns(rows: Sequence[Row]) -> int:
    """How many of the first columns tell all rows apart; 1 where none do."""
    for count in range(1, len(rows[0])):
        if len({tuple(row[:count]) for row in rows}) == len(rows):
            return count
    return 1


def _total(widths: Sequence[int], columns: Sequence[int]) -> int:
    """The width of a line with these columns."""
    return sum(widths[column] for column in columns) + len("  ") * (len(columns) - 1)


def side_by_side(texts: Sequence[str], width: int) -> str:
    """Texts in columns of equal width, wrapped, with " | " between them."""
    column = max(8, (width - 3 * (len(texts) - 1)) // len(texts))
    wrapped = [
        [part for line in text.splitlines() or [""] for part in textwrap.wrap(line, column) or [""]]
        for text in texts
    ]
    rows = itertools.zip_longest(*wrapped, fillvalue="")
    return "\n".join(" | ".join(part.ljust(column) for part in row).rstrip() for row in rows)


def ruled_table(title: str, rows: Sequence[Row]) -> list[str]:
    """Lines of `text_table` below a title, with rules around the heading (row 0) and at the end."""
    heading, *body = text_table(rows)
    rule = "-" * len(heading)
    return [title, rule, heading, rule, *body, rule]


def markdown_table(heading: Row, rows: Sequence[Row]) -> list[str]:
    """Lines of a Markdown table whose source is aligned too.

    All columns are left-aligned. A column with a cell of `LONG_CELL` characters or more is not
    padded. Cells must be escaped already.
    """
    columns = range(len(heading))
    widths = [max(len(row[column]) for row in (heading, *rows)) for column in columns]
    widths = [max(width, SHORTEST_RULE) if width < LONG_CELL else SHORTEST_RULE for width in widths]
    rule = ["-" * width for width in widths]
    padded = [_padded(row, widths, columns) for row in (heading, rule, *rows)]
    return [f"| {' | '.join(row)} |" for row in padded]


def _padded(row: Row, widths: Sequence[int], left: Collection[int]) -> list[str]:
    """The cells of one line, each filled up with spaces to the width of its column."""
    return [
        cell.ljust(width) if column in left else cell.rjust(width)
        for column, (cell, width) in enumerate(zip(row, widths, strict=True))
    ]
