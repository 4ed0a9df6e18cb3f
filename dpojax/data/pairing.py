"""Preferences between the completions of one prompt, from a score of each. All in NumPy.

`Labels` is the only place that decides which of two scores wins, and when two scores are tied.

>>> rng = np.random.default_rng(0)
>>> pairs_of(["a", "b", "b"], [0.5, 2.0, 2.0], "all", Labels(), rng)
([(1, 0), (2, 0)], Counter({'identical': 1}))
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

KINDS = DETERMINISTIC, BRADLEY_TERRY = ("deterministic", "bradley_terry")

# The largest difference of two tied scores. A score may have any unit, so the default covers only
# float rounding. The exact log-odds of the embedded task need more: reviews that differ only in
# neutral words differ by the leak of the grammar (below 1e-3 nats), which is no preference.
ROUNDING = 1e-9
NEUTRAL_WORDS = 1e-3  # nats


class Labels(NamedTuple):
    """How scores become preferences.

    Attributes:
      kind: "deterministic": the higher score wins, unless the two are tied. "bradley_terry": the
        first of two wins with probability sigmoid((s1 - s2) / temperature); a ranking is drawn
        from the Plackett-Luce model with the same strengths (Rafailov et al. 2023, eq. 1 and 16).
        Drawn labels have no ties.
      temperature: of "bradley_terry", in units of the score.
      tie: largest difference of two tied scores under "deterministic".
    """

    kind: str = DETERMINISTIC
    temperature: float = 1.0
    tie: float = ROUNDING

    def tied(self, difference: ArrayLike) -> NDArray[np.bool_]:
        """Whether scores with these differences are tied, same shape."""
        drawn = self.kind == BRADLEY_TERRY
        return np.zeros(np.shape(difference), bool) if drawn else np.abs(difference) <= self.tie

    def first_wins(
        self, difference: ArrayLike, uniform: ArrayLike | None = None
    ) -> NDArray[np.bool_]:
        """Whether the first of two responses is preferred, same shape as `difference`.

        Args:
          difference: score of the first response minus score of the second. It is not tied.
          uniform: numbers drawn from [0, 1), same shape. Only "bradley_terry" needs them.
        """
        difference = np.asarray(difference)
        if self.kind == DETERMINISTIC:
            return difference > 0
        # sigmoid(x) = (1 + tanh(x / 2)) / 2, and tanh does not overflow.
        return np.asarray(uniform) < 0.5 * (1 + np.tanh(difference / self.temperature / 2))


def pairs_of(
    completions: Sequence[str],
    scores: Sequence[float],
    mode: str,
    labels: Labels,
    rng: np.random.Generator,
) -> tuple[list[tuple[int, int]], Counter]:
    """Make the pairs of one prompt.

    Blank completions are left out first (`empty`), then pairs of equal texts (`identical`) and
    ties (`ties`). A completion that came twice makes its pairs twice. The label of a pair does not
    depend on what is left out.

    Args:
      completions: K texts.
      scores: [K], finite.
      mode: "all" pairs, in the order of their indices, or "best_worst": one at most.
      labels: how scores become preferences.
      rng: K * K numbers are drawn from it, whatever is left out.

    Returns:
      (chosen, rejected) indices of each pair, and how many were left out for each cause.
    """
    usable, left_out = _usable(completions)
    scores_K = np.asarray(scores, np.float64)
    uniform_KxK = rng.random((len(scores_K), len(scores_K)))  # the pair i < j uses [i, j]
    candidates = [(i, j) for place, i in enumerate(usable) for j in usable[place + 1 :]]
    if mode == "best_worst":
        candidates = _widest(candidates, completions, scores_K)
    pairs = []
    for i, j in candidates:
        difference = scores_K[i] - scores_K[j]
        if completions[i] == completions[j]:
            left_out["identical"] += 1
        elif labels.tied(difference):
            left_out["ties"] += 1
        else:
            pairs.append((i, j) if labels.first_wins(difference, uniform_KxK[i, j]) else (j, i))
    return pairs, left_out


def _widest(
    pairs: Sequence[tuple[int, int]], completions: Sequence[str], scores_K: NDArray
) -> list[tuple[int, int]]:
    """The first of the pairs with the largest difference of scores, or none if there is no pair.

    Of pairs with equal differences, one whose texts differ comes first.
    """

    def order(pair: tuple[int, int]) -> tuple[float, bool]:
        i, j = pair
        return -abs(scores_K[i] - scores_K[j]), completions[i] == completions[j]

    return sorted(pairs, key=order)[:1]


def ranking_of(
    completions: Sequence[str],
    scores: Sequence[float],
    labels: Labels,
    rng: np.random.Generator,
) -> tuple[list[int], list[int], Counter]:
    """Rank the completions of one prompt.

    Blank completions (`empty`) and repeated ones (`identical`) are left out. There is no ranking
    if fewer than two are left, or if all are tied (`ties`).

    Returns:
      Indices of the completions, best first; their ranks, from 1 on and equal for ties; and how
      many were left out for each cause.
    """
    usable, left_out = _usable(completions)
    first_place = {completions[i]: i for i in reversed(usable)}  # of each distinct text
    left_out["identical"] += len(usable) - len(first_place)
    scores_K = np.asarray(scores, np.float64)
    gumbel_K = rng.gumbel(size=len(scores_K))
    strengths_K = scores_K
    if labels.kind == BRADLEY_TERRY:
        # The order of strengths with Gumbel noise is a draw from Plackett-Luce.
        strengths_K = scores_K / labels.temperature + gumbel_K
    order = sorted(sorted(first_place.values()), key=lambda i: -strengths_K[i])
    ranks = [place + 1 for place in places([scores_K[i] for i in order], labels)]
    if len(order) > 1 and ranks[-1] == 1:
        left_out["ties"] += 1
        order = []
    if len(order) < 2:
        return [], [], +left_out
    return order, ranks, +left_out


def places(scores: Sequence[float], labels: Labels) -> list[int]:
    """For each of the scores, best first, the number of better ones.

    A score that is tied with the one before it has the same place: [3, 2, 2, 1] gives [0, 1, 1, 3].
    """
    places = list(range(len(scores)))
    for i in range(1, len(scores)):
        if labels.tied(scores[i - 1] - scores[i]):
            places[i] = places[i - 1]
    return places


def _usable(completions: Sequence[str]) -> tuple[list[int], Counter]:
    """Indices of the completions that are not blank, and the count of the others."""
    usable = [i for i, text in enumerate(completions) if text.strip()]
    blank = len(completions) - len(usable)
    return usable, Counter({"empty": blank} if blank else {})
