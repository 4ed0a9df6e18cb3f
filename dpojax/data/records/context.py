"""What stands beside the prompt in a row of any form: system, history, tools, options, weight."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

from dpojax.data.records.dialogues import (
    read_messages,
    require_unicode,
    require_unicode_inside,
    split_hh,
    unpack_json,
)
from dpojax.data.records.fields import Fields, as_number, is_blank
from dpojax.data.records.record import (
    Messages,
    Record,
    RecordError,
    as_messages,
    kind_of,
)

SYSTEM = ("system", "system_prompt")
MEDIA = ("images", "image", "videos", "video", "audios", "audio")
OPTIONS = "chat_template_kwargs"
BESIDE = (*SYSTEM, "history", "tools", OPTIONS)


def refuse_media(fields: Fields) -> None:
    """Raise RecordError for a record with images, video or audio: no model here sees them."""
    if fields.row.keys().isdisjoint(MEDIA):
        return
    for name in MEDIA:
        if not is_blank(fields.row.get(name)):
            raise RecordError(
                f"{fields.where(name)} holds {kind_of(fields.row[name])}, which no model here "
                f"reads; to train without it, leave it out: data.columns=-{name}",
                "media",
            )


def makes_dialogue(fields: Fields) -> bool:
    """Whether a row with a plain prompt becomes a dialogue, since something stands beside it.

    An empty system text and an empty history count: other rows of such data have more to say, and
    all of them should be rendered alike. A history that is text is that of another form.
    """
    if fields.row.keys().isdisjoint(BESIDE):
        return False
    history = fields.row.get("history")
    return (
        fields.first(SYSTEM) is not None
        or isinstance(history, list | tuple)
        or not is_blank(fields.row.get("tools"))
        or not is_blank(fields.row.get(OPTIONS))
    )


def with_context(record: Record, fields: Fields) -> Record:
    """The record with its weight, and with what the row gives beside the prompt.

    A plain prompt becomes a turn of the user where there is a system text, a history, tools or
    options of the template. This is noted as `made_dialogue`. A plain text without a prompt has no
    place for them.

    Raises:
      RecordError: one of the fields is malformed, or the system text is not that of the dialogue.
    """
    if fields.has("weight"):
        record = dataclasses.replace(record, weight=_weight(fields))
    if record.prompt == "" or not makes_dialogue(fields):
        return record
    prompt, responses = record.prompt, record.responses
    if isinstance(prompt, str):
        fields.notes.append("made_dialogue")
        prompt = split_hh(prompt)
        responses = tuple(as_messages(_unspaced(text), "assistant") for text in responses)
    return dataclasses.replace(
        record,
        prompt=_prompt(fields, prompt),
        responses=responses,
        tools=_tools(fields),
        template_options=_options(fields),
    )


def _unspaced(text: str) -> str:
    """Without the one space that separates an answer from "Assistant:" in a plain text."""
    return text.removeprefix(" ")


def _prompt(fields: Fields, prompt: Messages) -> Messages:
    """System turn, history, and the prompt."""
    opened = prompt[0]["role"] == "system"
    system, turns = prompt[:opened], prompt[opened:]
    name = fields.first(SYSTEM)
    if name is not None and not fields.was_read(name):
        stated = _system(fields, name)
        if stated and system and stated[0]["content"].strip() != system[0]["content"].strip():
            raise RecordError(
                f"{fields.where(name)} is not the system turn of the dialogue: leave one of them "
                f"out (data.columns=-{name})",
                "system_differs",
            )
        system = system or stated
    return (*system, *_history(fields), *turns)


def _system(fields: Fields, name: str) -> Messages:
    """The system turn, or none for an empty text."""
    value = fields[name]
    if isinstance(value, str):
        text = fields.text(name)
    else:
        messages = fields.messages(name)
        if any(message["role"] != "system" for message in messages):
            raise fields.error(name, "text or a message of the system")
        text = "\n\n".join(message["content"] for message in messages)
    return ({"role": "system", "content": text},) if text.strip() else ()


def _history(fields: Fields) -> Messages:
    """Earlier turns: messages, or pairs of what the user and the assistant said."""
    if fields.was_read("history") or not isinstance(fields.row.get("history"), list | tuple):
        return ()
    values, turns = fields["history"], []
    if all(isinstance(value, Mapping) for value in values):
        return read_messages(values, fields.where("history"))
    for value in values:
        texts = value if isinstance(value, list | tuple) else ()
        if len(texts) != 2 or not all(isinstance(text, str) for text in texts):
            raise RecordError(
                f"{fields.where('history')} should be a list of pairs [user, assistant] or of "
                f"messages, but it holds {kind_of(value)}",
                "field_type",
            )
        for role, text in zip(("user", "assistant"), texts):
            require_unicode(text, fields.where("history"))
            turns.append({"role": role, "content": text})
    return tuple(turns)


def _tools(fields: Fields) -> tuple | None:
    value = fields["tools"]
    if is_blank(value):
        return None
    unpacked = unpack_json(value)
    value = value if unpacked is None else unpacked
    listed = value if isinstance(value, list | tuple) else [value]
    tools = [unpack_json(tool) or tool for tool in listed]
    if not all(isinstance(tool, Mapping) for tool in tools):
        raise fields.error("tools", "a list of tools (objects), or such a list as JSON text")
    require_unicode_inside(tools, fields.where("tools"))
    return tuple(tools) or None


def _options(fields: Fields) -> dict | None:
    value = fields[OPTIONS]
    if is_blank(value):
        return None
    unpacked = unpack_json(value)
    options = value if unpacked is None else unpacked
    if not isinstance(options, Mapping):
        raise fields.error(OPTIONS, "an object of keyword arguments for the chat template")
    require_unicode_inside(options, fields.where(OPTIONS))
    return dict(options) or None


def _weight(fields: Fields) -> float:
    weight = as_number(fields["weight"])
    if weight is None or weight < 0:
        raise fields.error("weight", "a finite number, 0 or more", "bad_weight")
    if weight == 0:
        raise RecordError(f"{fields.where('weight')} is 0", "zero_weight")
    return weight
