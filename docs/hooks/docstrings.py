"""Docstrings as the site shows them: doctests as code, and the comments of fields as their text."""

from __future__ import annotations

import re
from typing import Any

import griffe

COMMENT = re.compile(r"  # (.*)$")
ABOVE = re.compile(r"(^|: )> ")  # "beta: > 0"


class Docstrings(griffe.Extension):
    """Markdown would read >>> as three quotes, and griffe does not read comments."""

    def on_instance(self, *, obj: griffe.Object, **_: Any) -> None:
        if obj.docstring is not None:
            obj.docstring.value = fence_doctests(obj.docstring.value)

    def on_attribute_instance(self, *, attr: griffe.Attribute, **_: Any) -> None:
        in_class = attr.parent is not None and attr.parent.is_class
        if in_class and attr.docstring is None and attr.lineno is not None:
            line = attr.parent.module.lines_collection[attr.filepath][attr.lineno - 1]
            if comment := COMMENT.search(line):
                attr.docstring = griffe.Docstring(unquoted(comment[1]), parent=attr)


def fence_doctests(text: str) -> str:
    """Put each block of lines that begins with >>> between ```pycon and ```."""
    blocks = text.split("\n\n")
    return "\n\n".join(
        f"```pycon\n{block}\n```" if block.lstrip().startswith(">>>") else unquoted(block)
        for block in blocks
    )


def unquoted(text: str) -> str:
    """A text that begins with > is a quote in Markdown."""
    return ABOVE.sub(r"\1\> ", text)
