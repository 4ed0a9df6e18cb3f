"""Checked access to the fields of a row: every error names the record and the field."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from dpojax.data.records.dialogues import read_messages, require_unicode, unpack_json
from dpojax.data.records.record import (
    Content,
    Messages,
    RecordError,
    Scores,
    kind_of,
    listed,
)

LARGEST = 3.4e38  # scores become float32
SCORE_FIELDS = (
    ("score_chosen", "score_rejected"),
    ("chosen_score", "rejected_score"),
    ("chosen_reward", "rejected_reward"),
    ("rating_chosen", "rating_rejected"),
    ("chosen_rating", "rejected_rating"),
    ("chosen-rating", "rejected-rating"),
)
ALL_SCORES = {"margin", *(name for names in SCORE_FIELDS for name in names)}
# Keys of a message that say whether to learn from it, in formats of others. None is read.
MESSAGE_WEIGHTS = frozenset(("weight", "loss", "loss_weight", "train"))
ITEM = re.compile(r"\.\d+\.")
TRUE = ("true", "1", "1.0", "yes", "desirable")
FALSE = ("false", "0", "0.0", "-1", "-1.0", "no", "undesirable")


class Fields:
    """The fields of a row, and which of them were read.

    Attributes:
      row: fields by name.
      id: of the record.
      need_scores: a score that is no number is an error. Otherwise such scores are not read.
      last_turn: of a dialogue to imitate, read the last turn of the assistant alone.
      is_list: the fields are the items of a list, named "0", "1", ...
      notes: what was done to the record beyond reading it, names in `report.CAUSES`.
    """

    def __init__(
        self,
        row: Mapping[str, Any],
        id: str,
        path: str = "",
        *,
        need_scores: bool = False,
        last_turn: bool = False,
    ) -> None:
        self.row, self.id, self.path = row, id, path
        self.need_scores, self.last_turn = need_scores, last_turn
        self.is_list = False
        self.notes: list[str] = []
        self._read: set[str] = set()
        self._unread_inside: set[str] = set()
        self._inside: dict[str, Fields] = {}  # fields of objects in fields

    def __getitem__(self, name: str) -> Any:
        self._read.add(name)
        return self.row.get(name)

    def has(self, name: str) -> bool:
        """Whether the row has the field, and it is not null. This does not read it."""
        return self.row.get(name) is not None

    def first(self, names: Sequence[str]) -> str | None:
        """The first of the names that the row has, not null; None if it has none."""
        return next((name for name in names if self.has(name)), None)

    def was_read(self, name: str) -> bool:
        return name in self._read

    def unread(self) -> Iterator[str]:
        """Names of the fields that hold something and were not read."""
        yield from self._unread_here()
        yield from sorted(self._unread_inside | set(self._unread_in_objects()))

    def _unread_here(self) -> Iterator[str]:
        for name, value in self.row.items():
            if name not in self._read and not is_blank(value):
                yield name

    def _unread_in_objects(self) -> Iterator[str]:
        """Names like `question.id` and, in the objects of a list, `completions[].model`."""
        for fields in self._inside.values():
            yield from fields._unread_in_objects()
            if not fields.is_list:
                yield from (ITEM.sub("[].", fields.path + name) for name in fields._unread_here())

    def where(self, name: str) -> str:
        return f"{self.id}: field {self.path + name!r}"

    def error(self, name: str, expected: str, cause: str = "field_type") -> RecordError:
        """The error that says what field `name` should have been.

        Args:
          cause: of a field that is there; others are `field_missing` and `field_null`.
        """
        if name not in self.row:
            return RecordError(
                f"{self.where(name)} is missing (expected {expected}); "
                f"the record has {listed(self.row)}",
                "field_missing",
            )
        cause = "field_null" if self.row[name] is None else cause
        return RecordError(
            f"{self.where(name)} should be {expected}, got {kind_of(self[name])}", cause
        )

    def text(self, name: str) -> str:
        """A field that must be text (it may be the empty string)."""
        if not isinstance(self[name], str):
            raise self.error(name, "text")
        require_unicode(self[name], self.where(name))
        return self[name]

    def content(self, name: str) -> Content:
        """A field that must be text, a message or a list of messages."""
        return self.text(name) if isinstance(self[name], str) else self.messages(name)

    def messages(self, name: str) -> Messages:
        """A field that must be a message or a list of messages, see `read_messages`."""
        value = self[name]
        listed_values = [value] if isinstance(value, Mapping) else value
        if not isinstance(listed_values, list | tuple) or not listed_values:
            cause = "field_type" if listed_values else "empty_dialogue"
            expected = "text or a non-empty list of messages {'role': text, 'content': text}"
            raise self.error(name, expected, cause)
        messages = read_messages(listed_values, self.where(name))
        for message in messages:
            if len(message) > 2:
                self._unread_inside |= {
                    f"{name}[].{key}" for key in MESSAGE_WEIGHTS & message.keys()
                }
        return messages

    def items(self, name: str, least: int) -> list:
        """A field that must be a list of at least `least` items; it may be written as JSON text."""
        value = self[name]
        unpacked = unpack_json(value)
        if isinstance(unpacked, list):
            self.notes.append("json_text")
            value = unpacked
        if not isinstance(value, list | tuple) or len(value) < least:
            short = isinstance(value, list | tuple)
            expected = f"a list of {least} or more"
            raise self.error(name, expected, "too_few_responses" if short else "field_type")
        return list(value)

    def number(
        self, name: str, expected: str = "a finite number", cause: str = "bad_score"
    ) -> float:
        """A field that must be a number in the range of float32; it may be written as text."""
        number = as_number(self[name])
        if number is None:
            raise self.error(name, expected, cause)
        return number

    def truth(self, name: str) -> bool:
        """A field that must be true or false, or 1 or 0 (or -1), as a value or as text."""
        truth = as_truth(self[name])
        if truth is None:
            raise self.error(name, "true (desirable) or false (undesirable)", "bad_label")
        return truth

    def scores(self) -> Scores | None:
        """The scores of (chosen, rejected); None if there is no such field, or if one is null.

        Raises:
          RecordError: scores are needed, and one is no number or is missing.
        """
        if self.row.keys().isdisjoint(ALL_SCORES):
            return None
        for names in (*SCORE_FIELDS, ("margin",)):
            if any(name in self.row for name in names):
                scores = self.optional_numbers(names)
                return (*scores, 0.0) if scores and names == ("margin",) else scores
        return None

    def optional_numbers(self, names: Sequence[str]) -> Scores | None:
        """The numbers in these fields; None if one is null, or unusable and not needed."""
        if any(name in self.row and self.row[name] is None for name in names):
            return None
        if self.need_scores or all(as_number(self.row.get(name)) is not None for name in names):
            return tuple(self.number(name) for name in names)
        return None

    def inside(self, name: str) -> Fields:
        """The fields of the object in field `name`."""
        if not isinstance(self[name], Mapping):
            raise self.error(name, "an object with named fields")
        return self._opened(name, self[name])

    def parts(self, name: str, items: Sequence[Any]) -> Fields:
        """The items of the list in field `name`, as fields "0", "1", ..."""
        return self._opened(name, {str(i): item for i, item in enumerate(items)}, is_list=True)

    def _opened(self, name: str, row: Mapping[str, Any], is_list: bool = False) -> Fields:
        if name not in self._inside:
            fields = Fields(row, self.id, f"{self.path}{name}.", need_scores=self.need_scores)
            fields.is_list = is_list
            self._inside[name] = fields
        return self._inside[name]


def as_number(value: Any) -> float | None:
    """A finite number in the range of float32, or a text that writes one; else None."""
    if isinstance(value, str):
        try:
            value = float(value) if "_" not in value else None
        except ValueError:
            return None
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    return float(value) if -LARGEST <= value <= LARGEST else None


def as_truth(value: Any) -> bool | None:
    """True or false from a bool, from 1, 0 or -1, or from a text that says so; else None."""
    if not isinstance(value, bool | int | float | str):
        return None
    text = str(value).strip().lower()
    return True if text in TRUE else False if text in FALSE else None


def is_blank(value: Any) -> bool:
    """Whether a field holds nothing: null, or an empty text, list or object."""
    return value is None or (isinstance(value, str | list | tuple | Mapping) and not value)
