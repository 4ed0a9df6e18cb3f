"""Plain text in Markdown, which would take some of its characters for marks."""

from __future__ import annotations

import html
import re
from collections.abc import Sequence

from dpojax.tables import markdown_table


def escaped(text: str) -> str:
    """Escape a text so that Markdown shows it as it is, on one line.

    >>> print(escaped("a|b *c* <br />"))
    a\\|b \\*c\\* &lt;br /&gt;
    """
    text = html.escape(" ".join(text.split()), quote=False)
    return re.sub(r"([\\`*_{}\[\]#|~$])", r"\\\1", text)


def escaped_table(heading: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table of cells that hold plain text."""
    cells = [[escaped(cell) for cell in row] for row in (heading, *rows)]
    return "\n".join(markdown_table(cells[0], cells[1:]))
