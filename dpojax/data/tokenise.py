"""Token ids from records: one prompt and K responses, with explicit rules for odd records.

Every `Example` has these properties. All its responses share the same prompt ids. BOS stands once
where the tokenizer itself puts one, and nowhere else. A response that was not cut ends with exactly
one EOS, unless `append_eos` is off. Which tokens are scored follows from the lengths: no token id
ever decides a mask.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, Literal, get_args, get_origin, get_type_hints

import jinja2
import numpy as np

from dpojax.data.examples import Example, Examples
from dpojax.data.records import DataError, Record
from dpojax.data.report import Report

Ids = list[int]

CHUNK = 2048  # records per call of the tokenizer: bounds memory, and keeps its threads busy


@dataclasses.dataclass(frozen=True)
class TokenizeConfig:
    """Length limits, and what to do with odd records.

    Attributes:
      max_length: most tokens of a prompt with any one of its responses, BOS and EOS included.
      max_prompt_length: most tokens of a prompt, or None for no limit of its own. Both cutting
        kinds of `truncation` shorten a longer prompt at its start; `drop` and `error` drop the
        record or raise.
      truncation: what to do with a record over `max_length`. `drop` drops it. `cut_prompt_start`
        cuts the prompt's start; BOS and at least one more token have to remain.
        `cut_response_end` cuts the end of the responses that are too long; they lose EOS and are
        marked in `Example.cut`. `error` raises.
      append_eos: end every response with the tokenizer's EOS.
      identical: what to do with records with two equal responses (their margin is always 0).
      empty: what to do with records with a response without text (white space is no text).
      prompts_differ: what to do with pairs whose dialogues have different prompts.

    Raises:
      ValueError: for a choice that does not exist or a length that leaves no room.
    """

    max_length: int = 512
    max_prompt_length: int | None = None
    truncation: Literal["drop", "cut_prompt_start", "cut_response_end", "error"] = "drop"
    append_eos: bool = True
    identical: Literal["drop", "keep", "error"] = "drop"
    empty: Literal["drop", "keep", "error"] = "drop"
    prompts_differ: Literal["drop", "error"] = "drop"

    def __post_init__(self) -> None:
        for name, hint in get_type_hints(TokenizeConfig).items():
            value, choices = getattr(self, name), get_args(hint)
            if get_origin(hint) is Literal and value not in choices:
                raise ValueError(f"{name} should be one of {', '.join(choices)}, got {value!r}")
        if self.max_length < 2:
            raise ValueError(f"max_length should be 2 or more, got {self.max_length}")
        if self.max_prompt_length is not None and not 1 <= self.max_prompt_length < self.max_length:
            raise ValueError(
                f"max_prompt_length should be between 1 and max_length - 1 = "
                f"{self.max_length - 1}, got {self.max_prompt_length}"
            )


class _Drop(Exception):
    """Stops the work on one record, which is then dropped for `cause`."""

    def __init__(self, cause: str) -> None:
        super().__init__(cause)
        self.cause = cause


def tokenise(
    records: Sequence[Record], tokenizer: Any, config: TokenizeConfig, report: Report | None = None
) -> tuple[list[Example], Report]:
    """Tokenise records.

    The prompt is encoded once. Prompt and response are also encoded as one text, so that the
    tokenizer invents no space between them; the response's ids are those after the prompt's. If a
    token spans the boundary, the response is encoded alone, and the record is counted as
    `boundary_merge`.

    Args:
      records: from `sources.load_records`; a record of messages needs a chat template.
      tokenizer: a `transformers` tokenizer; it is not changed.
      config: limits, and what to do with odd records.
      report: the report that `load_records` began; None begins a new one.

    Returns:
      Examples of all usable records, in order, and the report on all records.

    Raises:
      DataError: a missing EOS or chat template, a template that fails, an odd record where
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

    Args:
      chunks: lists of records. About `CHUNK` records a list keep the tokenizer's threads busy.
      tokenizer: a `transformers` tokenizer; it is not changed.
      config: limits, and what to do with odd records.
      report: the report that the reader began. It is complete after the last chunk.
      sources: names of the sources. `Example.source` is the place of `Record.source` in it, or 0
        if the name is not there.
      num_proc: number of processes. The examples do not depend on it.

    Yields:
      The examples of each chunk, in order. A chunk may have none.

    Raises:
      DataError: like `tokenise`; but no error if every record is dropped (`Report.require_some`).
    """
    if config.prompts_differ == "error" and report.number("dropped", "prompts_differ"):
        first = report.tallies["dropped"]["prompts_differ"].examples[0]
        raise DataError(f"{first}: chosen and rejected have different prompts (prompts_differ)")
    encoder = _Encoder(tokenizer, config, report, sources)
    for chunk in chunks:
        examples = encoder.examples(chunk)
        report.kept += len(examples)
        yield Examples.of(examples)


class _Renderer:
    """Turns records into texts, with the tokenizer's chat template for messages."""

    def __init__(self, tokenizer: Any, config: TokenizeConfig, report: Report) -> None:
        self.tokenizer, self.config, self.report = tokenizer, config, report
        specials = [re.escape(token) for token in _special_tokens(tokenizer)]
        self.special = re.compile("|".join(specials)) if specials else None

    def texts(self, record: Record) -> tuple[str, tuple[str, ...]]:
        """The prompt and its responses as text, chat template applied; raises _Drop."""
        contents = [record.prompt, *record.responses]
        if not isinstance(record.prompt, str):
            contents = [message["content"] for messages in contents for message in messages]
        if self.special and any(self.special.search(text) for text in contents):
            self.report.count("noted", "special_in_text", record.id)
        if any(not _has_text(response) for response in record.responses):
            _apply(self.config.empty, "empty", record, self.report)
        if isinstance(record.prompt, str):
            return record.prompt, record.responses
        prompt = self._render(record, record.prompt, generate=True)
        texts = []
        for response in record.responses:
            whole = self._render(record, record.prompt + response, generate=False)
            if not whole.startswith(prompt):
                raise _Drop("template_changes_prompt")
            text = whole[len(prompt) :]
            # Templates often put a newline after EOS, for the turn that would come next.
            ends = self.tokenizer.eos_token and text.rstrip().endswith(self.tokenizer.eos_token)
            texts.append(text.rstrip() if ends else text)
        return prompt, tuple(texts)

    def _render(self, record: Record, messages: Sequence[dict], generate: bool) -> str:
        if not self.tokenizer.chat_template:
            raise DataError(
                f"{record.id}: the record holds messages, but the tokenizer has no chat template: "
                "set tokenizer.chat_template to the model's Jinja template"
            )
        try:
            return self.tokenizer.apply_chat_template(
                list(messages), tokenize=False, add_generation_prompt=generate
            )
        except jinja2.TemplateError as error:
            raise DataError(f"{record.id}: the chat template refuses this: {error}") from error


class _Encoder:
    """Encodes records with one tokenizer and config, and counts into one report."""

    def __init__(
        self, tokenizer: Any, config: TokenizeConfig, report: Report, sources: Sequence[str]
    ) -> None:
        self.tokenizer, self.config, self.report = tokenizer, config, report
        self.sources = {name: place for place, name in enumerate(sources)}
        self.bos, self.eos = tokenizer.bos_token_id, tokenizer.eos_token_id
        if config.append_eos and self.eos is None:
            raise DataError(
                "the tokenizer has no end-of-sequence token: set tokenizer.eos_token, or "
                "append_eos=False in TokenizeConfig"
            )
        self.start = start_tokens(tokenizer)
        self.invents_space = self._encode(["a"])[0] != self._encode(["\na"])[0][-1:]
        self.renderer = _Renderer(tokenizer, config, report)

    def examples(self, records: Sequence[Record]) -> list[Example]:
        """The examples of one chunk of records; encodes all its texts in two calls."""
        rendered = []
        for record in records:
            try:
                rendered.append((record, *self.renderer.texts(record)))
            except _Drop as drop:
                self.report.count("dropped", drop.cause, record.id)
        prompts = self._encode([prompt for _, prompt, _ in rendered])
        wholes = iter(self._encode([p + text for _, p, texts in rendered for text in texts]))
        examples = []
        for (record, _, texts), prompt in zip(rendered, prompts):
            responses = self._responses(record, prompt, texts, [next(wholes) for _ in texts])
            try:
                examples.append(self._example(record, self._prompt(prompt), responses))
            except _Drop as drop:
                self.report.count("dropped", drop.cause, record.id)
        return examples

    def _encode(self, texts: list[str]) -> list[Ids]:
        if not texts:
            return []
        # verbose=False: no warning about the model's length, which TokenizeConfig limits.
        return self.tokenizer(
            texts, add_special_tokens=False, return_attention_mask=False, verbose=False
        )["input_ids"]

    def _prompt(self, ids: Ids) -> Ids:
        """The prompt with its start tokens once: a text or a template may contain them already."""
        if ids[: len(self.start)] != self.start:
            ids = self.start + ids
        if not ids:
            first = self.eos if self.bos is None else self.bos
            if first is None:
                raise _Drop("empty_prompt")
            ids = [first]
        return ids

    def _responses(
        self, record: Record, prompt: Ids, texts: Sequence[str], wholes: list[Ids]
    ) -> list[Ids]:
        """Ids of each response, EOS included."""
        merged = [whole[: len(prompt)] != prompt for whole in wholes]
        if any(merged):
            self.report.count("noted", "boundary_merge", record.id)
        responses = [
            self._alone(text) if apart else whole[len(prompt) :]
            for text, whole, apart in zip(texts, wholes, merged)
        ]
        if self.config.append_eos:
            responses = [ids if ids[-1:] == [self.eos] else [*ids, self.eos] for ids in responses]
        if any(self.eos in ids[:-1] for ids in responses):
            self.report.count("noted", "eos_inside", record.id)
        return responses

    def _alone(self, text: str) -> Ids:
        """Ids of a text that continues another one: without an invented leading space."""
        if self.invents_space:
            newline, behind = self._encode(["\n", "\n" + text])
            if behind[: len(newline)] == newline:
                return behind[len(newline) :]
        return self._encode([text])[0]

    def _example(self, record: Record, prompt: Ids, responses: list[Ids]) -> Example:
        """One example within the limits; raises _Drop."""
        self.report.measure(len(prompt), [len(ids) for ids in responses])
        if _has_equal(responses):
            _apply(self.config.identical, "identical", record, self.report)
        longest = max(map(len, responses))
        cut_prompt = _cut_prompt(record, prompt, longest, self.config, len(self.start))
        cut_responses = _cut_responses(cut_prompt, responses, self.config)
        cut = tuple(len(a) < len(b) for a, b in zip(cut_responses, responses))
        if not all(cut_responses):
            raise _Drop("nothing_left")
        if any(cut) and _has_equal(cut_responses) and not _has_equal(responses):
            _apply(self.config.identical, "identical_after_cut", record, self.report)
        if len(cut_prompt) < len(prompt):
            self.report.count("cut", "prompt_start", record.id)
        if any(cut):
            self.report.count("cut", "response_end", record.id)
        self._count_ends(cut_prompt, cut_responses)
        return Example(
            id=record.id,
            prompt=np.asarray(cut_prompt, np.int32),
            responses=tuple(np.asarray(ids, np.int32) for ids in cut_responses),
            cut=cut,
            label=record.label,
            scores=record.scores,
            rank=record.rank,
            weight=record.weight,
            source=self.sources.get(record.source, 0),
        )

    def _count_ends(self, prompt: Ids, responses: list[Ids]) -> None:
        self.report.starts[prompt.count(self.bos)] += 1
        for ids in responses:
            self.report.ends["with EOS" if ids[-1] == self.eos else "without EOS"] += 1


def _apply(choice: str, cause: str, record: Record, report: Report) -> None:
    """Drop, note or refuse a record: `choice` is the config's "drop", "keep" or "error"."""
    if choice == "error":
        raise DataError(f"{record.id}: {cause} (TokenizeConfig says error)")
    if choice == "drop":
        raise _Drop(cause)
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
      _Drop: the record has to be dropped.
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
        raise _Drop("prompt_too_long" if len(prompt) > limit else "too_long")
    if config.truncation == "cut_prompt_start":
        limit = min(limit, config.max_length - longest)
    if len(prompt) <= limit:
        return prompt
    if limit <= start:
        raise _Drop("too_long")
    return prompt[:start] + prompt[len(prompt) - limit + start :]


def _cut_responses(prompt: Ids, responses: list[Ids], config: TokenizeConfig) -> list[Ids]:
    """Cut the ends of responses where they are too long and `config` says so."""
    if config.truncation != "cut_response_end":
        return responses
    room = max(config.max_length - len(prompt), 0)
    return [ids[:room] for ids in responses]


def _has_text(response: str | Sequence[dict]) -> bool:
    """Whether a response has text; white space alone is none."""
    texts = [response] if isinstance(response, str) else [turn["content"] for turn in response]
    return any(text.strip() for text in texts)


def _has_equal(responses: Sequence[Ids]) -> bool:
    return len(set(map(tuple, responses))) < len(responses)


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
