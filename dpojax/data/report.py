"""What became of every record: counts per cause with examples, lengths, boundaries, special tokens.

A `Report` is filled by `sources.load_records` and `tokenise.tokenise`, printed to the user and
saved with the run, so that nothing is dropped, cut or repaired in silence.
"""

from __future__ import annotations

import dataclasses
import json
from collections import Counter, defaultdict
from typing import Any

import numpy as np

from dpojax.data.records import DataError

# Every cause, in the words of the table. A cause that is not here is a bug, and raises.
CAUSES = {
    "prompts_differ": "chosen and rejected answer different prompts",
    "all_tied": "all responses have the same rank or score",
    "one_response": "one response alone states no preference",
    "no_label": "one response without a label",
    "split_in_two": "read once, and counted from there on as two labelled responses",
    "between_best_and_worst": "responses left out, as only the best and the worst get a label",
    "undesirable": "labelled undesirable, and nothing to imitate",
    "beyond_limit": "beyond `limit` records",
    "beyond_eval_limit": "held out, but beyond `eval_limit` examples",
    "empty": "a response has no text",
    "identical": "responses are equal",
    "identical_after_cut": "responses are equal once cut",
    "empty_prompt": "prompt is empty and the tokenizer has no start token",
    "template_changes_prompt": "chat template renders the prompt differently before an answer",
    "too_long": "prompt + longest response exceed max_length",
    "prompt_too_long": "prompt exceeds max_prompt_length",
    "nothing_left": "a response has no token left",
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
    """How many records met one fate for one cause, and the ids of the first two."""

    count: int = 0
    examples: list[str] = dataclasses.field(default_factory=list)


class Report:
    """Counts and statistics of one data set on its way from rows to token ids.

    Attributes:
      read: records read, usable or not.
      kept: records that became examples (the cut ones included).
      tallies: outcome (`dropped`, `cut`, `noted`) -> cause -> Tally.
      lengths: name (`prompt`, `response`, `chosen`, `rejected`, `longest` = prompt + longest
        response) -> number of tokens, before truncation, with BOS and EOS -> how many of them had
        so many, of every record that was encoded.
      starts: number of BOS tokens in the prompt -> number of kept examples.
      ends: `with EOS` or `without EOS` -> number of kept responses.
    """

    def __init__(self) -> None:
        self.read = 0
        self.kept = 0
        self.tallies: dict[str, dict[str, Tally]] = {name: {} for name in OUTCOMES}
        self.lengths: dict[str, Counter[int]] = defaultdict(Counter)
        self.starts: dict[int, int] = defaultdict(int)
        self.ends: dict[str, int] = defaultdict(int)

    def count(self, outcome: str, cause: str, id: str) -> None:
        """Adds record `id` under `outcome` and `cause`; both must be known (KeyError)."""
        CAUSES[cause]
        tally = self.tallies[outcome].setdefault(cause, Tally())
        tally.count += 1
        if len(tally.examples) < EXAMPLES:
            tally.examples.append(id)

    @property
    def dropped(self) -> int:
        """Records that were dropped, for whatever cause."""
        return sum(tally.count for tally in self.tallies["dropped"].values())

    def number(self, outcome: str, cause: str) -> int:
        """How many records were counted under `outcome` and `cause`; 0 if none."""
        return self.tallies[outcome].get(cause, Tally()).count

    def require_some(self) -> None:
        """Raises DataError, with the table of causes, if every record was dropped."""
        if self.dropped == self.read:
            raise DataError(f"all {self.read:,} records were dropped:\n{self._causes()}")

    def statistics(self) -> dict[str, dict[str, float]]:
        """Length statistics in tokens: name -> mean, median, 95th percentile and max."""
        expanded = {
            name: np.repeat(list(counts), list(counts.values()))
            for name, counts in self.lengths.items()
        }
        return {
            name: {
                "count": len(values),
                "mean": float(np.mean(values)),
                "median": float(np.median(values)),
                "p95": float(np.percentile(values, 95)),
                "max": int(np.max(values)),
            }
            for name, values in expanded.items()
            if len(values)
        }

    def to_content(self) -> dict[str, Any]:
        """All that the report holds, as JSON can keep it; `from_content` reads it back."""
        return {
            "read": self.read,
            "kept": self.kept,
            "tallies": {
                outcome: {cause: dataclasses.asdict(tally) for cause, tally in tallies.items()}
                for outcome, tallies in self.tallies.items()
            },
            "lengths": {name: [*counts.items()] for name, counts in self.lengths.items()},
            "starts": [*self.starts.items()],
            "ends": dict(self.ends),
        }

    @classmethod
    def from_content(cls, content: dict[str, Any]) -> Report:
        report = cls()
        report.read, report.kept = content["read"], content["kept"]
        for outcome, tallies in content["tallies"].items():
            report.tallies[outcome] = {cause: Tally(**tally) for cause, tally in tallies.items()}
        for name, counts in content["lengths"].items():
            report.lengths[name] = Counter(dict(counts))
        report.starts.update(content["starts"])
        report.ends.update(content["ends"])
        return report

    def to_json(self) -> str:
        """Everything in the report as JSON text; tallies, lengths, BOS and EOS by name."""
        content = {
            "read": self.read,
            "kept": self.kept,
            "cut": {k: dataclasses.asdict(v) for k, v in self.tallies["cut"].items()},
            "dropped": {k: dataclasses.asdict(v) for k, v in self.tallies["dropped"].items()},
            "noted": {k: dataclasses.asdict(v) for k, v in self.tallies["noted"].items()},
            "tokens": self.statistics(),
            "bos": {str(number): count for number, count in sorted(self.starts.items())},
            "eos": dict(self.ends),
        }
        return json.dumps(content, indent=2)

    def __str__(self) -> str:
        parts = [f"{self.read:,} records read, {self.kept:,} kept, {self.dropped:,} dropped"]
        parts += [self._causes(), self._lengths(), self._specials()]
        return "\n\n".join(part for part in parts if part)

    def _causes(self) -> str:
        rows = []
        for outcome, title in OUTCOMES.items():
            tallies = self.tallies[outcome]
            if not tallies:
                continue
            rows.append([title, "records", "share", "for example"])
            for cause, tally in sorted(tallies.items(), key=lambda item: -item[1].count):
                share = f"{100 * tally.count / max(self.read, 1):.2f} %"
                found = ", ".join(tally.examples)
                rows.append([f"  {cause}: {CAUSES[cause]}", f"{tally.count:,}", share, found])
        return aligned(rows, left=(0, 3))

    def _lengths(self) -> str:
        rows = [["tokens before truncation", "mean", "median", "95 %", "max"]]
        for name, row in self.statistics().items():
            label = "prompt + longest response" if name == "longest" else name
            numbers = [f"{row[key]:,.1f}" for key in ("mean", "median", "p95")]
            rows.append([f"  {label}", *numbers, f"{row['max']:,}"])
        return aligned(rows) if len(rows) > 1 else ""

    def _specials(self) -> str:
        rows = [["start of prompt", "examples"]]
        for number, count in sorted(self.starts.items()):
            rows.append([f"  {number} x BOS", f"{count:,}"])
        if self.ends:
            rows.append(["end of response", "responses"])
        rows += [[f"  {name}", f"{count:,}"] for name, count in self.ends.items()]
        return aligned(rows) if len(rows) > 1 else ""


def aligned(rows: list[list[str]], left: tuple[int, ...] = (0,)) -> str:
    """Rows of text as aligned columns; those in `left` start, the others end, at one place."""
    widths = [max(map(len, column)) for column in zip(*rows)]
    lines = []
    for row in rows:
        cells = [
            cell.ljust(width) if index in left else cell.rjust(width)
            for index, (cell, width) in enumerate(zip(row, widths))
        ]
        lines.append("  ".join(cells).rstrip())
    return "\n".join(lines)
