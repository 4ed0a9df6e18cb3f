"""Which records a stage learns from, which of them are held out, and what is made of each."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Literal, NamedTuple, TypeVar

from dpojax.data import unpaired
from dpojax.data.examples import Example
from dpojax.data.records import DataError, Record, message_text
from dpojax.data.report import Report

T = TypeVar("T")

JUST_ABOVE = 1e-15  # added to a hash in [0, 1), it gives the next larger bound
ROUNDING = 1e-6  # by which the difference of two scores in [0, 1] may be above 1


class DataRequirements(NamedTuple):
    """What a stage learns from.

    Attributes:
      form: "best": the best response alone, and no response that is labelled undesirable (SFT).
        "ranked": all responses of the records that state a preference; a single response is
        dropped. "labelled": single responses with a label, see `unpaired.split`; a single response
        without a label is dropped. "classified": texts with a class. "prompts": prompts alone.
      mismatched: give every example an unrelated second response, see `unpaired.with_mismatched`.
      scores: every record must have scores.
      unit_gaps: the scores of a record differ by 1 at most.
      weights: records may have weights. A loss that sorts a batch has no use for them.
      ties: keep ranked records whose responses are all tied, which are dropped otherwise.
      best_only: training reads the best response of a ranked record alone.
    """

    form: Literal["best", "ranked", "labelled", "classified", "prompts"] = "ranked"
    mismatched: bool = False
    scores: bool = False
    unit_gaps: bool = False
    weights: bool = True
    ties: bool = False
    best_only: bool = False


class NothingHeldOut(Exception):
    """No prompt hashed below the share to hold out; `lowest` is the lowest hash, in [0, 1)."""

    def __init__(self, lowest: float) -> None:
        super().__init__(lowest)
        self.lowest = lowest


def usable(
    loaded: Iterable[Record], requirements: DataRequirements, report: Report
) -> Iterator[Record]:
    """The records that a stage can learn from; the others are counted.

    Raises:
      DataError: a record has a weight, and the loss has no use for it; or its scores differ by more
        than the loss allows.
    """
    for record in loaded:
        if requirements.unit_gaps:
            _require_unit_gaps(record)
        if record.weight != 1 and not requirements.weights:
            raise DataError(
                f"{record.id}: field 'weight' is {record.weight:g}, but this loss sorts the batch "
                "and cannot weigh one example: leave the field out with data.columns=-weight"
            )
        cause = _unusable(record, requirements)
        if cause:
            report.count("dropped", cause, record.id)
        else:
            yield _best(record) if requirements.form == "best" else record


def first(records: Iterable[Record], limit: int, name: str, report: Report) -> Iterator[Record]:
    """At most `limit` records (0 is all). Nothing is read beyond them, which the report says."""
    for number, record in enumerate(records, start=1):
        yield record
        if number == limit:
            report.remarks.append(
                f"{name}: reading stopped at limit={limit}; what follows was not read"
            )
            return


def hash_of(record: Record) -> float:
    """A hash of the prompt in [0, 1): the same in every stage and for every tokenizer.

    Records without a prompt (plain texts) go by their best response. Of a message its role and
    what it says count.
    """
    named = record.prompt or record.responses[0]
    if not isinstance(named, str):
        named = [[message["role"], message_text(message)] for message in named]
    named = json.dumps(named)
    return int.from_bytes(hashlib.sha256(named.encode()).digest()[:8]) / 2**64


def hold_out(
    loaded: Iterable[Record], below: float, limit: int, report: Report
) -> Iterator[tuple[bool, Record]]:
    """Yield (whether it is held out, record), by whole prompts: those that hash below a number.

    Args:
      below: between 0 and 1, the share of the prompts that is held out.
      limit: most held-out records of each source (0 is all); those beyond it are counted.

    Raises:
      NothingHeldOut: at the end, if no prompt hashed so low. Hold out below a little more than
        `lowest` then, so that the prompt of that hash is held out.
    """
    lowest, held_out = None, Counter()
    for record in loaded:
        place = hash_of(record)
        if place >= below:
            lowest = place if lowest is None else min(lowest, place)
            yield False, record
        elif limit and held_out[record.source] == limit:
            report.count("dropped", "beyond_eval_limit", record.id)
        else:
            held_out[record.source] += 1
            yield True, record
    if lowest is not None and not held_out:
        raise NothingHeldOut(lowest)


def with_some_held_out(share: float, attempt: Callable[[float], T]) -> T:
    """attempt(share); if that holds nothing out, once more so that the lowest prompt is held out.

    Args:
      attempt: a number -> what comes of holding out the prompts that hash below it.
    """
    try:
        return attempt(share)
    except NothingHeldOut as nothing:
        return attempt(nothing.lowest + JUST_ABOVE)


def are_held_out(places: Sequence[float], share: float) -> list[bool]:
    """Which records are held out, by their `hash_of`: a share, and at least one; see `hold_out`."""
    lowest = min(places, default=0.0)
    below = share if lowest < share else lowest + JUST_ABOVE
    return [place < below for place in places]


def labelled(record: Record, identical: str, report: Report) -> list[Record]:
    """Split a record into labelled responses; the report counts them and what is left out.

    Args:
      identical: what to do where the best response equals the worst; after the split `tokenise`
        cannot compare them.
    """
    if len(record.responses) > 1 and record.responses[0] == record.responses[-1]:
        if identical == "error":
            raise DataError(f"{record.id}: identical responses (tokens.identical is error)")
        report.count("noted" if identical == "keep" else "dropped", "identical", record.id)
        if identical == "drop":
            return []
    halves = unpaired.split(record)
    if len(halves) == 2:
        report.count("noted", "split_in_two", record.id)
        report.read += 1
    for _ in range(len(record.responses) - len(halves)):
        report.count("noted", "between_best_and_worst", record.id)
    return halves


def best_response(example: Example) -> Example:
    """The example with its best response alone."""
    return example._replace(
        responses=example.responses[:1],
        cut=example.cut[:1],
        scores=None if example.scores is None else example.scores[:1],
        rank=None if example.rank is None else example.rank[:1],
        scored=None if example.scored is None else example.scored[:1],
    )


def _require_unit_gaps(record: Record) -> None:
    gap = max(record.scores) - min(record.scores) if record.scores else 0.0
    if gap > 1 + ROUNDING:
        raise DataError(
            f"{record.id}: its scores differ by {gap:g}, and this loss takes gaps of 1 at most: "
            "bring the scores of all records into [0, 1]"
        )


def _unusable(record: Record, requirements: DataRequirements) -> str | None:
    """Why the stage cannot learn from a record, or None if it can."""
    single = len(record.responses) == 1
    if record.all_tied and not (requirements.form == "ranked" and requirements.ties):
        return "all_tied"
    if requirements.form == "best" and record.label is False:
        return "undesirable"
    if requirements.form == "ranked" and single:
        return "one_response"
    if requirements.form == "labelled" and single and record.label is None:
        return "no_label"
    return None


def _best(record: Record) -> Record:
    scores = None if record.scores is None else record.scores[:1]
    return dataclasses.replace(
        record, responses=record.responses[:1], label=None, scores=scores, rank=None
    )
