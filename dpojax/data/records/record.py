"""What a row of data becomes: a record, or the reason why it becomes none."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from typing import Any

Messages = tuple[dict, ...]
Content = str | Messages
Scores = tuple[float, ...]


class DataError(ValueError):
    """Data that cannot be used. The message names file, record and field, and what to do."""


class RecordError(DataError):
    """One record that cannot be used. Others of the same data may be fine.

    Attributes:
      cause: its name in `report.CAUSES`.
    """

    def __init__(self, message: str, cause: str) -> None:
        super().__init__(message)
        self.cause = cause

    def __reduce__(self):
        return type(self), (str(self), self.cause)


@dataclasses.dataclass(frozen=True)
class Record:
    """A prompt and its K responses, best first.

    A message has a `role` (system, user, assistant or tool) and a `content`: text, or None where
    only `tool_calls` or `reasoning_content` speak. It keeps other keys for the chat template.

    Attributes:
      id: "FILE:NUMBER" (1-based line or row).
      prompt: text or messages; "" for plain text.
      responses: K is 1 for plain text and unpaired data, 2 for a pair, more for a ranking. A
        response of messages may hold turns of users and tools between those of the assistant.
      label: whether an unpaired response is desirable, else None.
      scores: the score of each response in the data, or None. Scores do not decide the order of a
        pair: the chosen response of a noisy pair may have the lower one.
      rank: for each response the number of responses that are better, such as (0, 1, 1, 3); None
        if there are no ties.
      category: the name of the class of a classified text, else None.
      tools: the row's tools, for the chat template, or None.
      template_options: further keyword arguments of the chat template (`chat_template_kwargs` of
        the row), or None.
      weight: factor of the example's loss, above 0: 2 counts as two equal records.
      source: name of the source that the row comes from; "" if there is one source.
    """

    id: str
    prompt: Content
    responses: tuple[Content, ...]
    label: bool | None = None
    scores: Scores | None = None
    rank: tuple[int, ...] | None = None
    category: str | None = None
    tools: tuple | None = None
    template_options: dict[str, Any] | None = None
    weight: float = 1.0
    source: str = ""

    @property
    def places(self) -> tuple[int, ...]:
        """For each response the number of responses that are better, with or without ties."""
        return tuple(range(len(self.responses))) if self.rank is None else self.rank

    @property
    def all_tied(self) -> bool:
        """Whether the record ranks two or more responses and prefers none of them."""
        return len(self.responses) > 1 and not any(self.places)


def kind_of(value: Any) -> str:
    """Describe a value in a word or two, for an error."""
    if value is None:
        return "nothing (null)"
    if isinstance(value, list | tuple):
        return f"a list of {len(value)}"
    if isinstance(value, Mapping):
        return f"an object with {listed(value)}"
    text = repr(value)
    shown = text if len(text) <= 40 else text[:40] + "..."
    return f"{type(value).__name__} {shown}"


def listed(names: Any) -> str:
    """The names, sorted, with commas between them."""
    return ", ".join(sorted(str(name) for name in names)) or "no fields"


def make_record(id: str, prompt: Content, responses: Any, **fields: Any) -> Record:
    """Make a record. If text and messages are mixed, text becomes a message."""
    responses = tuple(responses)
    if isinstance(prompt, str) and all(isinstance(response, str) for response in responses):
        return Record(id, prompt, responses, **fields)
    turns = tuple(as_messages(response, "assistant") for response in responses)
    return Record(id, as_messages(prompt, "user"), turns, **fields)


def message_text(message: Mapping[str, Any]) -> str:
    """What a message says, as one text: its content, and its tool calls as JSON."""
    content = message["content"] or ""
    if not message.get("tool_calls"):
        return content
    return content + json.dumps(message["tool_calls"], ensure_ascii=False, default=str)


def as_messages(content: Content, role: str) -> Messages:
    """Messages as they are, and text as one message of `role`."""
    return ({"role": role, "content": content},) if isinstance(content, str) else content
