"""The examples of a stage: read, split into training and held-out prompts, tokenised."""

from __future__ import annotations

import dataclasses
import hashlib
import itertools
import json
from collections.abc import Sequence
from typing import Any, Literal, NamedTuple

from ml_collections import ConfigDict

from dpojax import storage
from dpojax.config.errors import config_errors
from dpojax.data import records, reviews, sources, unpaired
from dpojax.data.examples import Example
from dpojax.data.prompts import EMBEDDED
from dpojax.data.records import DataError, Record
from dpojax.data.report import Report
from dpojax.data.tokenise import TokenizeConfig, tokenise


class DataRequirements(NamedTuple):
    """What a stage learns from.

    Attributes:
      form: "best": the best response alone, and no response that is labelled undesirable (SFT).
        "ranked": all responses of the records that state a preference; a single response is
        dropped. "labelled": single responses with a label, see `unpaired.split`; a single response
        without a label is dropped. "classified": texts with a class. "prompts": prompts alone.
      mismatched: give every example an unrelated second response, see `unpaired.with_mismatched`.
      scores: every record must have scores.
      ties: keep ranked records whose responses are all tied, which are dropped otherwise.
      best_only: training reads the best response of a ranked record alone.
    """

    form: Literal["best", "ranked", "labelled", "classified", "prompts"] = "ranked"
    mismatched: bool = False
    scores: bool = False
    ties: bool = False
    best_only: bool = False


class StageData(NamedTuple):
    """The examples of one stage: those to train on first, then those that are held out.

    Attributes:
      examples: all of them.
      train: how many of them are trained on.
      reports: what became of the records, by part.
      labels: the names of a classifier's classes.
      file: where the examples are kept for the next run, if anywhere; see `token_cache`.
      cached: whether they were read from that file.
    """

    examples: Sequence[Example]
    train: int
    reports: dict[str, Report]
    labels: tuple[str, ...] = ()
    file: storage.Path | None = None
    cached: bool = False

    @property
    def training(self) -> range:
        return range(self.train)

    @property
    def held_out(self) -> range:
        return range(self.train, len(self.examples))

    @property
    def is_labelled(self) -> bool:
        """Whether the examples are single responses with a label."""
        return self.examples[0].label is not None

    def count_held_out_pairs(self) -> int:
        """How many held-out pairs state a preference; of labelled responses, how many there are."""
        if self.is_labelled:
            return len(self.held_out)
        count = 0
        for index in self.held_out:
            example = self.examples[index]
            ranks = example.rank or range(len(example.responses))
            count += sum(a < b for a, b in itertools.combinations(ranks, 2))
        return count


def tokenize_config(tokens: ConfigDict) -> TokenizeConfig:
    """`config.tokens` as the tokeniser wants it.

    Raises:
      ConfigError: a value that is not allowed.
    """
    with config_errors("tokens"):
        return TokenizeConfig(
            **dict(tokens) | {"max_prompt_length": tokens.max_prompt_length or None}
        )


def load(
    data: ConfigDict,
    tokens: ConfigDict,
    tokenizer: Any,
    *,
    requirements: DataRequirements,
    seed: int,
) -> StageData:
    """Reads, selects and tokenises what `config.STAGE.data` names.

    The limits count records. A labelled record may give two examples.

    Args:
      seed: of the embedded task.

    Raises:
      DataError: see `sources.read`, `tokenise` and `unpaired.with_mismatched`; also when nothing is
        left to train or test on, a record lacks scores that are required, or all labels agree.
    """
    settings = tokenize_config(tokens)
    (train, train_report), (test, test_report) = _read_both(data, requirements, seed)
    one_report = test_report is train_report
    reports = {"train and eval": train_report}
    if not one_report:
        reports = {"train": train_report, "eval": test_report}
    require_both(data.source, train, test, train_report)
    if requirements.scores:
        _require_scores(train + test)
    if requirements.form == "labelled":
        train = _labelled(train, settings.identical, train_report)
        test = _labelled(test, settings.identical, test_report)
    examples, _ = tokenise(train, tokenizer, settings, train_report)
    held_out, _ = tokenise(test, tokenizer, settings, test_report)
    require_both(data.source, examples, held_out, train_report)
    if requirements.form == "labelled":
        _require_both_labels(data.source, examples)
    if requirements.best_only:
        examples = list(map(_best_response, examples))
    if requirements.mismatched:
        examples = unpaired.with_mismatched(examples, settings.max_length)
        held_out = unpaired.with_mismatched(held_out, settings.max_length)
    return StageData(examples + held_out, len(examples), reports)


def renamed_columns(data: ConfigDict) -> dict[str, str]:
    """data.columns as `sources.load_records` wants it: the file's name -> ours."""
    columns = dict(pair.split("=", 1) for pair in data.columns.split(",") if pair)
    return {theirs.strip(): ours.strip() for ours, theirs in columns.items()}


def _read_both(
    data: ConfigDict, requirements: DataRequirements, seed: int
) -> tuple[tuple[list[Record], Report], tuple[list[Record], Report]]:
    """Records to train on and records to test on, each with its report, or with the same one."""
    embedded = data.source == EMBEDDED
    train_split = data.split or ("train" if embedded else "")
    train, report = _read(data, data.source, train_split, data.limit, requirements, seed)
    if data.eval_source or embedded:
        source = data.eval_source or data.source
        split = data.eval_split or ("eval" if source == EMBEDDED else "")
        return (train, report), _read(data, source, split, data.eval_limit, requirements, seed)
    train, test = hold_out(train, data.eval_share)
    return (train, report), (_first(test, data.eval_limit, "beyond_eval_limit", report), report)


def _read(
    data: ConfigDict,
    source: str,
    split: str,
    limit: int,
    requirements: DataRequirements,
    seed: int,
) -> tuple[list[Record], Report]:
    if source == EMBEDDED:
        return _embedded(split, limit, form=requirements.form, seed=seed)
    loaded, report = sources.load_records(
        source, split=split or None, form=data.form, columns=renamed_columns(data)
    )
    usable = _usable(loaded, report, requirements)
    return _first(usable, limit, "beyond_limit", report), report


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


def _usable(loaded: list[Record], report: Report, requirements: DataRequirements) -> list[Record]:
    """The records that the stage can learn from; the others are counted."""
    usable = []
    for record in loaded:
        cause = _unusable(record, requirements)
        if cause:
            report.count("dropped", cause, record.id)
        else:
            usable.append(_best(record) if requirements.form == "best" else record)
    return usable


def _unusable(record: Record, requirements: DataRequirements) -> str | None:
    """Why the stage cannot learn from a record, or None if it can."""
    single = len(record.responses) == 1
    if record.all_tied and not (requirements.form == "ranked" and requirements.ties):
        return "all_tied"
    if requirements.form == "best" and record.label is False:
        return "undesirable"
    if requirements.form == "ranked" and single:
        return "one_response"
    if requirements.form == "labelled" and single and record.label is None:
        return "no_label"
    return None


def _best(record: Record) -> Record:
    scores = None if record.scores is None else record.scores[:1]
    return dataclasses.replace(
        record, responses=record.responses[:1], label=None, scores=scores, rank=None
    )


def _best_response(example: Example) -> Example:
    """The example with its best response alone."""
    return example._replace(
        responses=example.responses[:1],
        cut=example.cut[:1],
        scores=None if example.scores is None else example.scores[:1],
        rank=None if example.rank is None else example.rank[:1],
    )


def _labelled(loaded: list[Record], identical: str, report: Report) -> list[Record]:
    """Split every record into labelled responses; the report counts them and what is left out.

    Args:
      identical: what to do where the best response equals the worst; after the split `tokenise`
        cannot compare them.
    """
    parts = []
    for record in loaded:
        if len(record.responses) > 1 and record.responses[0] == record.responses[-1]:
            if identical == "error":
                raise DataError(f"{record.id}: identical responses (tokens.identical is error)")
            report.count("noted" if identical == "keep" else "dropped", "identical", record.id)
            if identical == "drop":
                continue
        halves = unpaired.split(record)
        if len(halves) == 2:
            report.count("noted", "split_in_two", record.id)
            report.read += 1
        for _ in range(len(record.responses) - len(halves)):
            report.count("noted", "between_best_and_worst", record.id)
        parts += halves
    return parts


def _first(loaded: list[Record], limit: int, cause: str, report: Report) -> list[Record]:
    """At most `limit` records (0 is all); the others are counted under `cause`."""
    first = loaded[: limit or None]
    for record in loaded[len(first) :]:
        report.count("dropped", cause, record.id)
    return first


def require_both(source: str, train: list, test: list, report: Report) -> None:
    if not train or not test:
        raise DataError(
            f"{source}: {len(train)} examples to train on and {len(test)} held out; both are "
            "needed: give more records, another eval_share, or an eval_source. What became of the "
            f"records:\n{report}"
        )


def _require_scores(loaded: list[Record]) -> None:
    for record in loaded:
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
