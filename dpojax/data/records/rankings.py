"""Forms of K responses that are ranked or scored."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from dpojax.data import pairing
from dpojax.data.pairing import Labels
from dpojax.data.records import singles
from dpojax.data.records.fields import Fields, as_number
from dpojax.data.records.instructions import prompt_of
from dpojax.data.records.record import Content, Record, RecordError, make_record

STATED = Labels(tie=0.0)  # a file states a tie by equal numbers

PROMPTS = ("prompt", "instruction", "question", "input")
LISTS = ("responses", "answers", "completions", "generations")
TEXTS = ("response", "answer", "text", "completion", "output", "content")  # of a listed object
# Ranks (1 is best) and scores (high is best): fields of the row, and keys of a listed object.
RANKS, SCORES = ("ranks",), ("scores", "ratings", "rating", "rewards")
ITEM_RANKS = ("rank",)
ITEM_SCORES = ("score", "overall_score", "fine-grained_score", "rating", "reward")


def list_of(row: Mapping[str, Any]) -> str | None:
    """The name of the field that lists the responses, or None."""
    return next((name for name in LISTS if isinstance(row.get(name), list | tuple | str)), None)


def is_ranked(row: Mapping[str, Any]) -> bool:
    prompt = any(name in row for name in PROMPTS)
    return prompt and list_of(row) is not None and not singles.has_calls(row)


def ranked(fields: Fields) -> Record:
    """Order by ranks, else scores; ties keep the file's order.

    The list `responses` without either is best first. Other lists have to say.
    """
    prompt = prompt_of(fields, PROMPTS)
    name = list_of(fields.row) or "responses"
    items = fields.items(name, 1)
    parts = fields.parts(name, items)
    responses = [_response(parts, str(i)) for i in range(len(items))]
    ranks = _numbers(fields, parts, RANKS, ITEM_RANKS, needed=True)
    scores = _numbers(
        fields, parts, SCORES, ITEM_SCORES, needed=ranks is None or fields.need_scores
    )
    if scores is None and ranks is None:
        if name != "responses":
            raise RecordError(
                f"{fields.where(name)} should come with ranks or scores that say which is best; "
                "name them ranks or scores (data.columns), or the list responses if it is best "
                "first",
                "no_order",
            )
        _require_no_numbers(fields, parts)
        return make_record(fields.id, prompt, responses)
    return _ordered(fields.id, prompt, responses, ranks, scores)


def _require_no_numbers(fields: Fields, parts: Fields) -> None:
    """Raise RecordError if a list is taken as best first, and unread numbers may say otherwise."""
    count, known = len(parts.row), {*RANKS, *SCORES}
    for name, values in fields.row.items():
        if name in known or not isinstance(values, list | tuple) or len(values) != count:
            continue
        if count > 1 and all(as_number(value) is not None for value in values):
            raise RecordError(
                f"{fields.where(name)} has a number for each response: if they say which is best, "
                f"add scores={name} (high is best) or ranks={name} (1 is best) to data.columns; if "
                f"not, -{name}",
                "no_order",
            )


def _ordered(
    id: str,
    prompt: Content,
    responses: list[Content],
    ranks: list[float] | None,
    scores: list[float] | None,
) -> Record:
    values = scores if ranks is None else [-rank for rank in ranks]
    best_first = sorted(range(len(values)), key=lambda i: -values[i])
    places = tuple(pairing.places([values[i] for i in best_first], STATED))
    return make_record(
        id,
        prompt,
        [responses[i] for i in best_first],
        scores=None if scores is None else tuple(scores[i] for i in best_first),
        rank=None if places == tuple(range(len(places))) else places,
    )


def _response(parts: Fields, name: str) -> Content:
    """A listed response: text, messages, or an object with its text."""
    value = parts[name]
    if isinstance(value, Mapping) and not any(key in value for key in ("role", "from")):
        inside = parts.inside(name)
        return inside.content(inside.first(TEXTS) or TEXTS[0])
    return parts.content(name)


def _numbers(
    fields: Fields,
    parts: Fields,
    names: tuple[str, ...],
    item_names: tuple[str, ...],
    needed: bool,
) -> list[float] | None:
    """One number for each response, from a field of the row or from the listed objects, or None.

    Raises:
      RecordError: they are needed, and one is no number, or one is missing.
    """
    count = len(parts.row)
    name = fields.first(names)
    if name is not None:
        values = fields.items(name, 0) if needed else fields.row[name]
        numbers = [as_number(value) for value in values] if isinstance(values, list) else []
        if len(numbers) == count and None not in numbers:
            fields[name]
            return numbers
        if needed:
            raise RecordError(
                f"{fields.where(name)} should be {count} finite numbers, one for each response, "
                f"got {str(values)[:80]}",
                "bad_score",
            )
        return None
    objects = [value for value in parts.row.values() if isinstance(value, Mapping)]
    name = next((x for x in item_names if any(o.get(x) is not None for o in objects)), None)
    if name is None or len(objects) < count:
        return None
    numbers = [as_number(parts.inside(place)[name]) for place in parts.row]
    if None not in numbers:
        return numbers
    if needed:
        place = numbers.index(None)
        raise parts.inside(str(place)).error(name, "a finite number", "bad_score")
    return None
