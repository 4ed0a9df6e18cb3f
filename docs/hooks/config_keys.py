"""The page of config keys is filled in from `dpojax/config/defaults.py` when the site is built.

So the page cannot say anything else than the defaults do, or than `dpojax train --help` prints.
"""

from __future__ import annotations

import html
from collections.abc import Iterator
from typing import TYPE_CHECKING

from dpojax.config.key_help import Key, group_meanings, list_keys

if TYPE_CHECKING:  # tests call `tables` where mkdocs is not installed
    from mkdocs.config.defaults import MkDocsConfig
    from mkdocs.structure.files import Files
    from mkdocs.structure.pages import Page

PAGE, PLACE = "config.md", "<!-- keys -->"


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Put the tables where the page has room for them."""
    if page.file.src_uri != PAGE:
        return markdown
    if PLACE not in markdown:
        raise ValueError(f"docs/{PAGE} has no line {PLACE}")
    return markdown.replace(PLACE, "\n".join(tables()))


def tables() -> Iterator[str]:
    """A heading and a table for each group of keys."""
    meanings, groups = group_meanings(), {}
    for key in list_keys():
        groups.setdefault(key.name.rpartition(".")[0], []).append(key)
    for group, keys in groups.items():
        yield f"\n## {f'`{group}`' if group else 'The whole run'} {{ #{group or 'run'} }}\n"
        if meanings.get(group):
            yield f"{sentence(meanings[group])}\n"
        yield "| key | default | meaning |\n| --- | --- | --- |"
        yield from map(row, keys)


def row(key: Key) -> str:
    name = key.name.rpartition(".")[2]
    return f"| `{name}` | {in_cell(key.value_text)} | {sentence(key.meaning)} |"


def in_cell(value: str) -> str:
    """A default: as code, or in words where the key is left open."""
    return value if value.startswith("open") else f"`{value}`"


def sentence(text: str) -> str:
    """Text of a comment, in a table cell: no markup, no cell border, a capital letter."""
    text = html.escape(text[:1].upper() + text[1:], quote=False)
    for sign in "|*_`[]":
        text = text.replace(sign, f"&#{ord(sign)};")
    return text
