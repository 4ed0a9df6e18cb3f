"""The examples of a classifier: texts with their classes, in the tokens that a reward reads.

The data are read twice, so that memory does not grow with the texts: first for what decides which
records are used, then for the texts of those.
"""

from __future__ import annotations

import itertools
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

import numpy as np
from ml_collections import ConfigDict

from dpojax.config.data_sources import sources_of
from dpojax.data import sources
from dpojax.data.example_maker import start_tokens
from dpojax.data.examples import Example, Examples, Store
from dpojax.data.parsing import ParseConfig, parse_rows
from dpojax.data.records import DataError, Record
from dpojax.data.report import Report
from dpojax.data.sources import Source
from dpojax.data.tokenise import tokenise_chunks
from dpojax.data.tokenize_config import TokenizeConfig
from dpojax.stages import selection
from dpojax.stages.data import (
    EMBEDDED,
    NewStore,
    StageData,
    Stream,
    parse_config,
    put,
    require_both,
)
from dpojax.stages.selection import DataRequirements


class Card(NamedTuple):
    """What is kept of a record when the data are read for the first time.

    Attributes:
      id: of the record.
      category: the name of its class.
      place: its `selection.hash_of`, which decides whether it is held out.
    """

    id: str
    category: str
    place: float


class _Part(NamedTuple):
    """Sources that are read together, and which of their records are used on which side."""

    name: str
    sources: Sequence[Source]
    report: Report
    train: Sequence[Card]
    held_out: Sequence[Card]


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
    config = parse_config(data)
    if config.form == "auto":
        config = config._replace(form="classified")
    parts = list(_parts(data, config, seed))
    report = parts[0].report
    train = [card for part in parts for card in part.train]
    test = [card for part in parts for card in part.held_out]
    require_both(data.source, len(train), len(test), report)
    labels, store = _labels(data.source, train, test), new_store()
    for part in parts:
        encode = partial(
            _encode, tokenizer=tokenizer, max_tokens=max_tokens, labels=labels, part=part
        )
        stream = Stream(part.name, part.report, _sided_records(part, config))
        put(stream, store, encode, DataRequirements("classified"))
    kept_train, kept_test = store.finish()
    require_both(data.source, len(kept_train), len(kept_test), report)
    reports = {part.name: part.report for part in parts}
    return StageData(Examples.joined(kept_train, kept_test), len(kept_train), reports, labels)


def _parts(data: ConfigDict, config: ParseConfig, seed: int) -> Iterator[_Part]:
    """Read the data for the first time: one part, or two if there is an `eval_source`."""
    listed, report = sources_of(data), Report()
    cards = _drawn(_cards(listed, config, report), data.limit, "beyond_limit", report, seed)
    if not data.eval_source:
        held_out = selection.are_held_out([card.place for card in cards], data.eval_share)
        train = [card for card, is_held_out in zip(cards, held_out) if not is_held_out]
        test = list(itertools.compress(cards, held_out))
        test = _drawn(test, data.eval_limit, "beyond_eval_limit", report, seed)
        yield _Part("train and eval", listed, report, train, test)
        return
    yield _Part("train", listed, report, cards, [])
    listed, report = sources_of(data, evaluation=True), Report()
    cards = _drawn(_cards(listed, config, report), data.eval_limit, "beyond_limit", report, seed)
    yield _Part("eval", listed, report, [], cards)


def _cards(listed: Sequence[Source], config: ParseConfig, report: Report) -> list[Card]:
    """A card of each usable record; the report counts all of them."""
    cards = [
        Card(record.id, sys.intern(record.category), selection.hash_of(record))
        for record in parse_rows(sources.read(listed), report, config)
    ]
    report.require_some()
    return cards


def _sided_records(part: _Part, config: ParseConfig) -> Iterator[tuple[bool, Record]]:
    """Read the data of a part again; yield (held out or not, record) of those that are used."""
    sides = {card.id: False for card in part.train} | {card.id: True for card in part.held_out}
    for record in parse_rows(sources.read(part.sources), Report(), config):
        if record.id in sides:
            yield sides[record.id], record


def _drawn(cards: list[Card], limit: int, cause: str, report: Report, seed: int) -> list[Card]:
    """`limit` of the cards (0: all) in their order; the others are counted under `cause`."""
    if not limit or limit >= len(cards):
        return cards
    drawn = set(np.random.default_rng(seed).permutation(len(cards))[:limit].tolist())
    for index, card in enumerate(cards):
        if index not in drawn:
            report.count("dropped", cause, card.id)
    return [cards[index] for index in sorted(drawn)]


def _labels(source: str, train: list[Card], test: list[Card]) -> tuple[str, ...]:
    """The names of the classes, sorted."""
    labels = sorted({card.category for card in train})
    if len(labels) < 2:
        raise DataError(
            f"{source}: all {len(train)} texts to train on are labelled {labels[0]!r}; a "
            "classifier learns from the difference of two classes or more: add the others"
        )
    for card in test:
        if card.category not in labels:
            raise DataError(
                f"{card.id}: field 'label' is {card.category!r}, but the texts to train on are "
                f"labelled {', '.join(labels)}; leave the record out, or add such texts"
            )
    return tuple(labels)


def _encode(
    chunks: Iterable[list[Record]],
    *,
    tokenizer: Any,
    max_tokens: int,
    labels: Sequence[str],
    part: _Part,
) -> Iterator[Examples]:
    start = start_tokens(tokenizer)
    settings = TokenizeConfig(
        max_length=max_tokens + (not start),
        truncation="cut_response_end",
        append_eos=False,
        identical="keep",
    )
    category_of = {card.id: labels.index(card.category) for card in (*part.train, *part.held_out)}
    for examples in tokenise_chunks(chunks, tokenizer, settings, part.report):
        yield Examples.of(list(_classified(examples, category_of, bool(start), part.report)))


def _classified(
    examples: Examples, category_of: Mapping[str, int], has_start: bool, report: Report
) -> Iterator[Example]:
    """The examples with their categories; a text of one token alone is dropped."""
    for example in examples:
        if not has_start:  # the token that stands for the empty prompt is the text's own first one
            (text,) = example.responses
            example = example._replace(prompt=text[:1], responses=(text[1:],))
        if len(example.responses[0]):
            yield example._replace(category=category_of[example.id])
        else:
            report.kept -= 1
            report.count("dropped", "one_token", example.id)
