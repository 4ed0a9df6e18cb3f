"""What is wrong with a preference data set that parses well: faults to count, biases to measure.

| finding | counted are | fault |
| --- | --- | --- |
| `duplicate` | records that repeat an earlier one: prompt, responses, order | yes |
| `contradicting` | records of which another one ranks two responses the other way round | yes |
| `in_evaluation` | records whose prompt (of plain text: text) the evaluation data hold | yes |
| `repeats_prompt` | records with a response that begins with the prompt, or its last turn | yes |
| `control_token` | records with a control token of some model written out in a text | yes |
| `broken_text` | records with U+FFFD or half a surrogate pair: bytes that were no UTF-8 | yes |
| `longer_chosen` | pairs of different lengths whose longer response is chosen | no |
| `words_disagree` | pairs that a classifier of words would surely label the other way | no |

Faults are errors in records; the two others measure the whole set, and `--strict` ignores them.
Texts are compared with every run of white space as one space. A ranking of K > 2 responses enters
the measures as its first against its last; tied responses claim nothing of each other.
Identical responses are `tokenise`'s to drop.
"""

from __future__ import annotations

import gzip
import itertools
import math
import os
import pathlib
import re
from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple

import numpy as np

from dpojax.data import label_noise
from dpojax.data.records import Content, Record
from dpojax.data.report import EXAMPLES
from dpojax.intervals import wilson_interval
from dpojax.tables import text_table

WORDS = {
    "duplicate": "repeats an earlier record",
    "contradicting": "another record ranks two responses the other way round",
    "in_evaluation": "its prompt is in the evaluation data",
    "repeats_prompt": "a response begins with the prompt, or its last turn",
    "control_token": "a control token is written out in the text",
    "broken_text": "U+FFFD or half a surrogate pair in the text",
    "longer_chosen": "the longer response is chosen (of pairs that differ in length)",
    "words_disagree": "a classifier of words is sure of the other response",
}
MEASURES = ("longer_chosen", "words_disagree")

# The shapes of control tokens in common chat formats, and names that many vocabularies share.
CONTROL = re.compile(
    r"<\|[a-z0-9_]+\|>|</?s>|<(bos|eos|pad|unk|mask)>|\[/?INST\]|<</?SYS>>|<(start|end)_of_turn>"
)
BROKEN = re.compile("[\ufffd\ud800-\udfff]")
LAST_TURN = re.compile(
    r"\n\nHuman:(?P<human>(?:(?!\n\nHuman:).)*)\n\nAssistant:\Z"
    r"|### Instruction:\n(?P<instruction>.*?)\n\n### ",
    re.DOTALL,
)
SHORTEST_REPEAT = 20  # characters; "Hello" answered with "Hello" repeats nothing

SURE = 0.9  # a chance beyond which the classifier of words counts as sure


class Finding(NamedTuple):
    """One row of the table: `count` of `of` records or pairs, and the ids of the first two.

    name: a key of WORDS. examples: "FILE:NUMBER", or two ids with "/" where two records meet.
    note: what else there is to say, or "".
    """

    name: str
    count: int
    of: int
    examples: tuple[str, ...]
    note: str = ""

    @property
    def is_fault(self) -> bool:
        """Whether it counts under --strict."""
        return self.name not in MEASURES and self.count > 0


def lint(
    records: Sequence[Record],
    *,
    evaluation: Sequence[Record] | None = None,
    control_tokens: Iterable[str] = (),
) -> list[Finding]:
    """All findings, also those that count nothing, in the order of WORDS.

    Args:
      evaluation: the records that no training record may share a prompt with; None: not checked,
        and not in the list.
      control_tokens: those of the tokenizer in use, besides what CONTROL matches.
    """
    texts = [_Texts.of(record) for record in records]
    found = {
        "duplicate": _duplicates(texts),
        "contradicting": _contradicting(texts),
        "repeats_prompt": (text.id for text in texts if text.repeats_prompt()),
        "control_token": _matching(records, _control_pattern(control_tokens)),
        "broken_text": _matching(records, BROKEN),
    }
    if evaluation is not None:
        found["in_evaluation"] = _shared(texts, [_Texts.of(record) for record in evaluation])
    findings = []
    for name in WORDS:
        if name in found:
            ids = list(found[name])
            findings.append(Finding(name, len(ids), len(records), tuple(ids[:EXAMPLES])))
    pairs = [text for text in texts if text.places[0] < text.places[-1]]
    return [*findings, longer_chosen(pairs), words_disagree(pairs)]


def table(findings: Sequence[Finding]) -> str:
    """The findings as aligned columns for a terminal, with their notes below."""
    rows = [["lint", "count", "of", "share", "for example"]]
    for finding in findings:
        share = f"{100 * finding.count / finding.of:.2f} %" if finding.of else "-"
        label = f"  {finding.name}: {WORDS[finding.name]}"
        numbers = [f"{finding.count:,}", f"{finding.of:,}", share]
        rows.append([label, *numbers, ", ".join(finding.examples)])
    notes = [f"  {finding.name}: {finding.note}" for finding in findings if finding.note]
    return "\n".join([*text_table(rows, left=(0, 4)), *notes])


def not_utf8(file: str | os.PathLike) -> list[int]:
    """The numbers (from 1) of the lines of a .json or .jsonl file (also .gz) that are not UTF-8.

    Reading stops at the first of them, as a text that was skipped or repaired is one that nobody
    misses; this lists all, so that the file can be mended at once.
    """
    content = pathlib.Path(file).read_bytes()
    content = gzip.decompress(content) if str(file).endswith(".gz") else content
    bad = []
    for number, line in enumerate(content.split(b"\n"), start=1):
        try:
            line.decode("utf-8")
        except UnicodeDecodeError:
            bad.append(number)
    return bad


class _Texts(NamedTuple):
    """A record's texts with every run of white space as one space."""

    id: str
    prompt: str
    responses: tuple[str, ...]
    places: tuple[int, ...]
    label: bool | None
    last_turn: str

    @classmethod
    def of(cls, record: Record) -> _Texts:
        if isinstance(record.prompt, str):
            found = list(LAST_TURN.finditer(record.prompt))
            groups = found[-1].groupdict() if found else {}
            turn = groups.get("human") or groups.get("instruction") or record.prompt
        else:
            turn = record.prompt[-1]["content"]
        prompt, *responses = (_plain(part) for part in (record.prompt, *record.responses))
        return cls(
            id=record.id,
            prompt=prompt,
            responses=tuple(responses),
            places=record.places,
            label=record.label,
            last_turn=" ".join(turn.split()),
        )

    @property
    def question(self) -> str:
        """What must not be in the evaluation data: the prompt; of plain text, the text."""
        return self.prompt or " ".join(self.responses)

    def repeats_prompt(self) -> bool:
        starts = [text for text in (self.prompt, self.last_turn) if len(text) >= SHORTEST_REPEAT]
        return any(response.startswith(tuple(starts)) for response in self.responses)


def _plain(content: Content) -> str:
    """One text; of several messages, with their roles between."""
    if not isinstance(content, str):
        only = len(content) == 1
        content = "\n".join(
            m["content"] if only else f"{m['role']}: {m['content']}" for m in content
        )
    return " ".join(content.split())


def _duplicates(texts: Sequence[_Texts]) -> Iterator[str]:
    first: dict[tuple, str] = {}
    for text in texts:
        key = (text.prompt, text.responses, text.places, text.label)
        if key in first:
            yield f"{text.id} / {first[key]}"
        first.setdefault(key, text.id)


def _contradicting(texts: Sequence[_Texts]) -> Iterator[str]:
    """Unpaired records contradict one another where the same response has both labels."""
    first: dict[tuple, str] = {}
    for text in texts:
        for claim in _claims(text):
            first.setdefault(claim, text.id)
    for text in texts:
        denied = (first.get((prompt, b, a)) for prompt, a, b in _claims(text))
        if other := next(filter(None, denied), None):
            yield f"{text.id} / {other}"


def _claims(text: _Texts) -> Iterator[tuple]:
    """(prompt, better, worse) for all that a record says."""
    if text.label is not None:
        yield (text.prompt, *((text.responses[0], None)[:: 1 if text.label else -1]))
    ranked = zip(text.responses, text.places)
    for (better, place), (worse, lower) in itertools.combinations(ranked, 2):
        if better != worse and place < lower:
            yield text.prompt, better, worse


def _shared(texts: Sequence[_Texts], others: Sequence[_Texts]) -> Iterator[str]:
    held = {text.question: text.id for text in reversed(others)}
    for text in texts:
        if text.question in held:
            yield f"{text.id} / {held[text.question]}"


def _control_pattern(tokens: Iterable[str]) -> re.Pattern:
    return re.compile("|".join([CONTROL.pattern, *map(re.escape, sorted(tokens))]))


def _matching(records: Sequence[Record], pattern: re.Pattern) -> Iterator[str]:
    for record in records:
        contents = (record.prompt, *record.responses)
        parts = [[c] if isinstance(c, str) else [m["content"] for m in c] for c in contents]
        if any(pattern.search(text) for part in parts for text in part):
            yield record.id


def longer_chosen(pairs: Sequence[_Texts]) -> Finding:
    """How often the longer response (in characters) is chosen, with Wilson's 95 % interval."""
    longer = [len(pair.responses[0]) - len(pair.responses[-1]) for pair in pairs]
    ids = [pair.id for pair, more in zip(pairs, longer) if more > 0]
    unequal = sum(more != 0 for more in longer)
    note = ""
    if unequal:
        low, high = wilson_interval(len(ids), unequal)
        note = f"95 % interval {100 * low:.1f} % to {100 * high:.1f} %; 50 % is no bias"
    return Finding("longer_chosen", len(ids), unequal, tuple(ids[:EXAMPLES]), note)


def words_disagree(pairs: Sequence[_Texts]) -> Finding:
    """Pairs whose words speak for the rejected response, the surest first: see `label_noise`."""
    step = max(1, math.ceil(len(pairs) / label_noise.MOST_PAIRS))
    pairs = [pair for pair in pairs[::step] if pair.responses[0] != pair.responses[-1]]
    if len(pairs) < label_noise.FEWEST_PAIRS:
        note = f"not checked: fewer than {label_noise.FEWEST_PAIRS} pairs"
        return Finding("words_disagree", 0, 0, (), note)
    chance = label_noise.held_out_chances(
        [(pair.prompt, pair.responses[0], pair.responses[-1]) for pair in pairs]
    )
    wrong = [int(i) for i in np.argsort(chance, kind="stable") if chance[i] < 1 - SURE]
    sure = int(np.sum(np.maximum(chance, 1 - chance) > SURE))
    note = (
        f"it ranks {100 * np.mean(chance > 0.5):.1f} % of held-out pairs as labelled; it is sure "
        f"(> {100 * SURE:.0f} %) of {sure:,} and contradicts {100 * len(wrong) / max(sure, 1):.1f} "
        f"% of those: far above {100 - 100 * SURE:.0f} % it is overconfident, and no evidence"
    )
    note += f"; one pair in {step} was looked at" if step > 1 else ""
    ids = tuple(pairs[i].id for i in wrong[:EXAMPLES])
    return Finding("words_disagree", len(wrong), len(pairs), ids, note)
