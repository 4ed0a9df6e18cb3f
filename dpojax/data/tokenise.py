"""Token ids from records: one prompt and K responses, with explicit rules for odd records.

Every `Example` has these properties. All its responses share the same prompt ids. BOS stands once
where the tokenizer itself puts one, and nowhere else. A response that was not cut ends with exactly
one EOS, unless `append_eos` is off. Which tokens are scored follows from the lengths, and in a
dialogue from its turns: no token id ever decides a mask.
"""

from __future__ import annotations

import collections
import itertools
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future
from typing import Any

from dpojax.data import processes
from dpojax.data.example_maker import ExampleMaker
from dpojax.data.examples import Example, Examples
from dpojax.data.records import DataError, Record
from dpojax.data.report import Report
from dpojax.data.tokenize_config import TokenizeConfig
from dpojax.watchdog import beat

Pending = collections.deque[tuple[Sequence[Record], Future[processes.Made]]]

MANY = 4  # chunks that are worth starting processes
AHEAD = 4  # chunks, besides two for each process, that may be ready before the next one in order
CHUNK = 2048  # records per call of the tokenizer: bounds memory, and keeps its threads busy


def tokenise(
    records: Sequence[Record], tokenizer: Any, config: TokenizeConfig, report: Report | None = None
) -> tuple[list[Example], Report]:
    """Tokenise records.

    The prompt is encoded once. Prompt and response are also encoded as one text, so that the
    tokenizer invents no space between them; the response's ids are those after the prompt's. If a
    token spans the boundary, the response is encoded alone, and the record is counted as
    `boundary_merge`. Of a response with several turns, each part between two of them is encoded
    alone.

    Args:
      records: from `sources.load_records`; a record of messages needs a chat template.
      tokenizer: a `transformers` tokenizer; it is not changed.
      config: limits, and what to do with odd records.
      report: the report that `load_records` began; None begins a new one.

    Returns:
      Examples of all usable records, in order, and the report on all records.

    Raises:
      DataError: a missing EOS or chat template, a template that cannot be used, an odd record where
        `config` says `error`, or every record dropped (with the table of causes).
    """
    if report is None:
        report = Report()
        report.read = len(records)
    chunks = (records[start : start + CHUNK] for start in range(0, len(records), CHUNK))
    tokenised = tokenise_chunks(chunks, tokenizer, config, report)
    examples = [example for chunk in tokenised for example in chunk]
    report.require_some()
    return examples, report


def tokenise_chunks(
    chunks: Iterable[Sequence[Record]],
    tokenizer: Any,
    config: TokenizeConfig,
    report: Report,
    *,
    sources: Sequence[str] = (),
    num_proc: int = 1,
) -> Iterator[Examples]:
    """Tokenise records chunk by chunk, so that memory does not grow with the data.

    Chat templates are programs of others, so messages are rendered in another process, with limits
    of time and memory. Several processes share the chunks; where they are texts, this process is
    one of them.

    Args:
      chunks: lists of records. About `CHUNK` records a list keep the tokenizer's threads busy.
      tokenizer: a `transformers` tokenizer; it is not changed.
      config: limits, and what to do with odd records.
      report: the report that the reader began. It is complete after the last chunk.
      sources: names of the sources. `Example.source` is the place of `Record.source` in it, or 0
        if the name is not there.
      num_proc: number of processes; 0 is one for each core if there are `MANY` chunks. The examples
        do not depend on it.

    Yields:
      The examples of each chunk, in order. A chunk may have none.

    Raises:
      DataError: like `tokenise`; but no error if every record is dropped (`Report.require_some`).
    """
    if config.prompts_differ == "error" and report.number("dropped", "prompts_differ"):
        first = report.tallies["dropped"]["prompts_differ"].examples[0]
        raise DataError(f"{first}: chosen and rejected have different prompts (prompts_differ)")
    make = ExampleMaker(tokenizer, config, sources)
    chunks, pending = iter(chunks), collections.deque()
    first = [*itertools.islice(chunks, 2 if num_proc else MANY)]
    num_proc = num_proc or (processes.cores() if len(first) == MANY else 1)
    apart = num_proc > 1 and len(first) > 1
    # This process is one of them where the records are texts: templates never run in it.
    shares = apart and not any(map(_has_messages, first))
    threads = max(1, processes.cores() // num_proc) if apart else None
    with processes.Pool(make, num_proc - 1 if shares else num_proc, threads) as pool:
        for chunk in itertools.chain(first, chunks):
            waiting = sum(not made.done() for _, made in pending)
            is_mine = not apart or (shares and waiting >= 2 * (num_proc - 1))
            made = pool.submit(chunk, here=is_mine and not _has_messages(chunk))
            pending.append((chunk, made))
            while pending and (pending[0][1].done() or len(pending) > 2 * num_proc + AHEAD):
                yield _counted(pending.popleft()[1].result(), report)
        while pending:
            if shares:
                _take_one_back(pending, pool)
            yield _counted(pending.popleft()[1].result(), report)


def _take_one_back(pending: Pending, pool: processes.Pool) -> None:
    """Make the examples of the last chunk here that no process has begun, if there is one."""
    for place in reversed(range(len(pending))):
        chunk, made = pending[place]
        if not _has_messages(chunk) and made.cancel():
            pending[place] = chunk, pool.submit(chunk, here=True)
            return


def _counted(made: tuple[Examples, Report], report: Report) -> Examples:
    """The examples; their counts are added to the report."""
    beat("records are tokenised")
    examples, counts = made
    report.add(counts)
    return examples


def _has_messages(records: Sequence[Record]) -> bool:
    return any(not isinstance(record.prompt, str) for record in records)
