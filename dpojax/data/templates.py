"""Chat templates: the text of a record's messages, or why the template refuses them.

A template is a program that came with a model. `transformers` renders it in a sandbox, where it
reaches no file. It may still loop for ever or fill the memory: `data.worker` renders in a process
with limits.
"""

from __future__ import annotations

import inspect
import json
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jinja2

from dpojax.data.records import DataError, Record

Turn = Mapping[str, Any]

LARGEST = 20_000_000  # characters of one dialogue


class Refused(Exception):
    """The chat template refuses a record's messages; the message says why."""


class LimitExceeded(DataError):
    """A chat template takes too much time or memory."""


class ChatTemplate:
    """The chat template of a tokenizer.

    Attributes:
      tokenizer: a `transformers` tokenizer.
      markers: texts of the tokens that a template may write, such as "<|im_end|>".
    """

    def __init__(self, tokenizer: Any) -> None:
        self.tokenizer = tokenizer
        added = tokenizer.added_tokens_decoder.values()
        texts = {*tokenizer.all_special_tokens, *(token.content for token in added)}
        self.markers = tuple(sorted(text for text in texts if text.strip()))
        self._sources: dict[bool, str] = {}

    def source(self, record: Record) -> str:
        """The Jinja text of the template: with tools it may be another one than without.

        Raises:
          DataError: there is no template, it is no Jinja, or there are several and none is chosen.
        """
        with_tools = record.tools is not None
        if with_tools not in self._sources:
            self._sources[with_tools] = self._find(record)
        return self._sources[with_tools]

    def _find(self, record: Record) -> str:
        named = self.tokenizer.chat_template
        if not named:
            raise DataError(
                f"{record.id}: the record holds messages, but the tokenizer has no chat template: "
                "set tokenizer.chat_template to the model's Jinja template (in a run: "
                "config.chat_template, to a file with it). A plain prompt becomes messages where a "
                "row has a system text, a history or tools: data.columns=-system leaves one out"
            )
        try:
            source = self.tokenizer.get_chat_template(tools=record.tools)
        except ValueError:  # several, and none is called "default"
            raise DataError(
                f"{record.id}: the tokenizer has several chat templates "
                f"({', '.join(sorted(named))}) and none of them is the default: set "
                "config.chat_template to one of these names"
            ) from None
        return source

    def render(
        self,
        record: Record,
        turns: Sequence[Turn],
        *,
        generate: bool = False,
        proceed: bool = False,
    ) -> str:
        """The text of some turns of a record.

        A template may want the arguments of tool calls as text or as objects, and an empty text
        where the content of a turn is null. What the record holds is tried first.

        Args:
          record: gives tools and template options.
          turns: one or more messages.
          generate: end with the header of the assistant's next turn.
          proceed: leave the last turn open, to be continued.

        Raises:
          Refused: the template raises an error, whatever its kind.
          DataError: the template itself cannot be used.
        """
        self.source(record)
        options = dict(record.template_options or {})
        forbidden = sorted(options.keys() & _reserved(type(self.tokenizer)))
        if forbidden:
            raise Refused(f"chat_template_kwargs may not set {', '.join(forbidden)}")
        first: Exception | None = None
        for variant in _variants(turns):
            try:
                text = self.tokenizer.apply_chat_template(
                    [dict(turn) for turn in variant],
                    tools=None if record.tools is None else list(record.tools),
                    tokenize=False,
                    add_generation_prompt=generate,
                    continue_final_message=proceed,
                    **options,
                )
            except jinja2.TemplateSyntaxError as error:
                raise DataError(
                    f"the chat template is no valid Jinja (line {error.lineno}: {error.message}); "
                    "mend it, or set config.chat_template to another file"
                ) from error
            except MemoryError as error:
                raise LimitExceeded(
                    f"{record.id}: the chat template needs too much memory; set "
                    "config.chat_template to another one"
                ) from error
            except Exception as error:  # a template may raise anything
                first = first or error
                continue
            if len(text) > LARGEST:
                raise Refused(f"it renders {len(text):,} characters, more than {LARGEST:,}")
            return text
        raise Refused(_one_line(first)) from first

    def generated(self, record: Record, turns: Sequence[Turn]) -> list[tuple[int, int]]:
        """Where `{% generation %}` blocks begin and end in the text of the turns; [] without."""
        source = self.source(record)
        if not re.search(r"\{%-?\s*generation\s*-?%\}", source):
            return []
        from transformers.utils.chat_template_utils import render_jinja_template

        try:
            _, (spans,) = render_jinja_template(
                [[dict(turn) for turn in turns]],
                tools=None if record.tools is None else list(record.tools),
                chat_template=source,
                return_assistant_tokens_mask=True,
                **{**self.tokenizer.special_tokens_map, **(record.template_options or {})},
            )
        except Exception as error:  # a template may raise anything
            raise Refused(_one_line(error)) from error
        return [tuple(span) for span in spans]

    def ends(self, text: str) -> bool:
        """Whether a text ends with a marker, white space aside."""
        return text.rstrip().endswith(self.markers)

    def without_end(self, text: str) -> str:
        """The text up to its last marker, if only white space follows that one.

        Templates often put a newline behind the token that ends a turn. The model does not write
        it: it has stopped.
        """
        return text.rstrip() if self.ends(text) else text

    def to_marker(self, text: str) -> str:
        """The text up to the end of its last marker; "" without a marker."""
        return text[: max((text.rfind(m) + len(m) for m in self.markers if m in text), default=0)]

    def mentions(self, record: Record, name: str) -> bool:
        """Whether the template contains a word, such as the name of an option."""
        return re.search(rf"\b{re.escape(name)}\b", self.source(record)) is not None


def prompt_text(tokenizer: Any, messages: Sequence[Turn]) -> str:
    """The text of messages by a tokenizer's chat template, up to the assistant's next turn.

    Raises:
      DataError: the template refuses the messages, or it cannot be used.
    """
    record = Record("the message", tuple(messages), ())
    try:
        return ChatTemplate(tokenizer).render(record, messages, generate=True)
    except Refused as refusal:
        raise DataError(f"the chat template refuses it: {refusal}") from refusal


def _reserved(kind: type) -> set[str]:
    """Arguments of `apply_chat_template` that a record may not set."""
    parameters = inspect.signature(kind.apply_chat_template).parameters
    return {*parameters} - {"documents", "kwargs"}


def _variants(turns: Sequence[Turn]) -> Iterator[Sequence[Turn]]:
    """The turns as they are, and as a template may want them, where that differs."""
    tried: list[list[Turn]] = []
    for convert in (None, _as_text, _as_object):
        converted = [*turns] if convert is None else _converted(turns, convert)
        for variant in (converted, [_with_content(turn) for turn in converted]):
            if variant not in tried:
                tried.append(variant)
                yield variant


def _with_content(turn: Turn) -> Turn:
    return turn if turn.get("content") is not None else {**turn, "content": ""}


def _converted(turns: Sequence[Turn], convert: Callable[[Any], Any]) -> list[Turn]:
    """The turns with the arguments of their tool calls converted."""
    return [
        {**turn, "tool_calls": [_with_arguments(call, convert) for call in turn["tool_calls"]]}
        if isinstance(turn.get("tool_calls"), list | tuple)
        else turn
        for turn in turns
    ]


def _with_arguments(call: Any, convert: Callable[[Any], Any]) -> Any:
    if not isinstance(call, Mapping):
        return call
    if isinstance(call.get("function"), Mapping):
        return {**call, "function": _with_arguments(call["function"], convert)}
    return {**call, "arguments": convert(call["arguments"])} if "arguments" in call else call


def _as_text(arguments: Any) -> Any:
    return arguments if isinstance(arguments, str) else json.dumps(arguments, ensure_ascii=False)


def _as_object(arguments: Any) -> Any:
    if not isinstance(arguments, str):
        return arguments
    try:
        return json.loads(arguments)
    except ValueError:
        return arguments


def _one_line(error: Exception | None) -> str:
    """One line that says what a template raised."""
    text = " ".join(str(error).split())
    shown = text if len(text) <= 200 else text[:200] + "..."
    kind = type(error).__name__
    return shown if isinstance(error, jinja2.TemplateError) and shown else f"{kind}: {shown}"
