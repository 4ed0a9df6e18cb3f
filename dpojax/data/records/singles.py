"""Forms of one response: texts to imitate, labelled responses, texts with a class."""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from typing import Any

from dpojax.data.records import dialogues
from dpojax.data.records.fields import Fields, as_truth
from dpojax.data.records.record import (
    Content,
    Messages,
    Record,
    RecordError,
    make_record,
)

ARTICLE_TEMPLATE = "Article: {article}\n\nTL;DR:"
DIALOGUES = ("messages", "conversations", "conversation")
PROMPTS = ("prompt", "question", "query", "input", "inputs")
COMPLETIONS = ("completion", "response", "output", "targets")
CALLS = "answers"  # xLAM: the tool calls that answer a query
LABELS = ("label", "kto_tag")


def is_text(row: Mapping[str, Any]) -> bool:
    dialogue = any(name in row for name in DIALOGUES)
    return "text" in row or dialogue or _has_completion(row) or has_calls(row)


def has_calls(row: Mapping[str, Any]) -> bool:
    """Whether the answer is a list of calls of the row's tools (xLAM), which may be JSON text."""
    if "tools" not in row or CALLS not in row or not any(name in row for name in PROMPTS):
        return False
    calls = dialogues.unpack_json(row[CALLS]) or row[CALLS]
    return isinstance(calls, list | tuple) and all(
        isinstance(call, Mapping) and "arguments" in call for call in calls
    )


def _has_completion(row: Mapping[str, Any]) -> bool:
    return all(any(name in row for name in names) for names in (PROMPTS, COMPLETIONS))


def text(fields: Fields) -> Record:
    """A dialogue, a prompt with its completion or calls, or a text: the first of them."""
    name = fields.first(DIALOGUES)
    if name is not None:
        prompt, response = _dialogue(fields, name)
        return Record(fields.id, prompt, (response,))
    if _has_completion(fields.row):
        return _completed(fields)
    if has_calls(fields.row):
        return _calling(fields)
    if "text" not in fields.row:
        raise fields.error(next(x for x in DIALOGUES if x in fields.row), "a list of messages")
    return Record(fields.id, "", (fields.text("text"),))


def _calling(fields: Fields) -> Record:
    """A query and the tool calls that answer it."""
    prompt = fields.content(fields.first(PROMPTS) or PROMPTS[0])
    turn = {"role": "assistant", "content": "", "tool_calls": fields[CALLS]}
    answer = dialogues.read_messages([turn], fields.where(CALLS))
    return make_record(fields.id, prompt, (answer,))


def _messages(fields: Fields, name: str) -> Messages:
    """A dialogue of messages, or of texts by the user and the assistant in turn (LIMA)."""
    texts = fields.row[name]
    listed = isinstance(texts, list | tuple) and len(texts) > 0
    if not listed or not all(isinstance(text, str) for text in texts):
        return fields.messages(name)
    roles = itertools.cycle(("user", "assistant"))
    turns = [{"role": role, "content": text} for role, text in zip(roles, fields[name])]
    return dialogues.read_messages(turns, fields.where(name))


def _dialogue(fields: Fields, name: str) -> tuple[Messages, Messages]:
    """The turns before the first answer to imitate, and the turns from there on."""
    messages = _messages(fields, name)
    dialogues.require_answer(messages, fields.where(name))
    if len(messages) < 2:
        raise RecordError(
            f"{fields.where(name)} should be a dialogue that ends with an assistant message after "
            "a prompt; it has one message",
            "no_prompt",
        )
    if fields.last_turn:
        return messages[:-1], messages[-1:]
    roles = [message["role"] for message in messages]
    first = roles.index("assistant", 1)  # an assistant that opens the dialogue answers nothing
    return messages[:first], messages[first:]


def _completed(fields: Fields, label: bool | None = None) -> Record:
    prompt = fields.content(fields.first(PROMPTS) or PROMPTS[0])
    name = fields.first(COMPLETIONS) or next(x for x in COMPLETIONS if x in fields.row)
    completion: Content = fields.content(name)
    if not isinstance(completion, str):
        dialogues.require_answer(completion, fields.where(name))
    return make_record(fields.id, prompt, (completion,), label=label)


def is_unpaired(row: Mapping[str, Any]) -> bool:
    """Whether a row labels one response.

    The label of a dialogue or a `response` has to say yes or no. Other labels of such rows are
    classes, which stay unread.
    """
    label = next((row[name] for name in LABELS if name in row), None)
    if "prompt" in row and "completion" in row and any(name in row for name in LABELS):
        return True
    answers = any(name in row for name in DIALOGUES) or _has_completion(row)
    return answers and as_truth(label) is not None


def unpaired(fields: Fields) -> Record:
    label = fields.truth(fields.first(LABELS) or LABELS[0])
    if _has_completion(fields.row):
        return _completed(fields, label)
    name = fields.first(DIALOGUES)
    if name is None:
        raise fields.error("completion", "text or messages")
    messages = fields.messages(name)
    dialogues.require_answer(messages, fields.where(name))
    if len(messages) < 2:
        raise RecordError(f"{fields.where(name)} has an answer and no prompt", "no_prompt")
    return Record(fields.id, messages[:-1], (messages[-1:],), label)


def article(fields: Fields) -> Record:
    """CNN/DailyMail (Hermann et al. 2015): an article, and its highlights as the summary.

    The prompt is that of a comparison of two summaries of an article.
    """
    prompt = ARTICLE_TEMPLATE.format(article=fields.text("article"))
    return Record(fields.id, prompt, (" " + fields.text("highlights"),))


def classified(fields: Fields) -> Record:
    """A class that is a number gets the name that transformers gives it, such as LABEL_1."""
    label = fields["label"]
    if isinstance(label, bool) or not isinstance(label, str | int) or label == "":
        error = fields.error(
            "label", "the class of the text, a name or a whole number", "bad_label"
        )
        raise RecordError(
            f"{error}; if it has another name, say so: data.columns=label=NAME", error.cause
        )
    name = label if isinstance(label, str) else f"LABEL_{label}"
    return Record(fields.id, "", (fields.text("text"),), category=name)
