"""The examples of a stage: read, tokenised, split into training and held-out prompts."""

from __future__ import annotations

import dataclasses
import hashlib
import itertools
import json
from typing import NamedTuple

from ml_collections import ConfigDict

from dpojax.data import records, reviews, sources
from dpojax.data.records import DataError, Record
from dpojax.data.report import Report
from dpojax.data.tokenise import Example, tokenise
from dpojax.launch.config import tokens_policy

EMBEDDED = "reviews"


class StageData(NamedTuple):
    """Examples of one stage: the first `train` of them to train on, the others held out."""

    examples: list[Example]
    train: int
    reports: dict[str, Report]

    @property
    def training(self) -> range:
        return range(self.train)

    @property
    def held_out(self) -> range:
        return range(self.train, len(self.examples))


def load(
    data: ConfigDict, tokens: ConfigDict, tokenizer, *, best_only: bool, seed: int
) -> StageData:
    """Read, select and tokenise what `config.STAGE.data` names.

    Args:
      best_only: keep the best response alone (SFT), and no record labelled undesirable; otherwise
        records with one response are dropped, since they state no preference.
      seed: of the embedded task.

    Raises:
      DataError: see `sources.read` and `tokenise`; also when nothing is left to train or test on.
    """
    policy = tokens_policy(tokens)

    def read(source: str, split: str, limit: int) -> tuple[list[Record], Report]:
        if source == EMBEDDED:
            return _embedded(split, limit, best_only=best_only, seed=seed)
        columns = dict(pair.split("=", 1) for pair in data.columns.split(",") if pair)
        renames = {theirs.strip(): ours.strip() for ours, theirs in columns.items()}
        found, report = sources.load_records(
            source, split=split or None, form=data.form, columns=renames
        )
        return _first(_usable(found, report, best_only), limit, "beyond_limit", report), report

    embedded = data.source == EMBEDDED
    train, report = read(data.source, data.split or "train" * embedded, data.limit)
    reports = {"train": report}
    if data.eval_source or embedded:
        source = data.eval_source or data.source
        split = data.eval_split or "eval" * (source == EMBEDDED)
        test, test_report = read(source, split, data.eval_limit)
        reports["eval"] = test_report
    else:
        train, test = hold_out(train, data.eval_share)
        test = _first(test, data.eval_limit, "beyond_eval_limit", report)
        reports, test_report = {"train and eval": report}, report
    _require_both(data.source, train, test, report)
    examples, _ = tokenise(train, tokenizer, policy, report)
    held_out, _ = tokenise(test, tokenizer, policy, test_report)
    _require_both(data.source, examples, held_out, report)
    return StageData(examples + held_out, len(examples), reports)


def hold_out(records: list[Record], share: float) -> tuple[list[Record], list[Record]]:
    """Training and held-out records, by whole prompts: those whose prompt hashes below `share`.

    The same prompt falls on the same side in every stage and for every tokenizer. Records without
    a prompt (plain texts) go by their best response. If no prompt hashes so low, the lowest one is
    held out.
    """

    def place(record: Record) -> float:
        named = json.dumps(record.prompt or record.responses[0])
        return int.from_bytes(hashlib.sha256(named.encode()).digest()[:8]) / 2**64

    places = [place(record) for record in records]
    threshold = max(share, min(places, default=0) + 1e-15)
    train = [record for record, p in zip(records, places) if p >= threshold]
    return train, [record for record, p in zip(records, places) if p < threshold]


def _embedded(split, limit, *, best_only, seed) -> tuple[list[Record], Report]:
    if best_only:
        rows = [{"text": text} for text in reviews.texts(split, limit, seed)]
    else:
        rows = reviews.preferences(split, limit, seed)
    report = Report()
    report.read = len(rows)
    numbered = zip(rows, itertools.count(1))
    return [records.parse(row, f"reviews/{split}:{number}") for row, number in numbered], report


def _usable(found: list[Record], report: Report, best_only: bool) -> list[Record]:
    """The records that the stage can learn from; the others are counted."""
    usable = []
    for record in found:
        if best_only and record.label is False:
            report.count("dropped", "undesirable", record.id)
        elif not best_only and len(record.responses) < 2:
            report.count("dropped", "one_response", record.id)
        elif best_only:
            best = record.responses[:1]
            usable.append(dataclasses.replace(record, responses=best, label=None))
        else:
            usable.append(record)
    return usable


def _first(found: list[Record], limit: int, cause: str, report: Report) -> list[Record]:
    """At most `limit` records (0 is all); the others are counted under `cause`."""
    kept = found[: limit or None]
    for record in found[len(kept) :]:
        report.count("dropped", cause, record.id)
    return kept


def _require_both(source: str, train: list, test: list, report: Report) -> None:
    if not train or not test:
        raise DataError(
            f"{source}: {len(train)} examples to train on and {len(test)} held out; both are "
            "needed: give more records, another eval_share, or an eval_source. What became of the "
            f"records:\n{report}"
        )
