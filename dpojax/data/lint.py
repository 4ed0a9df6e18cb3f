"""Checks a preference data set that parses well: counts faults and measures biases.

| finding | what is counted | fault |
| --- | --- | --- |
| `duplicate` | records that repeat an earlier one: prompt, responses, order | yes |
| `contradicting` | records of which another one ranks two responses the other way round | yes |
| `in_evaluation` | records whose prompt (or plain text) is in the evaluation data | yes |
| `repeats_prompt` | records with a response that begins with the prompt, or its last turn | yes |
| `control_token` | records with a control token of some model written out in a text | yes |
| `broken_text` | records with U+FFFD or half a surrogate pair: bytes that were no UTF-8 | yes |
| `longer_chosen` | pairs of different lengths whose longer response is chosen | no |
| `words_disagree` | pairs that a classifier of words is sure are labelled the wrong way | no |

Faults are errors in records. The last two findings measure the whole data set, and `--strict`
ignores them. Texts are compared after every run of white space has become one space. Of a ranking
with K > 2 responses, the measures use the first and the last. Tied responses are never a pair.
Identical responses are not looked at here: `tokenise` drops them.
"""

from __future__ import annotations

import itertools
import math
import os
import re
from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple

import numpy as np

from dpojax import storage
from dpojax.data import label_noise, text_files
from dpojax.data.records import Content, Record, message_text
from dpojax.data.report import EXAMPLES
from dpojax.intervals import wilson_interval
from dpojax.tables import fitted, text_table

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

# Control tokens of common chat formats, and names that many vocabularies share.
CONTROL = re.compile(
    r"<\|[a-z0-9_]+\|>|</?s>|<(bos|eos|pad|unk|mask)>|\[/?INST\]|<</?SYS>>|<(start|end)_of_turn>"
)
BROKEN = re.compile("[\ufffd\ud800-\udfff]")
LAST_TURN = re.compile(
    r"\n\nHuman:(?P<human>(?:(?!\n\nHuman:).)*)\n\nAssistant:\Z"
    r"|### Instruction:\n(?P<instruction>.*?)\n\n### ",
    re.DOTALL,
)
SHORTEST_REPEAT = 20  # characters; "Hello" as an answer to "Hello" is no repeat

SURE = 0.9  # the classifier of words is sure of what it gives a higher probability


class Finding(NamedTuple):
    """One row of the table.

    Attributes:
      name: a key of WORDS.
      count: how many records or pairs have it.
      of: of how many that were looked at.
      examples: the ids of the first two, "FILE:NUMBER", or "ID / ID" where two records conflict.
      note: a remark for the reader, or "".
    """

    name: str
    count: int
    of: int
    examples: tuple[str, ...]
    note: str = ""

    @property
    def is_fault(self) -> bool:
        """Whether `--strict` counts it."""
        return self.name not in MEASURES and self.count > 0


def lint(
    records: Sequence[Record],
    *,
    evaluation: Sequence[Record] | None = None,
    control_tokens: Iterable[str] = (),
) -> list[Finding]:
    """Run all checks.

    Args:
      records: the training data.
      evaluation: records whose prompts no training record may share; None leaves this check out.
      control_tokens: control tokens of the tokenizer in use, besides what CONTROL matches.

    Returns:
      One finding for each check, also if it counts nothing, in the order of WORDS.
    """
    texts = [_Texts.of(record) for record in records]
    faults: dict[str, Iterable[str]] = {
        "duplicate": _duplicates(texts),
        "contradicting": _contradicting(texts),
        "repeats_prompt": (text.id for text in texts if text.repeats_prompt()),
        "control_token": _matching(records, _control_pattern(control_tokens)),
        "broken_text": _matching(records, BROKEN),
    }
    if evaluation is not None:
        faults["in_evaluation"] = _shared(texts, [_Texts.of(record) for record in evaluation])
    findings = []
    for name in WORDS:
        if name in faults:
            ids = list(faults[name])
            findings.append(Finding(name, len(ids), len(records), tuple(ids[:EXAMPLES])))
    pairs = [text for text in texts if text.places[0] < text.places[-1]]
    return [*findings, longer_chosen(pairs), words_disagree(pairs)]


def table(findings: Sequence[Finding]) -> str:
    """Format findings for a terminal: a table, and the notes below it."""
    rows = [["lint", "count", "of", "share", "for example"]]
    for finding in findings:
        share = f"{100 * finding.count / finding.of:.2f} %" if finding.of else "-"
        label = f"  {finding.name}: {WORDS[finding.name]}"
        numbers = [f"{finding.count:,}", f"{finding.of:,}", share]
        rows.append([label, *numbers, ", ".join(finding.examples)])
    notes = [f"  {finding.name}: {finding.note}" for finding in findings if finding.note]
    return "\n".join([*text_table(fitted(rows), left=(0, 4)), *notes])


def not_utf8(file: str | os.PathLike) -> list[int]:
    """Find all lines of a .json or .jsonl file (also compressed) that are not UTF-8.

    `sources.read` stops at the first such line, since nobody would notice a text that was skipped
    or repaired. With the whole list a user can repair the file at once.

    Returns:
      Numbers of the lines, from 1.

    Raises:
      DataError: see `text_files.lines`.
    """
    bad = []
    for number, line in text_files.lines(storage.as_path(file)):
        try:
            line.decode("utf-8")
        except UnicodeDecodeError:
            bad.append(number)
    return bad


class _Texts(NamedTuple):
    """A record whose texts have every run of white space as one space."""

    id: str
    prompt: str
    responses: tuple[str, ...]
    places: tuple[int, ...]
    label: bool | None
    last_turn: str

    @classmethod
    def of(cls, record: Record) -> _Texts:
        if isinstance(record.prompt, str):
            turns = list(LAST_TURN.finditer(record.prompt))
            groups = turns[-1].groupdict() if turns else {}
            turn = groups.get("human") or groups.get("instruction") or record.prompt
        else:
            turn = message_text(record.prompt[-1])
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
        """What must not be in the evaluation data: the prompt, or the text if there is none."""
        return self.prompt or " ".join(self.responses)

    def repeats_prompt(self) -> bool:
        """Whether a response begins with the prompt or its last turn."""
        starts = [text for text in (self.prompt, self.last_turn) if len(text) >= SHORTEST_REPEAT]
        return any(response.startswith(tuple(starts)) for response in self.responses)


def _plain(content: Content) -> str:
    """Content as one text; if there are several messages, with their roles."""
    if isinstance(content, str):
        text = content
    elif len(content) == 1:
        text = message_text(content[0])
    else:
        text = "\n".join(f"{message['role']}: {message_text(message)}" for message in content)
    return " ".join(text.split())


def _duplicates(texts: Sequence[_Texts]) -> Iterator[str]:
    """Yield "ID / ID OF THE FIRST" for every record that repeats an earlier one."""
    first: dict[tuple, str] = {}
    for text in texts:
        key = (text.prompt, text.responses, text.places, text.label)
        if key in first:
            yield f"{text.id} / {first[key]}"
        first.setdefault(key, text.id)


def _contradicting(texts: Sequence[_Texts]) -> Iterator[str]:
    """Yield "ID / ID" for every record with a claim that another record denies.

    Unpaired records contradict each other if the same response has both labels.
    """
    first: dict[tuple, str] = {}
    for text in texts:
        for claim in _claims(text):
            first.setdefault(claim, text.id)
    for text in texts:
        deniers = (first.get((prompt, b, a)) for prompt, a, b in _claims(text))
        if other := next(filter(None, deniers), None):
            yield f"{text.id} / {other}"


def _claims(text: _Texts) -> Iterator[tuple]:
    """Yield (prompt, better, worse) for every preference that a record states.

    A desirable response is better than None, an undesirable one is worse.
    """
    if text.label is not None:
        response = text.responses[0]
        better, worse = (response, None) if text.label else (None, response)
        yield text.prompt, better, worse
    ranked = zip(text.responses, text.places)
    for (better, place), (worse, lower) in itertools.combinations(ranked, 2):
        if better != worse and place < lower:
            yield text.prompt, better, worse


def _shared(texts: Sequence[_Texts], evaluation: Sequence[_Texts]) -> Iterator[str]:
    """Yield "ID / ID" for every record whose question is in the evaluation data."""
    first = {text.question: text.id for text in reversed(evaluation)}
    for text in texts:
        if text.question in first:
            yield f"{text.id} / {first[text.question]}"


def _control_pattern(tokens: Iterable[str]) -> re.Pattern:
    return re.compile("|".join([CONTROL.pattern, *map(re.escape, sorted(tokens))]))


def _matching(records: Sequence[Record], pattern: re.Pattern) -> Iterator[str]:
    """Yield the id of every record in which some text matches."""
    for record in records:
        if any(pattern.search(text) for text in _written(record)):
            yield record.id


def _written(record: Record) -> Iterator[str]:
    """Yield every text of a record, message by message."""
    for content in (record.prompt, *record.responses):
        if isinstance(content, str):
            yield content
        else:
            yield from map(message_text, content)


def longer_chosen(pairs: Sequence[_Texts]) -> Finding:
    """Measure how often the longer response (in characters) is chosen, with a 95 % interval."""
    differences = [len(pair.responses[0]) - len(pair.responses[-1]) for pair in pairs]
    ids = [pair.id for pair, difference in zip(pairs, differences) if difference > 0]
    unequal = sum(difference != 0 for difference in differences)
    note = ""
    if unequal:
        low, high = wilson_interval(len(ids), unequal)
        note = f"95 % interval {100 * low:.1f} % to {100 * high:.1f} %; 50 % is no bias"
    return Finding("longer_chosen", len(ids), unequal, tuple(ids[:EXAMPLES]), note)


def words_disagree(pairs: Sequence[_Texts]) -> Finding:
    """Find pairs whose words speak for the rejected response, see `label_noise`; surest first."""
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
