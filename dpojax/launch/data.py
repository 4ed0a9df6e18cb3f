"""The examples of a stage: read, tokenised, split into training and held-out prompts."""

from __future__ import annotations

import dataclasses
import hashlib
import itertools
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
    """Read and tokenise what `config.STAGE.data` names.

    Args:
      best_only: keep the best response alone (SFT; unpaired records only if desirable).
      seed: of the embedded task.

    Raises:
      DataError: see `sources.read` and `tokenise`; also when nothing is left to train or test on.
    """
    policy = tokens_policy(tokens)

    def examples(source, split, limit) -> tuple[list[Example], Report]:
        found, report = _records(source, split, data.form, limit, best_only=best_only, seed=seed)
        found = (
            [_best(record) for record in found if record.label is not False] if best_only else found
        )
        return tokenise(found, tokenizer, policy, report)

    if data.eval_source or data.source == EMBEDDED:
        train, report = examples(data.source, data.split or "train", data.limit)
        source = data.eval_source or data.source
        test, test_report = examples(source, data.eval_split or "eval", data.eval_limit)
        reports = {"train": report, "eval": test_report}
    else:
        everything, report = examples(data.source, data.split, data.limit)
        train, test = hold_out(everything, data.eval_share)
        test = test[: data.eval_limit or None]
        reports = {"train and eval": report}
    if not train or not test:
        raise DataError(
            f"{data.source}: {len(train)} examples to train on and {len(test)} held out; both are "
            "needed: give more records, another eval_share, or an eval_source"
        )
    return StageData(train + test, len(train), reports)


def hold_out(examples: list[Example], share: float) -> tuple[list[Example], list[Example]]:
    """Training and held-out examples, by whole prompts, chosen by a hash of the prompt.

    All examples of a prompt fall on one side. A prompt of one token (BOS) names nothing: such
    examples are grouped by their best response instead.
    """

    def group(example: Example) -> str:
        named = example.prompt if len(example.prompt) > 1 else example.responses[0]
        return hashlib.sha256(named.tobytes()).hexdigest()

    groups = [group(example) for example in examples]
    wanted = sorted(set(groups))[: max(1, round(share * len(set(groups))))]
    held = set(wanted)
    train = [e for e, g in zip(examples, groups) if g not in held]
    return train, [e for e, g in zip(examples, groups) if g in held]


def _records(source, split, form, limit, *, best_only, seed) -> tuple[list[Record], Report]:
    if source != EMBEDDED:
        found, report = sources.load_records(source, split=split or None, form=form)
        return found[: limit or None], report
    if best_only:
        rows = [{"text": text} for text in reviews.texts(split, limit, seed)]
    else:
        rows = reviews.preferences(split, limit, seed)
    report = Report()
    report.read = len(rows)
    numbered = zip(rows, itertools.count(1))
    return [records.parse(row, f"reviews/{split}:{number}") for row, number in numbered], report


def _best(record: Record) -> Record:
    return dataclasses.replace(record, responses=record.responses[:1], label=None)
