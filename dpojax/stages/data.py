"""The examples of a stage: read, split into training and held-out prompts, tokenised.

Records pass through one after the other, and examples are stored chunk by chunk, so that memory
does not grow with the data.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from typing import Any, NamedTuple

from ml_collections import ConfigDict

from dpojax import storage
from dpojax.config.data_sources import sources_of, weights_of
from dpojax.config.errors import config_errors
from dpojax.data import records, reviews, sources, tokenise, unpaired
from dpojax.data.examples import Example, Examples, Store
from dpojax.data.parsing import ParseConfig, parse_rows
from dpojax.data.pipeline import Mixture
from dpojax.data.prompts import EMBEDDED
from dpojax.data.records import DataError, Record
from dpojax.data.report import Report
from dpojax.data.sources import Source
from dpojax.data.tokenise import CHUNK
from dpojax.data.tokenize_config import TokenizeConfig
from dpojax.stages import selection
from dpojax.stages.selection import DataRequirements
from dpojax.watchdog import beat

NewStore = Callable[[], Store]


class SourcePart(NamedTuple):
    """How many examples of one source are trained on, and how many are held out.

    `weight` is its share of every training batch before it is normalised; None where all sources
    are one data set.
    """

    name: str
    train: int
    held_out: int
    weight: float | None = None


class StageData(NamedTuple):
    """The examples of one stage: those to train on first, then those that are held out.

    Attributes:
      examples: all of them.
      train: how many of them are trained on.
      reports: what became of the records, by part.
      labels: the names of a classifier's classes.
      sources: where the examples come from. On both sides those of the first source come first.
        `Example.source` is the place in it. () where that is not known.
      file: where the examples are kept for the next run, if anywhere; see `token_cache`.
      file_note: the same for a person.
    """

    examples: Sequence[Example]
    train: int
    reports: dict[str, Report]
    labels: tuple[str, ...] = ()
    sources: tuple[SourcePart, ...] = ()
    file: storage.Path | None = None
    file_note: str = "in memory"

    @property
    def training(self) -> range:
        return range(self.train)

    @property
    def mixture(self) -> Mixture | None:
        """How the sources are mixed; None where all examples are one data set."""
        parts = [part for part in self.sources if part.weight is not None]
        counts, weights = ([part[i] for part in parts] for i in (1, 3))
        return Mixture(tuple(counts), tuple(weights)) if parts else None

    @property
    def epoch(self) -> int:
        """How many examples an epoch has."""
        return self.train if self.mixture is None else self.mixture.epoch

    @property
    def held_out(self) -> range:
        return range(self.train, len(self.examples))

    @property
    def held_out_by_source(self) -> dict[str, range]:
        """The held-out examples of each source that has some; {} where there is one source."""
        ends = itertools.accumulate((part.held_out for part in self.sources), initial=self.train)
        ranges = {
            part.name: range(first, end)
            for part, (first, end) in zip(self.sources, itertools.pairwise(ends))
            if end > first
        }
        return ranges if len(self.sources) > 1 else {}

    @property
    def is_labelled(self) -> bool:
        """Whether the examples are single responses with a label."""
        return self.examples[0].label is not None

    def count_held_out_pairs(self) -> int:
        """`count_pairs` of the held-out examples."""
        return self.count_pairs(self.held_out)

    def count_pairs(self, indices: range) -> int:
        """How many pairs state a preference; of labelled responses, how many there are."""
        if self.is_labelled:
            return len(indices)
        count = 0
        for index in indices:
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
    num_proc: int = 1,
    new_store: NewStore = Store,
) -> StageData:
    """Reads, selects and tokenises what `config.STAGE.data` names.

    The limits count records of each source. A labelled record may give two examples.

    Args:
      seed: of the embedded task.
      num_proc: see `tokenise.tokenise_chunks`.
      new_store: makes what the examples are put into; the last one that it made has all of them.

    Raises:
      DataError: see `sources.read`, `tokenise` and `unpaired.with_mismatched`; also when nothing is
        left to train or test on, or all labels agree.
    """
    settings = tokenize_config(tokens)

    def attempt(below: float) -> StageData:
        streams, names = _streams(data, requirements, settings, seed, below)
        store = new_store()
        for stream in streams:
            encode = partial(
                tokenise.tokenise_chunks,
                tokenizer=tokenizer,
                config=settings,
                report=stream.report,
                sources=names,
                num_proc=num_proc,
            )
            put(stream, store, encode, requirements)
        return _loaded(data, streams, names, store)

    loaded = selection.with_some_held_out(data.eval_share, attempt)
    if requirements.form == "labelled":
        _require_both_labels(data.source, loaded)
    if requirements.mismatched:
        loaded = _with_mismatched(loaded, settings.max_length, new_store())
    return loaded


def parse_config(
    data: ConfigDict, settings: TokenizeConfig | None = None, *, need_scores: bool = False
) -> ParseConfig:
    """How the rows of `data.source` are parsed.

    Args:
      data: config.STAGE.data.
      settings: of a stage that has such; None drops what is malformed.
      need_scores: see `ParseConfig`.

    Raises:
      DataError: data.columns is not understood.
    """
    return ParseConfig(
        form=data.form,
        columns=records.read_columns(data.columns),
        need_scores=need_scores,
        last_turn=settings is not None and settings.assistant_turns == "last",
        malformed="drop" if settings is None else settings.malformed,
    )


class Stream(NamedTuple):
    """Records of one part of the data with their sides: (held out or not, record).

    `report` is complete once all of them were read.
    """

    part: str
    report: Report
    records: Iterable[tuple[bool, Record]]


def _streams(
    data: ConfigDict,
    requirements: DataRequirements,
    settings: TokenizeConfig,
    seed: int,
    held_out_below: float,
) -> tuple[list[Stream], list[str]]:
    """One stream if evaluation takes a share of the data, else two; and the sources' names."""
    embedded = data.source == EMBEDDED
    read = _Reader(data, requirements, settings, seed)
    if not data.eval_source and not embedded:
        listed, report = sources_of(data), Report()
        names = sources.labels(listed)
        loaded = read.files(listed, names, data.limit, report)
        sided = selection.hold_out(loaded, held_out_below, data.eval_limit, report)
        return [read.stream("train and eval", report, sided)], names
    names, streams = [], []
    for part, held_out in (("train", False), ("eval", True)):
        listed = sources_of(data, evaluation=held_out)
        report = Report()
        limit, split = (data.eval_limit, data.eval_split) if held_out else (data.limit, data.split)
        labels = sources.labels(listed) if listed else [EMBEDDED]
        names += [name for name in labels if name not in names]
        if listed:  # in the order of the names on both sides, see `StageData.sources`
            by_name = dict(zip(labels, listed))
            ordered = sorted(by_name, key=names.index)
            loaded = read.files([by_name[x] for x in ordered], ordered, limit, report)
        else:
            loaded = read.embedded(split or part, limit, report)
        streams.append(read.stream(part, report, zip(itertools.repeat(held_out), loaded)))
    return streams, names


@dataclasses.dataclass(frozen=True)
class _Reader:
    """Reads the records that a stage can learn from."""

    data: ConfigDict
    requirements: DataRequirements
    settings: TokenizeConfig
    seed: int

    def files(
        self, listed: list[Source], names: list[str], limit: int, report: Report
    ) -> Iterator[Record]:
        """The usable records of all sources, at most `limit` of each."""
        config = parse_config(self.data, self.settings, need_scores=self.requirements.scores)
        for rows, name in zip(sources.read_each(listed), names):
            loaded = parse_rows(rows, report, config)
            usable = selection.usable(loaded, self.requirements, report)
            for record in selection.first(usable, limit, name, report):
                yield dataclasses.replace(record, source=name)

    def embedded(self, split: str, limit: int, report: Report) -> Iterator[Record]:
        if self.requirements.form == "best":
            rows = [{"text": text} for text in reviews.texts(split, limit, self.seed)]
        else:
            rows = reviews.preferences(split, limit, self.seed)
        report.read = len(rows)
        numbered = zip(rows, itertools.count(1))
        parsed = (records.parse(row, f"{EMBEDDED}/{split}:{number}") for row, number in numbered)
        return selection.usable(parsed, self.requirements, report)

    def stream(self, part: str, report: Report, sided: Iterable[tuple[bool, Record]]) -> Stream:
        if self.requirements.form == "labelled":
            identical = self.settings.identical
            sided = (
                (held_out, half)
                for held_out, record in sided
                for half in selection.labelled(record, identical, report)
            )
        return Stream(part, report, sided)


def put(
    stream: Stream,
    store: Store,
    encode: Callable[[Iterable[list[Record]]], Iterator[Examples]],
    requirements: DataRequirements,
) -> None:
    """Tokenise a stream of records into a store."""
    sides: deque[bool] = deque()

    def chunks() -> Iterator[list[Record]]:
        for held_out, chunk in _chunked(stream.records, CHUNK):
            sides.append(held_out)
            yield chunk

    for examples in encode(chunks()):
        held_out = sides.popleft()
        if requirements.best_only and not held_out:
            examples = Examples.of([selection.best_response(example) for example in examples])
        store.add(examples, held_out=held_out)
    stream.report.require_some()


def _chunked(
    sided: Iterable[tuple[bool, Record]], size: int
) -> Iterator[tuple[bool, list[Record]]]:
    """Collect records into chunks of one side, in their order; at most two chunks wait."""
    waiting: dict[bool, list[Record]] = {False: [], True: []}
    for held_out, record in sided:
        waiting[held_out].append(record)
        if len(waiting[held_out]) == size:
            yield held_out, waiting[held_out]
            waiting[held_out] = []
    for held_out, chunk in waiting.items():
        if chunk:
            yield held_out, chunk


def _loaded(data: ConfigDict, streams: list[Stream], names: list[str], store: Store) -> StageData:
    """What the store has got."""
    train, test = store.finish()
    require_both(data.source, len(train), len(test), streams[0].report)
    counts = train.count("source"), test.count("source")
    parts = [SourcePart(name, *(count[i] for count in counts)) for i, name in enumerate(names)]
    weights = weights_of(data)
    parts[: len(weights)] = [part._replace(weight=w) for part, w in zip(parts, weights)]
    reports = {stream.part: stream.report for stream in streams}
    loaded = StageData(Examples.joined(train, test), len(train), reports, sources=tuple(parts))
    if weights:
        streams[0].report.remarks.append(_mixture(loaded))
    return loaded


def _mixture(loaded: StageData) -> str:
    """What an epoch takes of each source, for a person.

    Raises:
      DataError: a source has nothing to train on.
    """
    length, parts = loaded.epoch, [part for part in loaded.sources if part.weight]
    for part in parts:
        if not part.train:
            raise DataError(f"{part.name}: nothing of this source is left to train on")
    whole = sum(part.weight for part in parts)
    shares = ", ".join(
        f"{round(length * part.weight / whole):,} of {part.train:,} from {part.name} (weight "
        f"{part.weight:g})"
        for part in parts
    )
    return (
        f"the mixture: an epoch has {length:,} of the {loaded.train:,} examples to train on, "
        f"{shares}; the next epoch goes on with those that are left"
    )


def _with_mismatched(loaded: StageData, max_length: int, store: Store) -> StageData:
    """The same data with an unrelated second response in every example."""
    for held_out, indices in ((False, loaded.training), (True, loaded.held_out)):
        made = unpaired.with_mismatched(loaded.examples, indices, max_length)
        while chunk := list(itertools.islice(made, CHUNK)):
            store.add(Examples.of(chunk), held_out=held_out)
            beat("mismatched responses are added")
    return loaded._replace(examples=Examples.joined(*store.finish()))


def require_both(source: str, train: int, test: int, report: Report) -> None:
    """Raise DataError unless there are examples to train on and examples held out."""
    if not train or not test:
        raise DataError(
            f"{source}: {train} examples to train on and {test} held out; both are "
            "needed: give more records, another eval_share, or an eval_source. What became of the "
            f"records:\n{report}"
        )


def _require_both_labels(source: str, loaded: StageData) -> None:
    kinds = {loaded.examples[i].label for i in loaded.training}
    if len(kinds) == 1:
        kind = "desirable" if kinds.pop() else "undesirable"
        raise DataError(
            f"{source}: all {loaded.train} examples to train on are {kind}; a loss of labelled "
            "responses learns from the difference between both kinds: add the other one"
        )
