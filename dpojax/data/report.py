"""A report on a data set: how many records were dropped or cut and why, lengths, BOS and EOS.

`sources.load_records` and `tokenise.tokenise` fill a `Report`. A run prints it and saves it, so
that no record is dropped, cut or changed without a trace.
"""

from __future__ import annotations

import dataclasses
import json
from collections import Counter, defaultdict
from collections.abc import Sequence
from typing import Any

import numpy as np

from dpojax.data.records import DataError
from dpojax.tables import fitted, text_table

# Every cause, and how the printed table explains it. `Report.count` accepts no other cause.
CAUSES = {
    "prompts_differ": "chosen and rejected answer different prompts",
    "prompt_not_in_dialogue": "the prompt is not the start of chosen and rejected",
    "no_prompt": "answers without a prompt",
    "no_answer": "a dialogue does not end with a turn of the assistant",
    "empty_dialogue": "a dialogue has no messages",
    "bad_message": "a message is not {role: text, content: text}",
    "unknown_role": "a message has a role that is not known",
    "system_differs": "system text and the dialogue's system turn differ",
    "no_form": "the fields are those of no known form",
    "field_missing": "a field is missing",
    "field_null": "a field is null",
    "field_type": "a field has another type than its form says",
    "not_unicode": "a text holds half of a surrogate pair",
    "too_few_responses": "a list has too few responses",
    "no_order": "nothing says which response is the best",
    "bad_score": "a score or rank is no finite number",
    "no_score": "the loss needs scores, and the record has none",
    "bad_label": "a label is not what its form says",
    "bad_verdict": "nothing says which of the two answers is better",
    "bad_weight": "a weight is no finite number, 0 or more",
    "zero_weight": "weight 0: the record counts for nothing",
    "media": "images, video or audio, which no model here reads",
    "made_dialogue": "a prompt with system text, history or tools became a dialogue",
    "json_text": "messages or a list, written as JSON text, were read",
    "all_tied": "all responses have the same rank or score",
    "one_response": "one response alone states no preference",
    "no_label": "one response without a label",
    "split_in_two": "read once, and counted from there on as two labelled responses",
    "between_best_and_worst": "left out, as only the best and the worst get a label",
    "undesirable": "labelled undesirable, and nothing to imitate",
    "beyond_limit": "beyond `limit` records",
    "beyond_eval_limit": "held out, but beyond `eval_limit` examples",
    "empty": "a response has no text",
    "identical": "responses are equal",
    "identical_after_cut": "responses are equal once cut",
    "empty_prompt": "prompt is empty and the tokenizer has no start token",
    "template_refuses": "chat template refuses the messages",
    "ends_without_answer": "a dialogue does not end with a turn of the assistant",
    "turn_not_found": "chat template renders a turn where it cannot be found",
    "tool_call_not_rendered": "chat template leaves out the call that is the answer",
    "template_strips": "chat template leaves out or changes a part of an answer",
    "template_without_tools": "chat template does not read the record's tools",
    "template_without_options": "chat template does not read all chat_template_kwargs",
    "all_turns_scored": "several assistant turns; all scored (tokens.assistant_turns)",
    "last_turn_scored": "several assistant turns; last scored (tokens.assistant_turns)",
    "other_end": "chat template ends an answer with another token; EOS was added",
    "template_changes_prompt": "chat template writes another prompt before an answer",
    "too_long": "prompt + longest response exceed max_length",
    "prompt_too_long": "prompt exceeds max_prompt_length",
    "nothing_left": "a response has no token left",
    "one_token": "the text has one token, and the tokenizer puts no start before it",
    "prompt_start": "the prompt lost its start",
    "response_end": "a response lost its end, and its EOS",
    "boundary_merge": "a token would span prompt and response; encoded apart",
    "special_in_text": "a special token is written out in the text",
    "eos_inside": "EOS stands inside a response",
}
OUTCOMES = {"dropped": "dropped", "cut": "kept, but cut", "noted": "noted (not a reason to drop)"}
EXAMPLES = 2


@dataclasses.dataclass
class Tally:
    """How many records have one outcome for one cause, and the ids of the first `EXAMPLES`.

    `why` is what the first of them was refused with, such as a template's own words.
    """

    count: int = 0
    examples: list[str] = dataclasses.field(default_factory=list)
    why: str = ""

    def add(self, count: int, examples: Sequence[str], why: str = "") -> None:
        """Add `count` records, of which `examples` are some ids."""
        self.count += count
        self.examples += examples[: EXAMPLES - len(self.examples)]
        self.why = self.why or why

    def to_content(self) -> dict[str, Any]:
        """The tally in types that JSON can hold."""
        content = dataclasses.asdict(self)
        return content if self.why else {k: v for k, v in content.items() if k != "why"}


class Report:
    """Counts and statistics of one data set, from the rows of a file to token ids.

    Attributes:
      read: records read, usable or not.
      kept: records that became examples (the cut ones included).
      tallies: outcome (`dropped`, `cut`, `noted`) -> cause -> Tally.
      unread: name of a field that was not read -> Tally of the records that have it.
      remarks: sentences about the data as a whole, such as what was not read.
      lengths: a histogram for each of `prompt`, `response`, `chosen`, `rejected` and `longest`
        (prompt + longest response): number of tokens -> how many. It covers every encoded record.
        Tokens are counted before truncation, with BOS and EOS.
      starts: number of BOS tokens in the prompt -> number of kept examples.
      ends: `with EOS` or `without EOS` -> number of kept responses.
    """

    def __init__(self) -> None:
        self.read = 0
        self.kept = 0
        self.tallies: dict[str, dict[str, Tally]] = {name: {} for name in OUTCOMES}
        self.unread: dict[str, Tally] = {}
        self.remarks: list[str] = []
        self.lengths: dict[str, Counter[int]] = defaultdict(Counter)
        self.starts: dict[int, int] = defaultdict(int)
        self.ends: dict[str, int] = defaultdict(int)

    def count(self, outcome: str, cause: str, id: str, why: str = "") -> None:
        """Count record `id` under an outcome and a cause; `why` may say more about this record.

        Raises:
          KeyError: the outcome is not in OUTCOMES, or the cause not in CAUSES. This is a bug of the
            caller; a test checks every cause that the code names.
        """
        if cause not in CAUSES:
            raise KeyError(f"cause {cause!r} has no explanation: add it to report.CAUSES")
        self.tallies[outcome].setdefault(cause, Tally()).add(1, [id], _encodable(why))

    def count_field(self, name: str, id: str) -> None:
        """Count field `name` of record `id`, which was not read."""
        self.unread.setdefault(_encodable(name), Tally()).add(1, [id])

    def add(self, other: Report) -> None:
        """Add the counts of another report, such as that of the next part of the same data."""
        self.read += other.read
        self.kept += other.kept
        for outcome, tallies in other.tallies.items():
            for cause, tally in tallies.items():
                mine = self.tallies[outcome].setdefault(cause, Tally())
                mine.add(tally.count, tally.examples, tally.why)
        for name, tally in other.unread.items():
            self.unread.setdefault(name, Tally()).add(tally.count, tally.examples)
        self.remarks += other.remarks
        for name, counts in other.lengths.items():
            self.lengths[name].update(counts)
        for number, count in other.starts.items():
            self.starts[number] += count
        for name, count in other.ends.items():
            self.ends[name] += count

    def measure(self, prompt: int, responses: Sequence[int]) -> None:
        """Add the numbers of tokens of an encoded record to the histograms in `lengths`."""
        self.lengths["prompt"][prompt] += 1
        self.lengths["response"].update(responses)
        if len(responses) == 2:
            chosen, rejected = responses
            self.lengths["chosen"][chosen] += 1
            self.lengths["rejected"][rejected] += 1
        self.lengths["longest"][prompt + max(responses)] += 1

    @property
    def dropped(self) -> int:
        """Number of dropped records, over all causes."""
        return sum(tally.count for tally in self.tallies["dropped"].values())

    def number(self, outcome: str, cause: str) -> int:
        """How many records were counted under an outcome and a cause."""
        return self.tallies[outcome].get(cause, Tally()).count

    def require_some(self) -> None:
        """Raise DataError with the table of causes if every record was dropped."""
        if self.dropped == self.read:
            parts = [_causes_table(self), _details(self), _fields_table(self)]
            table = "\n\n".join(filter(None, parts))
            raise DataError(f"all {self.read:,} records were dropped:\n{table}")

    def statistics(self) -> dict[str, dict[str, float]]:
        """Statistics of each histogram in `lengths`: name -> count, mean, median, p95 and max."""
        statistics = {}
        for name, counts in self.lengths.items():
            tokens = np.repeat(list(counts), list(counts.values()))  # one number per prompt, ...
            if len(tokens):
                statistics[name] = {
                    "count": len(tokens),
                    "mean": float(np.mean(tokens)),
                    "median": float(np.median(tokens)),
                    "p95": float(np.percentile(tokens, 95)),
                    "max": int(np.max(tokens)),
                }
        return statistics

    def to_content(self) -> dict[str, Any]:
        """The whole report in types that JSON can hold; `from_content` reads it back."""
        return {
            "read": self.read,
            "kept": self.kept,
            "tallies": {
                outcome: {cause: tally.to_content() for cause, tally in tallies.items()}
                for outcome, tallies in self.tallies.items()
            },
            "unread": {name: tally.to_content() for name, tally in self.unread.items()},
            "remarks": self.remarks,
            "lengths": {name: [*counts.items()] for name, counts in self.lengths.items()},
            "starts": [*self.starts.items()],
            "ends": dict(self.ends),
        }

    @classmethod
    def from_content(cls, content: dict[str, Any]) -> Report:
        """The report of which `to_content` returned `content`."""
        report = cls()
        report.read, report.kept = content["read"], content["kept"]
        for outcome, tallies in content["tallies"].items():
            report.tallies[outcome] = {cause: Tally(**tally) for cause, tally in tallies.items()}
        report.unread = {name: Tally(**tally) for name, tally in content["unread"].items()}
        report.remarks = list(content["remarks"])
        for name, counts in content["lengths"].items():
            report.lengths[name] = Counter(dict(counts))
        report.starts.update(content["starts"])
        report.ends.update(content["ends"])
        return report

    def to_json(self) -> str:
        """The report as JSON for readers: like `to_content`, but with statistics of the lengths."""
        plain = self.to_content()
        tallies = plain["tallies"]
        content = {
            "read": self.read,
            "kept": self.kept,
            "cut": tallies["cut"],
            "dropped": tallies["dropped"],
            "noted": tallies["noted"],
            "fields not read": plain["unread"],
            "remarks": self.remarks,
            "tokens": self.statistics(),
            "bos": {str(number): count for number, count in sorted(self.starts.items())},
            "eos": dict(self.ends),
        }
        return json.dumps(content, indent=2)

    def __str__(self) -> str:
        parts = [f"{self.read:,} records read, {self.kept:,} kept, {self.dropped:,} dropped"]
        parts += ["\n".join(self.remarks)]
        parts += [
            _causes_table(self),
            _details(self),
            _fields_table(self),
            _lengths_table(self),
            _ends_table(self),
        ]
        return "\n\n".join(part for part in parts if part)


def _encodable(text: str) -> str:
    """The text with escapes for halves of surrogate pairs, which no stream and no file takes."""
    return text if text.isascii() else text.encode("utf-8", "backslashreplace").decode()


def _causes_table(report: Report) -> str:
    rows = []
    for outcome, title in OUTCOMES.items():
        tallies = report.tallies[outcome]
        if not tallies:
            continue
        rows.append([title, "records", "share", "for example"])
        for cause in sorted(tallies, key=lambda cause: -tallies[cause].count):
            tally = tallies[cause]
            share = f"{100 * tally.count / max(report.read, 1):.2f} %"
            ids = ", ".join(tally.examples)
            label = f"  {cause}: {CAUSES[cause]}"
            rows.append([label, f"{tally.count:,}", share, ids])
    return "\n".join(text_table(fitted(rows), left=(0, 3)))


def _details(report: Report) -> str:
    """What is wrong with the first record of each cause, one line each."""
    lines = []
    for tallies in report.tallies.values():
        for cause, tally in tallies.items():
            id = tally.examples[0]
            if tally.why:
                why = tally.why if tally.why.startswith(id) else f"{id}: {tally.why}"
                lines.append(f"{cause}: {why}")
    return "\n".join(lines)


def _fields_table(report: Report) -> str:
    if not report.unread:
        return ""
    rows = [["fields that were not read", "records", "share", "for example"]]
    for name, tally in sorted(report.unread.items(), key=lambda item: (-item[1].count, item[0])):
        share = f"{100 * tally.count / max(report.read, 1):.2f} %"
        rows.append([f"  {name}", f"{tally.count:,}", share, ", ".join(tally.examples)])
    return "\n".join(text_table(fitted(rows), left=(0, 3)))


def _lengths_table(report: Report) -> str:
    rows = [["tokens before truncation", "mean", "median", "95 %", "max"]]
    for name, row in report.statistics().items():
        label = "prompt + longest response" if name == "longest" else name
        numbers = [f"{row[key]:,.1f}" for key in ("mean", "median", "p95")]
        rows.append([f"  {label}", *numbers, f"{row['max']:,}"])
    return "\n".join(text_table(rows)) if len(rows) > 1 else ""


def _ends_table(report: Report) -> str:
    rows = [["start of prompt", "examples"]]
    for number, count in sorted(report.starts.items()):
        rows.append([f"  {number} x BOS", f"{count:,}"])
    if report.ends:
        rows.append(["end of response", "responses"])
    rows += [[f"  {name}", f"{count:,}"] for name, count in report.ends.items()]
    return "\n".join(text_table(rows)) if len(rows) > 1 else ""
