"""Preferences between the completions of one prompt, from a score of each. All in NumPy.

>>> rng = np.random.default_rng(0)
>>> pairs_of(["a", "b", "b"], [0.5, 2.0, 2.0], "all", Labels(), rng)
([(1, 0), (2, 0)], Counter({'identical': 1}))
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

KINDS = ("deterministic", "bradley_terry")


class Labels(NamedTuple):
    """How scores become preferences.

    "deterministic": the higher score wins; scores at most `tie` apart are a tie.
    "bradley_terry": the first of two wins with probability sigmoid((s1 - s2) / temperature), and
    whole rankings are drawn by Plackett and Luce's model with the same strengths (Rafailov et al.
    2023, eq. 1 and 16). There are no ties.
    """

    kind: str = "deterministic"
    temperature: float = 1.0
    tie: float = 1e-9


def pairs_of(
    completions: Sequence[str],
    scores: Sequence[float],
    mode: str,
    labels: Labels,
    rng: np.random.Generator,
) -> tuple[list[tuple[int, int]], Counter]:
    """(chosen, rejected) indices of one prompt's pairs, and counts of what was left out.

    Blank completions are left out first (`empty`), then pairs of equal texts (`identical`) and
    ties (`ties`). A completion that came twice makes its pairs twice. The label of a pair does not
    depend on what is left out.

    Args:
      completions: K texts. scores: [K], finite.
      mode: "all" pairs, in the order of their indices, or "best_worst": one at most.
    """
    usable, left_out = _usable(completions)
    s = np.asarray(scores, np.float64)
    uniform = rng.random((len(s), len(s)))  # that of the pair i < j at [i, j]
    pairs = [(i, j) for n, i in enumerate(usable) for j in usable[n + 1 :]]
    if mode == "best_worst":
        # The first of those farthest apart; where all scores are equal, texts that differ.
        equal = lambda i, j: completions[i] == completions[j]
        pairs = sorted(pairs, key=lambda p: (-abs(s[p[0]] - s[p[1]]), equal(*p)))[:1]
    found = []
    for i, j in pairs:
        if completions[i] == completions[j]:
            left_out["identical"] += 1
        elif labels.kind == "deterministic" and abs(s[i] - s[j]) <= labels.tie:
            left_out["ties"] += 1
        else:
            first_wins = _first_wins(s[i] - s[j], labels, uniform[i, j])
            found.append((i, j) if first_wins else (j, i))
    return found, left_out


def ranking_of(
    completions: Sequence[str],
    scores: Sequence[float],
    labels: Labels,
    rng: np.random.Generator,
) -> tuple[list[int], list[int], Counter]:
    """Indices of one prompt's completions, best first, their ranks, and counts of those left out.

    Ranks begin at 1, and are equal for ties: scores at most `labels.tie` below the one before.
    Blank completions (`empty`) and repeated ones (`identical`) are left out; where fewer than two
    are left, or all are tied (`ties`), there is no ranking.
    """
    usable, left_out = _usable(completions)
    first = {completions[i]: i for i in reversed(usable)}
    left_out["identical"] += len(usable) - len(first)
    s = np.asarray(scores, np.float64)
    noise = rng.gumbel(size=len(s))
    strict = labels.kind == "bradley_terry"
    # The order of strengths with Gumbel noise is a draw from Plackett-Luce.
    worth = s / labels.temperature + noise if strict else s
    order = sorted(sorted(first.values()), key=lambda i: -worth[i])
    ranks = [1] * len(order)
    for place in range(1, len(order)):
        tied = not strict and s[order[place - 1]] - s[order[place]] <= labels.tie
        ranks[place] = ranks[place - 1] if tied else place + 1
    if len(order) > 1 and ranks[-1] == 1:
        left_out["ties"] += 1
        order = []
    keep = order if len(order) > 1 else []
    return keep, ranks[: len(keep)], +left_out


def _usable(completions: Sequence[str]) -> tuple[list[int], Counter]:
    usable = [i for i, text in enumerate(completions) if text.strip()]
    blank = len(completions) - len(usable)
    return usable, Counter({"empty": blank} if blank else {})


def _first_wins(difference: float, labels: Labels, uniform: float) -> bool:
    if labels.kind == "deterministic":
        return bool(difference > 0)
    # By tanh, which does not overflow.
    return bool(uniform < 0.5 * (1 + np.tanh(difference / labels.temperature / 2)))
