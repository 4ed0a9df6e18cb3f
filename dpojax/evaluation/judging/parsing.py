"""What a judge's written reply says: `Preferred: A`, and the many other ways to write it."""

from __future__ import annotations

import re
import unicodedata

from dpojax.evaluation.judging.verdicts import Choice

_THOUGHTS = re.compile(r"<(think|thinking|reasoning|thought)>.*?(</\1>|\Z)", re.DOTALL | re.I)
_THOUGHTS_END = re.compile(r"</(?:think|thinking|reasoning|thought)>", re.I)
_QUOTES = r"\"'\u2018-\u201f\u00ab\u00bb"
_DECORATION = re.compile(
    rf"</?[\w|]{{1,20}}>|<\|\w{{1,20}}\|>|\\boxed|[*_`#>\[\]|\\{{}}${_QUOTES}]"
)

_NOUN = (
    r"(?i:(?:the\s+)?(?:summary|response|answer|option|candidate|assistant|reply|text|completion|"
    r"choice|version|output)\s+)?"
)
_ABOUT = r"(?:\s+(?:summary|response|answer|option|choice|one|verdict))?\s*"
_START = r"\W*(?:\d+\W+)?(?:\b(?:so|thus|therefore|the|my|final|overall)\b\W*)*"
_OTHER_LABELS = (
    r"(?:preference|answer|verdict|winner|choice|decision|judge?ment|conclusion|better|best|"
    r"more\s+helpful)"
)
# From what was asked for to what is understood as well. The last match in a reply counts.
_LABELS = [
    re.compile(pattern, re.IGNORECASE)
    for pattern in (
        rf"{_START}preferred{_ABOUT}[:=]\s*",
        rf"{_START}{_OTHER_LABELS}{_ABOUT}[:=]\s*",
        rf".*\bpreferred{_ABOUT}[:=]\s*",
        rf"{_START}(?:preferred|{_OTHER_LABELS}){_ABOUT}\bis\b:?\s*",
    )
]
_LETTER = re.compile(
    rf"\W*{_NOUN}\(?([ab])\)?(?:$|\s*[.,;:!?()\u2013\u2014-](.*)|\s+(?:because|since|as|over|is|for)\b)",
    re.IGNORECASE,
)
_ONE_MORE_LETTER = re.compile(rf"\W*(?:and\b|or\b|&|/)?\s*{_NOUN}[ab]\W*$", re.IGNORECASE)
_TIE = re.compile(
    r"\W*(?:it\s+is\s+)?(?:a\s+)?(?:tie|tied|draw|equal|neither|both|none|same)\b", re.IGNORECASE
)
_TIE_WORDS = 4  # in a line without a label that is read as a tie
_ALONE = re.compile(
    rf"\W*{_NOUN}\(?([AB])\)?(?:\W*$|\s+is\s+(?:the\s+)?(?:better|best|preferred|preferable|more)\b)"
)


def parse_verdict(reply: str, *, allows_ties: bool = False) -> Choice:
    """Return what the reply of a judge says of A, the first response, and B, the second.

    What a reasoning model thinks (`<think>...</think>`) is left out. The last line that begins with
    `Preferred:` counts. Without one, a line with another label such as `Answer:` counts, then
    `Preferred:` within a line, then a last line that names a response and nothing else. Markdown,
    quotes and case play no part.

    Returns:
      UNPARSED where no line names one response, or where the line names both. A tie is UNPARSED,
      too, where the judge was not offered it.
    """
    text = _THOUGHTS_END.split(_THOUGHTS.sub("", reply))[-1]
    text = unicodedata.normalize("NFKC", text)  # a full-width colon is a colon
    lines = [_DECORATION.sub("", line).strip() for line in text.splitlines()]
    lines = [line for line in lines if line]
    if not lines:
        return Choice.UNPARSED
    value = _labelled_value(lines)
    choice = _read_last_line(lines[-1]) if value is None else _read_value(value)
    if choice is Choice.TIE and not allows_ties:
        return Choice.UNPARSED
    return choice


def _labelled_value(lines: list[str]) -> str | None:
    """Return what follows the label that counts; None where there is no label."""
    for label in _LABELS:
        for index in reversed(range(len(lines))):
            if match := label.match(lines[index]):
                value = lines[index][match.end() :]
                is_last = index + 1 == len(lines)
                return value if value or is_last else lines[index + 1]
    return None


def _read_value(value: str) -> Choice:
    """Read what stands behind a label."""
    match = _LETTER.match(value)
    if match and not (match[2] and _ONE_MORE_LETTER.match(match[2])):
        return _choice_of(match[1])
    return Choice.TIE if _TIE.match(value) else Choice.UNPARSED


def _read_last_line(line: str) -> Choice:
    """Read a line without a label."""
    if match := _ALONE.match(line):
        return _choice_of(match[1])
    is_tie = len(line.split()) <= _TIE_WORDS and _TIE.match(line)
    return Choice.TIE if is_tie else Choice.UNPARSED


def _choice_of(letter: str) -> Choice:
    return Choice.FIRST if letter.upper() == "A" else Choice.SECOND
