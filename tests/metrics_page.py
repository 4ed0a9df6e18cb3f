"""What docs/metrics.md defines."""

import functools
import pathlib
import re

ROOT = pathlib.Path(__file__).resolve().parents[1]
PAGE = ROOT / "docs" / "metrics.md"
CODE = re.compile(r"`([^`]+)`")


def rows(header: str) -> list[list[str]]:
    """The rows of all tables whose first heading is `header`, as cells."""
    table_rows, inside = [], False
    for line in PAGE.read_text(encoding="utf-8").splitlines():
        if not line.startswith("|"):
            inside = False
            continue
        cells = [cell.strip() for cell in line.strip("|").split(" | ")]
        if cells[0] == header:
            inside = True
        elif inside and not cells[0].startswith("---"):
            table_rows.append(cells)
    return table_rows


@functools.cache
def names() -> frozenset[str]:
    """The metrics that the page defines."""
    return frozenset(name for cells in rows("name") for name in CODE.findall(cells[0]))


def undefined(lines: list[dict]) -> set[str]:
    """The keys of a metrics file that the page does not define."""
    return {key for line in lines for key in line} - names()
