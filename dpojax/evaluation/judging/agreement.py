"""Is a judge to be believed? Its choices against human ones, and those of humans among themselves.

A judge *decides* a comparison if it prefers the same response in both orders. It is *right* if a
human chose that response.

* accuracy = right / all comparisons. Ties, inconsistent and unparsed judgements are not right.
* accuracy of decided comparisons = right / (right + wrong).
* Cohen's kappa of the decided comparisons (Cohen 1960) = (accuracy - chance) / (1 - chance), with
  the chance that two raters with these shares of A and B agree. 0 is chance and 1 is perfect.

Comparisons that a human called a tie are left out and counted. If several humans chose, each
comparison still counts once: its rows share a weight of 1. Intervals are over prompts.
"""

from __future__ import annotations

import collections
import itertools
from collections.abc import Hashable, Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike

from dpojax.evaluation.judging.bootstrap import (
    RESAMPLES,
    SHARE,
    UNKNOWN,
    Array,
    Measured,
    index_prompts,
    interval,
    prompt_weights,
    pseudo_size,
    pseudo_weights,
    ratio,
)
from dpojax.evaluation.judging.verdicts import Choice, Judgement, Outcome

_SIDES = {Choice.FIRST: 0, Choice.SECOND: 1}  # row or column of a table of choices
_DECIDED = {Outcome.WIN: 0, Outcome.LOSS: 1}


class Agreement(NamedTuple):
    """How a judge's choices agree with human ones; the module says what each number is.

    Attributes:
      accuracy: over all comparisons with a human choice.
      decided_accuracy: over those that the judge decided.
      kappa: Cohen's, over those that the judge decided.
      right: human choices that equal the judge's.
      wrong: human choices that contradict the judge's.
      undecided: human choices where the judge's outcome is a tie, inconsistent or unparsed.
      human_ties: rows that were left out because the human called a tie or chose nothing.
      prompts: how many have a human choice.
    """

    accuracy: Measured
    decided_accuracy: Measured
    kappa: Measured
    right: int
    wrong: int
    undecided: dict[Outcome, int]
    human_ties: int
    prompts: int

    @property
    def choices(self) -> int:
        """Human choices that the judge's were held against."""
        return self.right + self.wrong + sum(self.undecided.values())


class HumanAgreement(NamedTuple):
    """How the choices of two humans on one comparison agree.

    Attributes:
      agreement: the share of pairs of humans with the same choice; each comparison counts once.
      kappa: Cohen's, of pairs in both orders, since no human is the first one.
      comparisons: how many have the choices of two humans or more.
      pairs: of humans, over all of them.
    """

    agreement: Measured
    kappa: Measured
    comparisons: int
    pairs: int


def agreement(
    judgements: Sequence[Judgement],
    humans: Sequence[Choice],
    ids: Sequence[Hashable],
    comparisons: Sequence[Hashable] | None = None,
    *,
    resamples: int = RESAMPLES,
    seed: int = 0,
) -> Agreement:
    """Hold a judge's choices against human ones.

    Args:
      judgements: one per row. A row is the choice of one human.
      humans: FIRST where the human chose A.
      ids: the prompt of each row.
      comparisons: what each row compares, any labels; rows with the same one are choices of several
        humans. None if each row is a comparison of its own.

    Raises:
      ValueError: the arguments have different lengths.
    """
    comparisons = range(len(ids)) if comparisons is None else comparisons
    _require_equal_lengths(judgements, humans, ids, comparisons)
    rows = [i for i, choice in enumerate(humans) if choice in _SIDES]
    outcomes = [judgements[i].outcome for i in rows]
    sides = [_SIDES[humans[i]] for i in rows]
    raters = collections.Counter(comparisons[i] for i in rows)
    shares = np.array([1 / raters[comparisons[i]] for i in rows])
    prompts = index_prompts([ids[i] for i in rows])
    # Per prompt: [judge's side, human's side], and what is undecided.
    tables = np.zeros((int(prompts.max(initial=-1)) + 1, 2, 2))
    undecided = np.zeros(len(tables))
    for prompt, outcome, side, share in zip(prompts, outcomes, sides, shares):
        if outcome in _DECIDED:
            tables[prompt, _DECIDED[outcome], side] += share
        else:
            undecided[prompt] += share
    options = dict(resamples=resamples, seed=seed)
    right, decided = tables.trace(axis1=1, axis2=2), tables.sum((1, 2))
    hits = sum(_DECIDED.get(outcome) == side for outcome, side in zip(outcomes, sides))
    counts = collections.Counter(outcomes)
    return Agreement(
        accuracy=_share(right, decided + undecided, **options),
        decided_accuracy=_share(right, decided, **options),
        kappa=_kappa(tables, **options),
        right=hits,
        wrong=sum(counts[outcome] for outcome in _DECIDED) - hits,
        undecided={o: counts[o] for o in Outcome if o not in _DECIDED},
        human_ties=len(humans) - len(rows),
        prompts=len(tables),
    )


def by_bucket(
    judgements: Sequence[Judgement],
    humans: Sequence[Choice],
    ids: Sequence[Hashable],
    buckets: Sequence[Hashable],
    comparisons: Sequence[Hashable] | None = None,
    *,
    resamples: int = RESAMPLES,
    seed: int = 0,
) -> dict[Hashable, Agreement]:
    """`agreement` of the rows of each bucket, such as the human's confidence, by sorted label.

    Args:
      buckets: a label of each row; rows with None are left out.
    """
    comparisons = range(len(ids)) if comparisons is None else comparisons
    _require_equal_lengths(judgements, humans, ids, comparisons, buckets)
    tables = {}
    for bucket in sorted({label for label in buckets if label is not None}):
        columns = (judgements, humans, ids, comparisons)
        rows = [[c[i] for i, label in enumerate(buckets) if label == bucket] for c in columns]
        tables[bucket] = agreement(*rows, resamples=resamples, seed=seed)
    return tables


def human_agreement(
    humans: Sequence[Choice],
    ids: Sequence[Hashable],
    comparisons: Sequence[Hashable],
    *,
    resamples: int = RESAMPLES,
    seed: int = 0,
) -> HumanAgreement | None:
    """Hold the choices of humans on the same comparison against each other.

    Args:
      humans: one per row; a row with a tie or without a choice is left out.
      ids: the prompt of each row.
      comparisons: what each row compares, any labels.

    Returns:
      None if no comparison has the choices of two humans.

    Raises:
      ValueError: the arguments have different lengths.
    """
    _require_equal_lengths(humans, ids, comparisons)
    sides_of: dict[tuple, list[int]] = {}
    for choice, name, comparison in zip(humans, ids, comparisons):
        if choice in _SIDES:
            sides_of.setdefault((name, comparison), []).append(_SIDES[choice])
    several = {key: sides for key, sides in sides_of.items() if len(sides) > 1}
    if not several:
        return None
    prompts = index_prompts([name for name, _ in several])
    tables, pairs = np.zeros((int(prompts.max()) + 1, 2, 2)), 0
    for prompt, sides in zip(prompts, several.values()):
        ordered = list(itertools.permutations(sides, 2))
        pairs += len(ordered) // 2
        for pair in ordered:
            tables[prompt][pair] += 1 / len(ordered)
    options = dict(resamples=resamples, seed=seed)
    same = _share(tables.trace(axis1=1, axis2=2), tables.sum((1, 2)), **options)
    return HumanAgreement(same, _kappa(tables, **options), len(several), pairs)


def cohen_kappa(table: ArrayLike) -> Array:
    """Cohen's kappa of tables of counts or weights, [..., 2, 2]; nan where chance agrees always.

    >>> print(round(float(cohen_kappa([[20, 5], [10, 15]])), 12))
    0.4
    """
    table = np.asarray(table, float)
    with np.errstate(invalid="ignore", divide="ignore"):
        shares = table / table.sum((-2, -1), keepdims=True)
        observed = shares.trace(axis1=-2, axis2=-1)
        chance = (shares.sum(-1) * shares.sum(-2)).sum(-1)
        return (observed - chance) / (1 - chance)


def _share(hits: Array, comparisons: Array, *, resamples: int, seed: int) -> Measured:
    """Hits / comparisons, both [prompts]."""
    per_prompt = comparisons.sum() / max(1, (comparisons > 0).sum())
    return ratio(hits, comparisons, per_prompt=per_prompt, resamples=resamples, seed=seed)


def _kappa(tables: Array, *, resamples: int, seed: int) -> Measured:
    """Cohen's kappa of the sum of the prompts' tables, [prompts, 2, 2].

    Half a pseudo-prompt in each cell: as much as the interval of the share of hits has.
    """
    value = cohen_kappa(tables.sum(0))
    if not np.isfinite(value):
        return UNKNOWN
    hits, totals = tables.trace(axis1=1, axis2=2), tables.sum((1, 2))
    size = pseudo_size(hits, totals, SHARE, totals.sum() / (totals > 0).sum())
    weights = prompt_weights(len(tables), resamples=resamples, seed=seed)
    pseudo = pseudo_weights([0.5] * 4, resamples=resamples, seed=seed)
    cells = weights @ tables.reshape(-1, 4) + size * pseudo
    return interval(value, cohen_kappa(cells.reshape(-1, 2, 2)))


def _require_equal_lengths(*columns: Sequence) -> None:
    lengths = [len(column) for column in columns]
    if len(set(lengths)) > 1:
        raise ValueError(f"every row needs one entry of each argument, got lengths {lengths}")
