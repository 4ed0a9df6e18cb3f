"""The form of Alpaca (Taori et al. 2023): an instruction, its input, and what to answer."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from dpojax.data.records.context import makes_dialogue
from dpojax.data.records.fields import Fields
from dpojax.data.records.record import Content, Record

TEMPLATE = (
    "Below is an instruction that describes a task. "
    "Write a response that appropriately completes the request.\n\n"
    "### Instruction:\n{instruction}\n\n{input}### Response:\n"
)
INPUT_TEMPLATE = "### Input:\n{input}\n\n"
OUTPUTS = ("output", "response")
INPUTS = ("input", "context")  # Dolly says context


def is_instruction(row: Mapping[str, Any]) -> bool:
    """Whether a row has an instruction and what to answer; not if it has it as a dialogue, too."""
    if any(isinstance(row.get(name), list) for name in ("messages", "conversations")):
        return False
    answers = isinstance(row.get("chosen"), str) or isinstance(row.get("rejected"), str)
    return "instruction" in row and (answers or any(name in row for name in OUTPUTS))


def instruction(fields: Fields) -> Record:
    """The responses are chosen and rejected, else `output`: one text, or a list, best first."""
    prompt = _prompt(fields)
    if "chosen" in fields.row or "rejected" in fields.row:
        responses = tuple(fields.text(name) for name in ("chosen", "rejected"))
        return Record(fields.id, prompt, responses, scores=fields.scores())
    name = fields.first(OUTPUTS) or "output"
    if isinstance(fields[name], list | tuple):
        items = fields.items(name, 1)
        parts = fields.parts(name, items)
        return Record(fields.id, prompt, tuple(map(parts.text, parts.row)))
    return Record(fields.id, prompt, (fields.text(name),))


def _prompt(fields: Fields) -> Content:
    """Alpaca's template; of a row that becomes a dialogue the words of the user alone."""
    words = fields.text("instruction")
    extra = input_of(fields)
    if makes_dialogue(fields):
        return f"{words}\n{extra}" if extra else words
    section = INPUT_TEMPLATE.format(input=extra) if extra else ""
    return TEMPLATE.format(instruction=words, input=section)


def input_of(fields: Fields) -> str:
    """The text that an instruction is about, or ""."""
    name = fields.first(INPUTS)
    return "" if name is None else fields.text(name)


def prompt_of(fields: Fields, names: Sequence[str]) -> Content:
    """The first of the named fields that the row has; an instruction with its input behind it."""
    name = fields.first(names) or names[0]
    content = fields.content(name)
    if name == "instruction" and isinstance(content, str) and (extra := input_of(fields)):
        return f"{content}\n{extra}"
    return content
