"""The examples of a stage: read, split into training and held-out prompts, tokenised."""

from __future__ import annotations

import dataclasses
import hashlib
import itertools
import json
import pathlib
from collections.abc import Sequence
from typing import Literal, NamedTuple

from ml_collections import ConfigDict

from dpojax.config.checks import tokens_policy
from dpojax.data import records, reviews, sources, unpaired
from dpojax.data.records import DataError, Record
from dpojax.data.report import Report
from dpojax.data.tokenise import Example, tokenise

EMBEDDED = "reviews"


class DataRequirements(NamedTuple):
    """What a stage learns from.

    Attributes:
      form: "best": the best response alone, and none that is labelled undesirable (SFT). "ranked":
        all responses of the records that state a preference; a single response is dropped.
        "labelled": single responses with a label, see `unpaired.split`; a single response without
        one is dropped.
      mismatched: give every example an unrelated second response, see `unpaired.with_mismatched`.
      scores: every record must have scores.
      ties: keep ranked records whose responses are all tied, which are dropped otherwise.
      chosen: of a ranked record to train on, the best response is all that is computed.
    """

    form: Literal["best", "ranked", "labelled"] = "ranked"
    mismatched: bool = False
    scores: bool = False
    ties: bool = False
    chosen: bool = False


class StageData(NamedTuple):
    """Examples of one stage: the first `train` of them to train on, the others held out; and the
    names of their classes, where they have any.

    file: where they are kept for the next run, if anywhere; see `stages.token_cache`.
    found: whether they were read from there.
    """

    examples: Sequence[Example]
    train: int
    reports: dict[str, Report]
    labels: tuple[str, ...] = ()
    file: pathlib.Path | None = None
    found: bool = False

    @property
    def training(self) -> range:
        return range(self.train)

    @property
    def held_out(self) -> range:
        return range(self.train, len(self.examples))


def load(
    data: ConfigDict, tokens: ConfigDict, tokenizer, *, wants: DataRequirements, seed: int
) -> StageData:
    """Read, select and tokenise what `config.STAGE.data` names.

    The limits count records, of which a labelled one may give two examples.

    Args:
      seed: of the embedded task.

    Raises:
      DataError: see `sources.read`, `tokenise` and `unpaired.with_mismatched`; also when nothing is
        left to train or test on, a record lacks the scores that are wanted, or all labels agree.
    """
    policy = tokens_policy(tokens)

    def read(source: str, split: str, limit: int) -> tuple[list[Record], Report]:
        if source == EMBEDDED:
            return _embedded(split, limit, form=wants.form, seed=seed)
        found, report = sources.load_records(
            source, split=split or None, form=data.form, columns=renames(data)
        )
        found = _usable(found, report, wants)
        return _first(found, limit, "beyond_limit", report), report

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
    require_both(data.source, train, test, report)
    if wants.scores:
        _require_scores(train + test)
    if wants.form == "labelled":
        train = _labelled(train, policy.identical, report)
        test = _labelled(test, policy.identical, test_report)
    examples, _ = tokenise(train, tokenizer, policy, report)
    held_out, _ = tokenise(test, tokenizer, policy, test_report)
    require_both(data.source, examples, held_out, report)
    if wants.form == "labelled":
        _require_both_labels(data.source, examples)
    if wants.chosen:
        examples = [_chosen(example) for example in examples]
    if wants.mismatched:
        examples, held_out = (
            unpaired.with_mismatched(part, policy.max_length) for part in (examples, held_out)
        )
    return StageData(examples + held_out, len(examples), reports)


def renames(data: ConfigDict) -> dict[str, str]:
    """data.columns as `sources.load_records` wants it: the file's name -> ours."""
    columns = dict(pair.split("=", 1) for pair in data.columns.split(",") if pair)
    return {theirs.strip(): ours.strip() for ours, theirs in columns.items()}


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


def _embedded(split, limit, *, form, seed) -> tuple[list[Record], Report]:
    if form == "best":
        rows = [{"text": text} for text in reviews.texts(split, limit, seed)]
    else:
        rows = reviews.preferences(split, limit, seed)
    report = Report()
    report.read = len(rows)
    numbered = zip(rows, itertools.count(1))
    return [records.parse(row, f"reviews/{split}:{number}") for row, number in numbered], report


def _usable(found: list[Record], report: Report, wants: DataRequirements) -> list[Record]:
    """The records that the stage can learn from; the others are counted."""
    usable = []
    for record in found:
        cause = _unusable(record, wants)
        if cause:
            report.count("dropped", cause, record.id)
        else:
            usable.append(_best(record) if wants.form == "best" else record)
    return usable


def _unusable(record: Record, wants: DataRequirements) -> str | None:
    """Why the stage cannot learn from a record, or None if it can."""
    single = len(record.responses) == 1
    if record.all_tied and not (wants.form == "ranked" and wants.ties):
        return "all_tied"
    if wants.form == "best" and record.label is False:
        return "undesirable"
    if wants.form == "ranked" and single:
        return "one_response"
    if wants.form == "labelled" and single and record.label is None:
        return "no_label"
    return None


def _best(record: Record) -> Record:
    scores = None if record.scores is None else record.scores[:1]
    return dataclasses.replace(
        record, responses=record.responses[:1], label=None, scores=scores, rank=None
    )


def _chosen(example: Example) -> Example:
    """Its best response alone."""
    first = lambda values: None if values is None else values[:1]
    lists = {name: first(getattr(example, name)) for name in ("responses", "cut", "scores", "rank")}
    return example._replace(**lists)


def _labelled(found: list[Record], identical: str, report: Report) -> list[Record]:
    """Every record split; the report says so, and what was left out, and counts the parts.

    identical: the policy for a best response that equals the worst, which `tokenise` sees no more.
    """
    parts = []
    for record in found:
        if len(record.responses) > 1 and record.responses[0] == record.responses[-1]:
            if identical == "error":
                raise DataError(
                    f"{record.id}: identical (the policy says error; see TokenizeConfig)"
                )
            report.count("noted" if identical == "keep" else "dropped", "identical", record.id)
            if identical == "drop":
                continue
        made = unpaired.split(record)
        if len(made) == 2:
            report.count("noted", "split_in_two", record.id)
            report.read += 1
        for _ in range(len(record.responses) - len(made)):
            report.count("noted", "between_best_and_worst", record.id)
        parts += made
    return parts


def _first(found: list[Record], limit: int, cause: str, report: Report) -> list[Record]:
    """At most `limit` records (0 is all); the others are counted under `cause`."""
    kept = found[: limit or None]
    for record in found[len(kept) :]:
        report.count("dropped", cause, record.id)
    return kept


def require_both(source: str, train: list, test: list, report: Report) -> None:
    if not train or not test:
        raise DataError(
            f"{source}: {len(train)} examples to train on and {len(test)} held out; both are "
            "needed: give more records, another eval_share, or an eval_source. What became of the "
            f"records:\n{report}"
        )


def _require_scores(found: list[Record]) -> None:
    for record in found:
        if record.scores is None:
            raise DataError(
                f"{record.id}: this loss needs to know what every response is worth: give a pair "
                "score_chosen and score_rejected (or chosen_reward and rejected_reward, or "
                "margin), and a ranking scores; data.columns renames fields"
            )


def _require_both_labels(source: str, examples: list[Example]) -> None:
    kinds = {example.label for example in examples}
    if len(kinds) == 1:
        kind = "desirable" if kinds.pop() else "undesirable"
        raise DataError(
            f"{source}: all {len(examples)} examples to train on are {kind}; a loss of labelled "
            "responses learns from the difference between both kinds: add the other one"
        )
