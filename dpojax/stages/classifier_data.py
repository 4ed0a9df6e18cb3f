"""The examples of a classifier: texts with their classes, in the tokens that a reward reads."""

from __future__ import annotations

from typing import Any

import numpy as np
from ml_collections import ConfigDict

from dpojax.config.data_sources import sources_of
from dpojax.data import sources
from dpojax.data.example_maker import start_tokens
from dpojax.data.examples import Example, Examples, Store
from dpojax.data.records import DataError, Record
from dpojax.data.report import Report
from dpojax.data.tokenise import tokenise
from dpojax.data.tokenize_config import TokenizeConfig
from dpojax.stages import selection
from dpojax.stages.data import (
    EMBEDDED,
    NewStore,
    StageData,
    parse_config,
    require_both,
)


def load(
    data: ConfigDict, tokenizer, *, max_tokens: int, seed: int, new_store: NewStore = Store
) -> StageData:
    """Read, select and tokenise the texts that `config.classifier.data` names, with their labels.

    A limit takes records from all over a file, drawn by `seed`: such files are often sorted by
    label. A text is its first `max_tokens` tokens as the tokenizer itself encodes it, so that
    `evaluation.rewards.classifier` and transformers see what training saw.

    Raises:
      DataError: see `sources.read` and `tokenise`; sources with weights; a record without text or
        label; all labels agree; a held-out label that no text to train on has; nothing left to
        train or test on.
    """
    if EMBEDDED in (data.source, data.eval_source):
        raise DataError(
            f"config.classifier.data: {EMBEDDED} has no labelled texts; its reward is known exactly"
        )
    if data.weights:
        raise DataError(
            f"config.classifier.data.weights = {data.weights}: the sources of a classifier are one "
            "data set; leave it empty"
        )
    train, report = _read(data, data.limit, seed, evaluation=False)
    if data.eval_source:
        test, test_report = _read(data, data.eval_limit, seed, evaluation=True)
        reports = {"train": report, "eval": test_report}
    else:
        train, test = selection.sides(train, data.eval_share)
        test = _drawn(test, data.eval_limit, "beyond_eval_limit", report, seed)
        reports, test_report = {"train and eval": report}, report
    require_both(data.source, len(train), len(test), report)
    labels, store = _labels(data.source, train, test), new_store()
    parts = [
        _examples(part, labels, tokenizer, max_tokens, counts)
        for part, counts in ((train, report), (test, test_report))
    ]
    require_both(data.source, *map(len, parts), report)
    for held_out, part in enumerate(parts):
        store.add(Examples.of(part), held_out=bool(held_out))
    return StageData(Examples.joined(*store.finish()), len(parts[0]), reports, labels)


def _read(
    data: ConfigDict, limit: int, seed: int, *, evaluation: bool
) -> tuple[list[Record], Report]:
    config = parse_config(data)
    if config.form == "auto":
        config = config._replace(form="classified")
    loaded, report = sources.load_records(sources_of(data, evaluation=evaluation), config=config)
    return _drawn(loaded, limit, "beyond_limit", report, seed), report


def _drawn(loaded: list[Record], limit: int, cause: str, report: Report, seed: int) -> list[Record]:
    """`limit` of the records (0: all) in their order; the others are counted under `cause`."""
    if not limit or limit >= len(loaded):
        return loaded
    drawn = set(np.random.default_rng(seed).permutation(len(loaded))[:limit].tolist())
    for index, record in enumerate(loaded):
        if index not in drawn:
            report.count("dropped", cause, record.id)
    return [loaded[index] for index in sorted(drawn)]


def _labels(source: str, train: list[Record], test: list[Record]) -> tuple[str, ...]:
    """The names of the classes, sorted."""
    labels = sorted({record.category for record in train})
    if len(labels) < 2:
        raise DataError(
            f"{source}: all {len(train)} texts to train on are labelled {labels[0]!r}; a "
            "classifier learns from the difference of two classes or more: add the others"
        )
    for record in test:
        if record.category not in labels:
            raise DataError(
                f"{record.id}: field 'label' is {record.category!r}, but the texts to train on are "
                f"labelled {', '.join(labels)}; leave the record out, or add such texts"
            )
    return tuple(labels)


def _examples(
    records: list[Record], labels: tuple[str, ...], tokenizer: Any, max_tokens: int, report: Report
) -> list[Example]:
    start = start_tokens(tokenizer)
    settings = TokenizeConfig(
        max_length=max_tokens + (not start),
        truncation="cut_response_end",
        append_eos=False,
        identical="keep",
    )
    category = {record.id: labels.index(record.category) for record in records}
    examples = []
    for example in tokenise(records, tokenizer, settings, report)[0]:
        if not start:  # the token that stands for the empty prompt is the text's own first one
            (text,) = example.responses
            example = example._replace(prompt=text[:1], responses=(text[1:],))
        if len(example.responses[0]):
            examples.append(example._replace(category=category[example.id]))
        else:
            report.kept -= 1
            report.count("dropped", "one_token", example.id)
    return examples
