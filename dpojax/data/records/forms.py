"""The table of forms, and how a row is parsed: which form it has, and what stands beside it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from dpojax.data.records import instructions, pairs, rankings, singles
from dpojax.data.records.context import refuse_media, with_context
from dpojax.data.records.dialogues import unpack_messages
from dpojax.data.records.fields import Fields
from dpojax.data.records.record import (
    DataError,
    Record,
    RecordError,
    kind_of,
    listed,
)


class Form(NamedTuple):
    """A form of data.

    Attributes:
      fields: its fields, for a person.
      matches: whether a row with these fields has this form; the first form of `FORMS` that
        matches is taken.
      parse: the fields of a row -> a record; raises RecordError.
    """

    fields: str
    matches: Callable[[Mapping[str, Any]], bool]
    parse: Callable[[Fields], Record]


def _has(*names: str) -> Callable[[Mapping[str, Any]], bool]:
    """Whether a row has all of these fields."""
    return lambda row: set(names) <= row.keys()


def _is_pair(row: Mapping[str, Any]) -> bool:
    """Without a prompt the answers have to be message lists, which hold it."""
    names = pairs.answers_of(row)
    if names is None:
        return False
    texts = all(isinstance(row.get(name), str | None) for name in names)
    return not texts or any(row.get(name) is not None for name in pairs.PROMPTS) or "prompt" in row


def _never(row: Mapping[str, Any]) -> bool:
    """The form has to be named: its fields are those of another form, too."""
    return False


FORMS: dict[str, Form] = {
    "comparison": Form(
        "info, summaries, choice", _has("info", "summaries", "choice"), pairs.comparison
    ),
    "instruction": Form(
        "instruction, input, chosen, rejected; or instruction, input, output (a text, or a list, "
        "best first)",
        instructions.is_instruction,
        instructions.instruction,
    ),
    "judged": Form(
        "prompt, response_a, response_b (and other names of two), and winner, better_response_id, "
        "overall_preference, labels or two scores",
        pairs.has_verdict,
        pairs.judged,
    ),
    "unpaired": Form(
        "prompt, completion, label; or messages, label", singles.is_unpaired, singles.unpaired
    ),
    "pair": Form(
        "prompt, chosen, rejected; or chosen, rejected (whole message lists); optionally "
        "score_chosen and score_rejected",
        _is_pair,
        pairs.pair,
    ),
    "hh": Form("chosen, rejected (whole dialogues as text)", _has("chosen", "rejected"), pairs.hh),
    "ranked": Form(
        "prompt, responses (best first), optionally ranks or scores; or prompt, answers, with "
        "rank or score in each",
        rankings.is_ranked,
        rankings.ranked,
    ),
    "article": Form("article, highlights", _has("article", "highlights"), singles.article),
    "text": Form("text; or prompt, completion; or messages", singles.is_text, singles.text),
    "classified": Form("text, label (a class: its name or number)", _never, singles.classified),
}


def detect(row: Mapping[str, Any], id: str = "row") -> str:
    """Find the form of a row from its keys. Fields that are null count where no form fits without.

    Raises:
      RecordError: no known form has these keys; the message lists the forms.
    """
    held = {name: value for name, value in row.items() if value is not None}
    for fields in (held, row):
        for name, form in FORMS.items():
            if form.matches(fields):
                return name
        if len(held) == len(row):
            break
    forms = "\n".join(f"  {name}: {form.fields}" for name, form in FORMS.items())
    raise RecordError(
        f"{id}: no known form has the fields {listed(row)}. Rename them (columns=...) or give "
        f"one of these forms:\n{forms}",
        "no_form",
    )


def parse(
    row: Mapping[str, Any],
    id: str,
    form: str = "auto",
    *,
    need_scores: bool = False,
) -> Record:
    """Parse one row.

    Args:
      row: fields by name.
      id: of the record, for error messages.
      form: a name from `FORMS`, or `auto` to find it from the keys.
      need_scores: the loss reads scores. Otherwise scores that are no numbers are passed over.

    Raises:
      RecordError: a missing or mistyped field, a record without responses, answers to different
        prompts, or no known form. The message names `id` and the field.
      DataError: `form` is no name of a form.
    """
    return parse_fields(open_row(row, id, need_scores), form)


def open_row(row: Any, id: str, need_scores: bool = False, last_turn: bool = False) -> Fields:
    """The fields of a row, with messages that are written as JSON text read."""
    if not isinstance(row, Mapping):
        raise RecordError(
            f"{id}: expected an object with named fields, got {kind_of(row)}", "field_type"
        )
    unpacked = _unpacked(row)
    fields = Fields({**row, **unpacked}, id, need_scores=need_scores, last_turn=last_turn)
    if unpacked:
        fields.notes.append("json_text")
    return fields


def parse_fields(fields: Fields, form: str = "auto") -> Record:
    """Parse an opened row, see `parse`. Afterwards `fields` tells what was not read."""
    if form != "auto" and form not in FORMS:
        raise DataError(f"form {form!r} is not known; choose auto or one of {listed(FORMS)}")
    refuse_media(fields)
    name = detect(fields.row, fields.id) if form == "auto" else form
    record = with_context(FORMS[name].parse(fields), fields)
    if fields.need_scores and record.scores is None and len(record.responses) > 1:
        raise RecordError(
            f"{fields.id}: this loss needs to know what every response is worth: give a pair "
            "score_chosen and score_rejected (or chosen_reward and rejected_reward, or "
            "margin), and a ranking scores; data.columns renames fields",
            "no_score",
        )
    return record


# Fields of which all have to be messages before a text in them is read as such.
TOGETHER = (*pairs.ANSWERS, *pairs.TWO_ANSWERS)
JSON_STARTS = tuple("[{ \n")
ALONE = (*pairs.PROMPTS, *singles.COMPLETIONS, "history")


def _unpacked(row: Mapping[str, Any]) -> dict[str, list]:
    """The fields whose text is messages as JSON, read."""
    unpacked: dict[str, list] = {}
    if not any(isinstance(value, str) and value[:1] in JSON_STARTS for value in row.values()):
        return unpacked
    for names in TOGETHER:
        if all(isinstance(row.get(name), str) for name in names):
            read = [unpack_messages(row[name]) for name in names]
            if all(read):
                unpacked |= zip(names, read)
    for name in ALONE:
        value = row.get(name)
        if isinstance(value, str) and (messages := unpack_messages(value)):
            unpacked[name] = messages
    return unpacked
