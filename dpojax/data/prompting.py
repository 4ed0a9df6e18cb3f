"""Zero-shot and few-shot prompting: what a policy reads in the place of a prompt.

A template is a text with `{prompt}` where the prompt stands; the response follows its end. Few-shot
prompting puts examples before it, each the template with its response. What stands above a line of
three hyphens is a header, which comes once.

>>> template = PromptTemplate("Answer briefly.\\n---\\nQ: {prompt}\\nA:")
>>> template.apply("2 + 2?", [("1 + 1?", " 2")])
'Answer briefly.\\n\\nQ: 1 + 1?\\nA: 2\\n\\nQ: 2 + 2?\\nA:'
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from dpojax.data.records import DataError

PLACE = "{prompt}"
RULE = "\n---\n"


class PromptTemplate(NamedTuple):
    """A template as text; see above."""

    text: str

    def apply(self, prompt: str, examples: Sequence[tuple[str, str]] = ()) -> str:
        """The text of a prompt, behind examples (prompt, response)."""
        header, rule, body = self.text.partition(RULE)
        if not rule:
            header, body = "", self.text
        parts = [header] if header else []
        parts += [_filled(body, text) + response for text, response in examples]
        return "\n\n".join([*parts, _filled(body, prompt)])


def _filled(body: str, prompt: str) -> str:
    return body.replace(PLACE, prompt)  # a prompt may hold braces


def require_place(text: str, where: str) -> None:
    """Raise DataError unless a template has a place for the prompt below its header."""
    if PLACE not in text.partition(RULE)[2 if RULE in text else 0]:
        raise DataError(f"{where}: has no {PLACE}, where the prompt is to stand; write it there")
