"""Prompts with a reference response each: what policies answer, and what judges compare with.

    prompts = read_prompts_with_references("pairs.jsonl", limit=256)
    prompts[0].text, prompts[0].reference

Each prompt is there once, however many records of the data have it.
"""

from __future__ import annotations

import itertools
import types
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from dpojax.data import reviews, sources
from dpojax.data.parsing import ParseConfig, parse_rows
from dpojax.data.prompts import EMBEDDED, PREFIXES, read_prompts
from dpojax.data.records import DataError, Record
from dpojax.data.records.columns import Columns, read_columns
from dpojax.data.records.forms import detect
from dpojax.data.records.record import Content, RecordError, kind_of, message_text
from dpojax.data.report import Report
from dpojax.data.tokenise import tokenise
from dpojax.data.tokenize_config import TokenizeConfig

NO_LIMIT = 2**30  # tokens; the sampler limits the length of a prompt
ANSWER = "Yes."  # an answer to messages, so that a chat template renders what goes before it


class ReferencedPrompt(NamedTuple):
    """A prompt and a good response to it.

    Attributes:
      id: "FILE:NUMBER" of the first record that has the prompt.
      text: the prompt as people and judges read it. Messages are "role: content" in paragraphs of
        their own, but for a single message of a user, which is its content.
      reference: the chosen, best or only response of that record; "" where it has none.
      content: the prompt as the record has it, text or messages.
      record: of the data, for its chat template's options; None for a plain prompt.
      row: the fields of the record that are text, and its `id` as text.
    """

    id: str
    text: str
    reference: str
    content: Content
    record: Record | None = None
    row: Mapping[str, str] = types.MappingProxyType({})


def read_prompts_with_references(
    source: str,
    *,
    split: str = "",
    columns: str = "",
    form: str = "auto",
    skip: int = 0,
    limit: int = 0,
    seed: int = 0,
    tokenizer: Any = None,
) -> list[ReferencedPrompt]:
    """Read the first distinct prompts of a source, in order.

    Args:
      source: one of

        * "reviews": held-out prompts of the embedded task; `limit` may not be 0;
        * a .txt file, or "prefixes:SOURCE[@SPLIT]": as `prompts.read_prompts` takes them, held out;
        * what `sources.listed` takes: pairs, rankings, records for SFT, or rows with a `prompt`
          and at most a `reference`. The reference is the chosen response, the best one, or the
          only one unless its label is bad.
      split: of the data, such as "test" or "train[:1000]".
      columns: see `records.columns.read_columns`.
      form: of the rows, a name of `records.FORMS`, or "auto".
      skip: distinct prompts to leave out first.
      limit: most prompts behind those; 0 is all.
      seed: of the embedded task and prefixes.
      tokenizer: for prefixes.

    Raises:
      DataError: no prompt is left, the embedded task without a limit, or as `sources.read` says.
    """
    if source == EMBEDDED:
        if not limit:
            raise DataError("limit = 0: the prompts of reviews never end; say how many to use")
        prompts = _embedded(skip + limit, seed)
    elif source.startswith(PREFIXES) or source.endswith(".txt"):
        texts = read_prompts(source, split="eval", limit=0, seed=seed, tokenizer=tokenizer)
        prompts = (_plain(f"{source}:{number}", text) for number, text in enumerate(texts, 1))
    else:
        where = sources.listed(source, split=split)
        prompts = _of_records(where, form, read_columns(columns))
    used = list(itertools.islice(_distinct(prompts), skip, skip + limit if limit else None))
    if not used:
        behind = f" behind the {skip} that are skipped" if skip else ""
        raise DataError(f"{source}: holds no prompt{behind}; name records with prompts")
    return used


def prompt_ids(
    prompts: Sequence[ReferencedPrompt], tokenizer: Any, texts: Sequence[str] | None = None
) -> list[list[int]]:
    """Token ids of each prompt as a policy was trained on it, messages by its chat template.

    Args:
      texts: what stands in the place of each prompt, as text; None: the prompts themselves.

    Raises:
      DataError: the tokenizer has no chat template, or it refuses a prompt; it is named.
    """
    records = [_to_render(prompt) for prompt in prompts]
    if texts is not None:
        records = [Record(p.id, text, ("",)) for p, text in zip(prompts, texts)]
    config = TokenizeConfig(
        max_length=NO_LIMIT, truncation="error", identical="keep", empty="keep", malformed="error"
    )
    examples, report = tokenise(records, tokenizer, config)
    if len(examples) < len(records):
        there = {example.id for example in examples}
        lost = next(record.id for record in records if record.id not in there)
        causes = ", ".join(report.tallies["dropped"])
        raise DataError(f"{lost}: the prompt cannot be rendered ({causes}); leave it out")
    return [example.prompt.tolist() for example in examples]


def _to_render(prompt: ReferencedPrompt) -> Record:
    """A record whose prompt is encoded; messages need an answer behind them."""
    if isinstance(prompt.content, str):
        return Record(prompt.id, prompt.content, ("",))
    of_data = prompt.record
    return Record(
        prompt.id,
        prompt.content,
        (({"role": "assistant", "content": ANSWER},),),
        tools=None if of_data is None else of_data.tools,
        template_options=None if of_data is None else of_data.template_options,
    )


def _embedded(count: int, seed: int) -> Iterator[ReferencedPrompt]:
    """At least `count` distinct held-out prompts of the embedded task."""
    drawn, texts = count, []
    while len(set(texts)) < count:  # few of the short ones differ
        texts = reviews.prompts("eval", drawn, seed)
        drawn *= 2
    for number, text in enumerate(texts, 1):
        yield _plain(f"{EMBEDDED}:{number}", text)


def _plain(id: str, text: str) -> ReferencedPrompt:
    return ReferencedPrompt(id, text, "", text)


def _of_records(
    where: Sequence[sources.Source], form: str, columns: Columns
) -> Iterator[ReferencedPrompt]:
    """The prompts of all records that have one; raises DataError at the end where none has."""
    report, count, paths, row = Report(), 0, set(), {}
    config = ParseConfig(form=form, last_turn=True)
    for row, id in sources.read(where):
        row = columns.apply(row, id, paths)
        if form == "auto" and _is_plain(row):
            prompts = [_of_plain_row(row, id)]
        else:
            records = parse_rows([(row, id)], report, config)
            prompts = [_of_record(record, row) for record in records if record.prompt]
        count += len(prompts)
        yield from prompts
    name = ", ".join(str(source.path) for source in where)
    columns.require_found(paths, name, row)
    if not count:
        report.require_some()
        raise DataError(
            f"{name}: no record has a prompt; a text has none (prefixes:SOURCE takes its first "
            "words), and columns renames fields"
        )


def _is_plain(row: Mapping[str, Any]) -> bool:
    """Whether a row has a prompt as text, and no form of data."""
    if not isinstance(row.get("prompt"), str) or not row["prompt"]:
        return False
    try:
        detect(row)
    except RecordError:
        return True
    return False


def _of_plain_row(row: Mapping[str, Any], id: str) -> ReferencedPrompt:
    reference = row.get("reference")
    if not isinstance(reference, str | None):
        raise DataError(f"{id}: field 'reference' should be text, not {kind_of(reference)}")
    prompt = row["prompt"]
    return ReferencedPrompt(id, prompt, reference or "", prompt, row=_texts(row))


def _of_record(record: Record, row: Mapping[str, Any]) -> ReferencedPrompt:
    good = record.label is not False
    reference = as_text(record.responses[0], "assistant") if good else ""
    text = as_text(record.prompt, "user")
    return ReferencedPrompt(record.id, text, reference, record.prompt, record, _texts(row))


def _texts(row: Mapping[str, Any]) -> dict[str, str]:
    number = {"id": str(row["id"])} if row.get("id") is not None else {}
    return {name: value for name, value in row.items() if isinstance(value, str)} | number


def as_text(content: Content, alone: str) -> str:
    """Text as it is; messages as "role: content", but for one of the role `alone`."""
    if isinstance(content, str):
        return content
    if len(content) == 1 and content[0]["role"] == alone:
        return message_text(content[0])
    return "\n\n".join(f"{message['role']}: {message_text(message)}" for message in content)


def _distinct(prompts: Iterator[ReferencedPrompt]) -> Iterator[ReferencedPrompt]:
    """The first of each text."""
    seen = set()
    for prompt in prompts:
        if prompt.text not in seen:
            seen.add(prompt.text)
            yield prompt
