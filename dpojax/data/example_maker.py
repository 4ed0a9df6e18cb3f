"""Makes examples of records: renders, encodes, cuts and counts one chunk of records at a time."""

from __future__ import annotations

import contextlib
import gc
import re
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np

from dpojax.data.dialogues import Drop, Piece, Rendered, has_text, render
from dpojax.data.encoding import Ids, TextEncoder
from dpojax.data.examples import Example, Examples
from dpojax.data.records import DataError, Record
from dpojax.data.report import Report
from dpojax.data.templates import ChatTemplate, Refused
from dpojax.data.tokenize_config import TokenizeConfig


class Answer(NamedTuple):
    """Token ids of a response, and for each whether it is scored; None: all are."""

    ids: Ids
    scored: list[bool] | None

    def first(self, count: int) -> Answer:
        """The first `count` tokens."""
        return Answer(self.ids[:count], None if self.scored is None else self.scored[:count])

    @property
    def has_scored(self) -> bool:
        return bool(self.ids) if self.scored is None else any(self.scored)


class ExampleMaker:
    """Makes examples of records with one tokenizer and config.

    Args:
      tokenizer: a `transformers` tokenizer.
      config: limits, and what to do with odd records.
      sources: names of the sources; see `tokenise_chunks`.
      limited: makes a context, of a record's id, in which its messages are rendered.

    Raises:
      DataError: the tokenizer has no EOS, and `config` wants one.
    """

    def __init__(
        self,
        tokenizer: Any,
        config: TokenizeConfig,
        sources: Sequence[str] = (),
        limited: Callable[[str], Any] = contextlib.nullcontext,
    ) -> None:
        self.config, self.limited, self.report = config, limited, Report()
        self.sources = {name: place for place, name in enumerate(sources)}
        self.bos, self.eos = tokenizer.bos_token_id, tokenizer.eos_token_id
        self.eos_text = str(tokenizer.eos_token)
        if config.append_eos and self.eos is None:
            raise DataError(
                "the tokenizer has no end-of-sequence token: set tokenizer.eos_token, or "
                "append_eos=False (in a run: eos_token in its tokenizer_config.json, or "
                "config.tokens.append_eos)"
            )
        self.start = start_tokens(tokenizer)
        self.encoder = TextEncoder(tokenizer)
        self.template = ChatTemplate(tokenizer)
        specials = [token for token in _special_tokens(tokenizer) if token]
        self._special = re.compile("|".join(map(re.escape, specials)))
        self._special_starts = {token[0] for token in specials}

    def __call__(self, records: Sequence[Record]) -> tuple[Examples, Report]:
        """The examples of one chunk of records, and the counts of `kept` and of all causes."""
        with _no_garbage_collection():
            return self._make(records)

    def _make(self, records: Sequence[Record]) -> tuple[Examples, Report]:
        self.report = Report()
        rendered = []
        for record in records:
            with self._counting_drops(record):
                rendered.append((record, self._render(record)))
        examples = []
        encoded = self._encode(rendered)
        for (record, _), (prompt, answers) in zip(rendered, encoded):
            with self._counting_drops(record):
                examples.append(self._example(record, self._prompt(prompt), answers))
        self.report.kept = len(examples)
        return Examples.of(examples), self.report

    @contextlib.contextmanager
    def _counting_drops(self, record: Record) -> Iterator[None]:
        try:
            yield
        except Drop as drop:
            self.report.count("dropped", drop.cause, record.id, drop.why)

    def _render(self, record: Record) -> Rendered:
        """The texts of a record; raises Drop."""
        if not all(map(has_text, record.responses)):
            _apply(self.config.empty, "empty", record, self.report)
        if isinstance(record.prompt, str):
            texts = Rendered(record.prompt, tuple((Piece(y, True),) for y in record.responses))
            written = [record.prompt, *record.responses]
        else:
            texts = self._render_messages(record)
            turns = [turn for part in (record.prompt, *record.responses) for turn in part]
            written = [turn.get("content") or "" for turn in turns]
        if any(map(self._has_special, written)):
            self.report.count("noted", "special_in_text", record.id)
        for note in texts.notes:
            self.report.count("noted", note, record.id)
        return texts

    def _has_special(self, text: str) -> bool:
        """Whether a control token stands in the text. Few texts have even its first character."""
        if not any(start in text for start in self._special_starts):
            return False
        return self._special.search(text) is not None

    def _render_messages(self, record: Record) -> Rendered:
        try:
            with self.limited(record.id):
                return render(record, self.template, self.config.assistant_turns)
        except Refused as refusal:
            if self.config.malformed == "error":
                raise DataError(
                    f"{record.id}: the chat template refuses this: {refusal} (tokens.malformed "
                    "says error)"
                ) from refusal
            raise Drop("template_refuses", str(refusal)) from refusal

    def _encode(self, rendered: list[tuple[Record, Rendered]]) -> Iterator[tuple[Ids, list]]:
        """Yield the ids of each prompt, and the answers to it; encodes all in a few calls."""
        texts = [text for _, text in rendered]
        firsts = [(text.prompt, [pieces[0].text for pieces in text.responses]) for text in texts]
        begun = self.encoder.continued(firsts)
        others = [piece.text for text in texts for pieces in text.responses for piece in pieces[1:]]
        other_ids = iter(self.encoder.alone(others))
        for (record, text), (prompt, first_ids) in zip(rendered, begun):
            if None in first_ids:
                self.report.count("noted", "boundary_merge", record.id)
            answers = []
            for pieces, ids in zip(text.responses, first_ids):
                if ids is None:
                    (ids,) = self.encoder.alone([pieces[0].text])
                parts = [ids, *(next(other_ids) for _ in pieces[1:])]
                answers.append(self._answer(pieces, parts))
            if self._has_other_end(record, text):
                self.report.count("noted", "other_end", record.id)
            if any(self.eos in answer.ids[:-1] for answer in answers if answer.scored is None):
                self.report.count("noted", "eos_inside", record.id)
            yield prompt, answers

    def _has_other_end(self, record: Record, text: Rendered) -> bool:
        """Whether the template ends an answer with another token than EOS, which is added."""
        if isinstance(record.prompt, str) or not self.config.append_eos:
            return False
        ends = [pieces[-1].text for pieces in text.responses]
        return any(self.template.ends(end) and not end.endswith(self.eos_text) for end in ends)

    def _answer(self, pieces: Sequence[Piece], parts: list[Ids]) -> Answer:
        """One response, EOS included."""
        if self.config.append_eos and parts[-1][-1:] != [self.eos]:
            parts = [*parts[:-1], [*parts[-1], self.eos]]
        if len(pieces) == 1:
            return Answer(parts[0], None)
        ids = [token for part in parts for token in part]
        scored = [piece.scored for piece, part in zip(pieces, parts) for _ in part]
        return Answer(ids, scored)

    def _prompt(self, ids: Ids) -> Ids:
        """The prompt with its start tokens once: a text or a template may contain them already."""
        if ids[: len(self.start)] != self.start:
            ids = self.start + ids
        if not ids:
            first = self.eos if self.bos is None else self.bos
            if first is None:
                raise Drop("empty_prompt")
            ids = [first]
        return ids

    def _example(self, record: Record, prompt: Ids, answers: list[Answer]) -> Example:
        """One example within the limits; raises Drop."""
        lengths = [len(answer.ids) for answer in answers]
        self.report.measure(len(prompt), lengths)
        equal = _has_equal(answers)
        if equal:
            _apply(self.config.identical, "identical", record, self.report)
        cut_prompt = _cut_prompt(record, prompt, max(lengths), self.config, len(self.start))
        cut_answers = _cut_answers(cut_prompt, answers, self.config)
        cut = tuple(len(answer.ids) < length for answer, length in zip(cut_answers, lengths))
        if not all(answer.has_scored for answer in cut_answers):
            raise Drop("nothing_left")
        if any(cut) and not equal and _has_equal(cut_answers):
            _apply(self.config.identical, "identical_after_cut", record, self.report)
        if len(cut_prompt) < len(prompt):
            self.report.count("cut", "prompt_start", record.id)
        if any(cut):
            self.report.count("cut", "response_end", record.id)
        self.report.starts[cut_prompt.count(self.bos)] += 1
        for answer in cut_answers:
            self.report.ends["with EOS" if answer.ids[-1] == self.eos else "without EOS"] += 1
        return Example(
            id=record.id,
            prompt=np.asarray(cut_prompt, np.int32),
            responses=tuple(np.asarray(answer.ids, np.int32) for answer in cut_answers),
            cut=cut,
            label=record.label,
            scores=record.scores,
            rank=record.rank,
            weight=record.weight,
            source=self.sources.get(record.source, 0),
            scored=_masks(cut_answers),
        )


@contextlib.contextmanager
def _no_garbage_collection() -> Iterator[None]:
    """Lists of ids are no garbage. Looking at all of them again and again would take long."""
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()


def _apply(choice: str, cause: str, record: Record, report: Report) -> None:
    """Drop, note or refuse a record: `choice` is the config's "drop", "keep" or "error"."""
    if choice == "error":
        raise DataError(f"{record.id}: {cause} (TokenizeConfig says error)")
    if choice == "drop":
        raise Drop(cause)
    report.count("noted", cause, record.id)


def _cut_prompt(
    record: Record, prompt: Ids, longest: int, config: TokenizeConfig, start: int
) -> Ids:
    """Cut the start of a prompt where it is too long and `config` says so.

    Args:
      record: for error messages.
      prompt: ids with start tokens.
      longest: tokens of the longest response.
      config: the limits.
      start: number of start tokens, which are never cut.

    Raises:
      Drop: the record has to be dropped.
      DataError: it is too long, and `config.truncation` is "error".
    """
    limit = len(prompt) if config.max_prompt_length is None else config.max_prompt_length
    if len(prompt) <= limit and len(prompt) + longest <= config.max_length:
        return prompt
    if config.truncation == "error":
        raise DataError(
            f"{record.id}: a prompt of {len(prompt)} tokens and a longest response of {longest}"
            f" exceed max_length={config.max_length} or "
            f"max_prompt_length={config.max_prompt_length} (truncation says error)"
        )
    if config.truncation == "drop":
        raise Drop("prompt_too_long" if len(prompt) > limit else "too_long")
    if config.truncation == "cut_prompt_start":
        limit = min(limit, config.max_length - longest)
    if len(prompt) <= limit:
        return prompt
    if limit <= start:
        raise Drop("too_long")
    return prompt[:start] + prompt[len(prompt) - limit + start :]


def _cut_answers(prompt: Ids, answers: list[Answer], config: TokenizeConfig) -> list[Answer]:
    """Cut the ends of responses where they are too long and `config` says so."""
    if config.truncation != "cut_response_end":
        return answers
    room = max(config.max_length - len(prompt), 0)
    return [answer.first(room) for answer in answers]


def _has_equal(answers: Sequence[Answer]) -> bool:
    return len({tuple(answer.ids) for answer in answers}) < len(answers)


def _masks(answers: Sequence[Answer]) -> tuple[np.ndarray, ...] | None:
    """For each answer bool [T_k], which tokens are scored; None if all are."""
    if all(answer.scored is None or all(answer.scored) for answer in answers):
        return None
    return tuple(
        np.ones(len(answer.ids), bool) if answer.scored is None else np.asarray(answer.scored, bool)
        for answer in answers
    )


def start_tokens(tokenizer: Any) -> Ids:
    """The ids that the tokenizer itself puts before a text: mostly [BOS] or none."""
    plain = tokenizer("a", add_special_tokens=False)["input_ids"]
    full = tokenizer("a")["input_ids"]
    places = range(len(full) - len(plain) + 1)
    first = next((i for i in places if full[i : i + len(plain)] == plain), 0)
    return full[:first]


def _special_tokens(tokenizer: Any) -> set[str]:
    """Every token text that the tokenizer reads as a control token."""
    added = tokenizer.added_tokens_decoder.values()
    return {*tokenizer.all_special_tokens, *(token.content for token in added if token.special)}
