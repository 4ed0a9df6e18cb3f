"""Human choices between two responses, read from a file.

A row has one of two forms:

* that of Stiennon et al. 2020: `info`, two `summaries` with a `text` each, `choice` 0 or 1; it may
  have `worker` and `extra.confidence`;
* plain: `prompt`, `a`, `b`, `choice` "a", "b" or "tie"; it may have `worker`, `confidence`, `id` of
  the prompt, and `reference`.

Several rows may be the choices of several workers on the same comparison.
"""

from __future__ import annotations

from typing import NamedTuple

from dpojax.data import sources
from dpojax.data.records import DataError
from dpojax.data.records.fields import Fields
from dpojax.data.records.pairs import author_summary, read_comparison
from dpojax.evaluation.judging.verdicts import Choice, Comparison

MIDDLE = 5  # of the scale of confidence of Stiennon et al., 1 to 9
CHOICES = {"a": Choice.FIRST, "b": Choice.SECOND, "tie": Choice.TIE}


class HumanChoice(NamedTuple):
    """What one human says of a comparison.

    Attributes:
      choice: FIRST where A's response is the better one.
      worker: who says it; "" where the file does not tell.
      confidence: the larger, the surer; None where the file does not tell. Of the form of Stiennon
        et al. it is the distance from the middle of their scale: 1 to 4.
    """

    choice: Choice
    worker: str = ""
    confidence: float | None = None


class HumanComparison(NamedTuple):
    """A comparison, and the choices of one or more humans on it."""

    comparison: Comparison
    choices: tuple[HumanChoice, ...]


def read_humans(path: str) -> list[HumanComparison]:
    """Read the comparisons of a file, in the order of their first rows.

    Rows with the same prompt and the same two responses, in either order, are one comparison. Of
    the form of Stiennon et al., the id of a comparison is that of the post, and its `reference` is
    the summary of the post's author, where another row of the post has it.

    Args:
      path: what `data.sources.read` takes, such as a file of JSON lines, also compressed.

    Raises:
      DataError: there is no comparison; a row of neither form, or a field that cannot be used; a
        worker who chose twice on one comparison. The message names file, record and field.
    """
    grouped: dict[tuple, HumanComparison] = {}
    first_ids: dict[tuple, str] = {}
    authors: dict[str, str] = {}
    for row, id in sources.read(path):
        fields = Fields(row, id)
        comparison, choice = _summaries(fields, authors) if "info" in row else _plain(fields)
        key = comparison.id, comparison.prompt, *sorted((comparison.a, comparison.b))
        before = grouped.get(key, HumanComparison(comparison, ()))
        if choice.worker and choice.worker in {other.worker for other in before.choices}:
            raise DataError(
                f"{id}: field 'worker': {choice.worker!r} has a second choice on the comparison of "
                f"{first_ids[key]}; keep one of the two rows"
            )
        if before.comparison.a != comparison.a:
            choice = choice._replace(choice=choice.choice.mirrored)
        grouped[key] = before._replace(choices=(*before.choices, choice))
        first_ids.setdefault(key, id)
    if not grouped:
        raise DataError(f"{path}: holds no comparison")
    return [_with_reference(human, authors) for human in grouped.values()]


def _summaries(fields: Fields, authors: dict[str, str]) -> tuple[Comparison, HumanChoice]:
    """A row of Stiennon et al. The author's summary, if it is there, is put into `authors`."""
    prompt, texts, better = read_comparison(fields)
    info = fields.inside("info")
    id = info.text("id") if info.has("id") else prompt
    if by_author := author_summary(fields.row):
        authors[id] = by_author
    choice = Choice.SECOND if better else Choice.FIRST
    return Comparison(id, prompt, *texts), HumanChoice(
        choice, _worker(fields), _distance_from_middle(fields, better)
    )


def _distance_from_middle(fields: Fields, better: int) -> float | None:
    """How sure the worker is, 1 to 4; None where the row does not tell."""
    extra = fields.inside("extra") if fields.has("extra") else None
    if extra is None or not extra.has("confidence"):
        return None
    expected = "a number from 1 (sure of summary 0) to 9 (sure of summary 1)"
    confidence = extra.number("confidence", expected)
    if not 1 <= confidence <= 9:
        raise extra.error("confidence", expected)
    if (confidence - MIDDLE) * (2 * better - 1) < 0:
        raise DataError(
            f"{extra.where('confidence')} is {confidence:g}, which says summary "
            f"{int(confidence > MIDDLE)}, but the choice is {better}"
        )
    return abs(confidence - MIDDLE)


def _plain(fields: Fields) -> tuple[Comparison, HumanChoice]:
    prompt, first, second = (fields.text(name) for name in ("prompt", "a", "b"))
    reference = fields.text("reference") if fields.has("reference") else ""
    id = str(fields["id"]) if fields.has("id") else prompt
    choice = CHOICES.get(str(fields["choice"]).strip().lower())
    if choice is None:
        raise fields.error("choice", '"a", "b" or "tie"', "bad_verdict")
    confidence = fields.number("confidence") if fields.has("confidence") else None
    comparison = Comparison(id, prompt, first, second, reference)
    return comparison, HumanChoice(choice, _worker(fields), confidence)


def _worker(fields: Fields) -> str:
    return str(fields["worker"]) if fields.has("worker") else ""


def _with_reference(human: HumanComparison, authors: dict[str, str]) -> HumanComparison:
    """Give a comparison the author's summary as its reference, if it compares two others."""
    comparison = human.comparison
    reference = authors.get(comparison.id, "")
    if reference in ("", comparison.a, comparison.b):
        return human
    return human._replace(comparison=comparison._replace(reference=reference))
