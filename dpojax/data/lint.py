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

import hashlib
import itertools
import json
import os
import re
from array import array
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np

from dpojax import storage
from dpojax.data import label_noise, text_files
from dpojax.data.records import Content, Record, message_text
from dpojax.data.report import EXAMPLES, Tally
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


_IdentifiedPair = tuple[str, str, str, str]  # id, prompt, chosen, rejected


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
    records: Iterable[Record],
    *,
    evaluation: Iterable[Record] | None = None,
    control_tokens: Iterable[str] = (),
) -> list[Finding]:
    """Run all checks on records, see `Linter`."""
    linter = Linter(evaluation=evaluation, control_tokens=control_tokens)
    for record in records:
        linter.add(record)
    return linter.findings()


class Linter:
    """Runs all checks on records that come one after the other.

    Of each record it keeps the id and hashes, not the texts: about 200 bytes, whatever its length.
    Only `words_disagree` keeps texts, of at most `label_noise.MOST_PAIRS` pairs.

    Args:
      evaluation: records whose prompts no training record may share; None leaves this check out.
      control_tokens: control tokens of the tokenizer in use, besides what CONTROL matches.
    """

    def __init__(
        self,
        *,
        evaluation: Iterable[Record] | None = None,
        control_tokens: Iterable[str] = (),
    ):
        self._control = re.compile(
            "|".join([CONTROL.pattern, *map(re.escape, sorted(control_tokens))])
        )
        self._questions = None if evaluation is None else _first_ids(evaluation)
        self._ids: list[str] = []
        self._records = array("Q")  # a hash of each record
        self._claims = _Claims()
        self._seen: dict[str, Tally] = {name: Tally() for name in WORDS}
        self._unequal = 0  # pairs of different lengths
        self._sample = _PairSample()

    def add(self, record: Record) -> None:
        """Look at the next record of the training data."""
        text = _Texts.of(record)
        for claim in _claims(text):
            self._claims.add(len(self._ids), *claim)
        self._ids.append(text.id)
        self._records.append(_hash(text.prompt, text.responses, text.places, text.label))
        if text.repeats_prompt():
            self._seen["repeats_prompt"].add(1, [text.id])
        for name, pattern in (("control_token", self._control), ("broken_text", BROKEN)):
            if any(map(pattern.search, _written(record))):
                self._seen[name].add(1, [text.id])
        if self._questions and (other := self._questions.get(_hash(text.question))):
            self._seen["in_evaluation"].add(1, [f"{text.id} / {other}"])
        if text.places[0] < text.places[-1]:
            self._add_pair(text)

    def _add_pair(self, text: _Texts) -> None:
        chosen, rejected = text.responses[0], text.responses[-1]
        self._unequal += len(chosen) != len(rejected)
        if len(chosen) > len(rejected):
            self._seen["longer_chosen"].add(1, [text.id])
        self._sample.add((text.id, text.prompt, chosen, rejected))

    def findings(self) -> list[Finding]:
        """One finding for each check, also if it counts nothing, in the order of WORDS."""
        self._seen["duplicate"] = _tally(self._duplicates())
        self._seen["contradicting"] = _tally(self._claims.denied(self._ids))
        faults = [
            Finding(name, tally.count, len(self._ids), tuple(tally.examples))
            for name, tally in self._seen.items()
            if name not in MEASURES and (name != "in_evaluation" or self._questions is not None)
        ]
        longer = _longer_chosen(self._seen["longer_chosen"], self._unequal)
        return [*faults, longer, words_disagree(self._sample.pairs, self._sample.step)]

    def _duplicates(self) -> Iterator[str]:
        """Yield "ID / ID OF THE FIRST" for every record that repeats an earlier one."""
        hashes = np.asarray(self._records)
        _, firsts, group = np.unique(hashes, return_index=True, return_inverse=True)
        for index, first in enumerate(firsts[group].tolist()):
            if first != index:
                yield f"{self._ids[index]} / {self._ids[first]}"


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


class _Claims:
    """Which records state that one response to a prompt is better than another."""

    def __init__(self) -> None:
        self._of_record = array("Q")  # the record that makes each claim, by its number
        self._stated, self._denial = array("Q"), array("Q")  # hashes of it, and of its contrary

    def add(self, record: int, prompt: str, better: str | None, worse: str | None) -> None:
        self._of_record.append(record)
        self._stated.append(_hash(prompt, better, worse))
        self._denial.append(_hash(prompt, worse, better))

    def denied(self, ids: Sequence[str]) -> Iterator[str]:
        """Yield "ID / ID" for every record with a claim that another record denies.

        Unpaired records contradict each other if the same response has both labels.
        """
        of_record, denial = np.asarray(self._of_record), np.asarray(self._denial)
        stated, first_claims = np.unique(np.asarray(self._stated), return_index=True)
        if not len(stated):
            return
        places = np.minimum(np.searchsorted(stated, denial), len(stated) - 1)
        denied = np.flatnonzero(stated[places] == denial)
        records, firsts = np.unique(of_record[denied], return_index=True)
        others = of_record[first_claims[places[denied[firsts]]]]
        for record, other in zip(records.tolist(), others.tolist()):
            yield f"{ids[record]} / {ids[other]}"


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


def _first_ids(evaluation: Iterable[Record]) -> dict[int, str]:
    """The first record with each question, by the question's hash."""
    first: dict[int, str] = {}
    for record in evaluation:
        first.setdefault(_hash(_Texts.of(record).question), record.id)
    return first


def _hash(*parts: Any) -> int:
    """64 bits of the texts: two of a million records collide with a probability of 3e-8."""
    return int.from_bytes(hashlib.blake2b(json.dumps(parts).encode(), digest_size=8).digest())


def _tally(ids: Iterable[str]) -> Tally:
    tally = Tally()
    for id in ids:
        tally.add(1, [id])
    return tally


def _written(record: Record) -> Iterator[str]:
    """Yield every text of a record, message by message."""
    for content in (record.prompt, *record.responses):
        if isinstance(content, str):
            yield content
        else:
            yield from map(message_text, content)


def _longer_chosen(longer: Tally, unequal: int) -> Finding:
    """How often the longer response (in characters) is chosen, with a 95 % interval."""
    note = ""
    if unequal:
        low, high = wilson_interval(longer.count, unequal)
        note = f"95 % interval {100 * low:.1f} % to {100 * high:.1f} %; 50 % is no bias"
    return Finding("longer_chosen", longer.count, unequal, tuple(longer.examples), note)


class _PairSample:
    """Every `step`-th of the pairs, of which there are at most `label_noise.MOST_PAIRS`.

    `step` is a power of two: whenever there are too many, every second one goes.
    """

    def __init__(self) -> None:
        self.pairs: list[_IdentifiedPair] = []
        self.step = 1
        self._number = 0  # of the next pair

    def add(self, pair: _IdentifiedPair) -> None:
        if self._number % self.step == 0 and len(self.pairs) == label_noise.MOST_PAIRS:
            self.pairs, self.step = self.pairs[::2], 2 * self.step
        if self._number % self.step == 0:
            self.pairs.append(pair)
        self._number += 1


def words_disagree(pairs: Sequence[_IdentifiedPair], step: int) -> Finding:
    """Find pairs whose words speak for the rejected response, see `label_noise`; surest first.

    Args:
      pairs: every `step`-th pair of the data.
    """
    pairs = [pair for pair in pairs if pair[-2] != pair[-1]]
    if len(pairs) < label_noise.FEWEST_PAIRS:
        note = f"not checked: fewer than {label_noise.FEWEST_PAIRS} pairs"
        return Finding("words_disagree", 0, 0, (), note)
    chance = label_noise.held_out_chances([texts for _, *texts in pairs])
    wrong = [int(i) for i in np.argsort(chance, kind="stable") if chance[i] < 1 - SURE]
    sure = int(np.sum(np.maximum(chance, 1 - chance) > SURE))
    note = (
        f"it ranks {100 * np.mean(chance > 0.5):.1f} % of held-out pairs as labelled; it is sure "
        f"(> {100 * SURE:.0f} %) of {sure:,} and contradicts {100 * len(wrong) / max(sure, 1):.1f} "
        f"% of those: far above {100 - 100 * SURE:.0f} % it is overconfident, and no evidence"
    )
    note += f"; one pair in {step} was looked at" if step > 1 else ""
    ids = tuple(pairs[i][0] for i in wrong[:EXAMPLES])
    return Finding("words_disagree", len(wrong), len(pairs), ids, note)
