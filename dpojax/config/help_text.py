"""What --help prints, in lines that fit the terminal."""

from __future__ import annotations

import sys
from collections.abc import Iterable

from absl import flags

from dpojax import display

HELP_WIDTH = 100  # columns that the texts of --help are written for


def help_width() -> int:
    """Columns of what --help prints: those of the terminal, and no more than `HELP_WIDTH`."""
    return min(display.columns(sys.stdout), HELP_WIDTH)


def about_text(about: str, width: int) -> str:
    """The text at the top of a command's file in lines of `width`; examples keep their lines."""
    paragraphs = []
    for paragraph in about.strip().split("\n\n"):
        lines = paragraph.splitlines()
        if width < HELP_WIDTH and not any(line.startswith(" ") for line in lines):
            lines = [" ".join(lines)]
        paragraphs.append("\n".join(display.fill(line, width, _hanging(line)) for line in lines))
    return "\n\n".join(paragraphs)


def _hanging(line: str) -> str:
    """The indent of what goes on with a line: none of a paragraph, else four more columns."""
    indent = len(line) - len(line.lstrip())
    return " " * (indent + 4 if indent else 0)


def flags_help(names: Iterable[str]) -> str:
    """Flags of absl by their names, with their meaning and default."""
    lines = []
    for name in sorted(names):
        flag = flags.FLAGS[name]
        shown = f"--[no]{name}" if flag.boolean else f"--{name}"
        value = "" if flag.default in (None, "", []) else flag.default_as_str.strip("'")
        meaning = flag.help.partition(";\n")[0]  # absl adds how to repeat a flag
        text = f"{shown}: {meaning}" + (f" (default: {value})" if value else "")
        lines.append(flags.text_wrap(text, help_width(), indent="    ", firstline_indent="  "))
    return "\n".join(lines)
