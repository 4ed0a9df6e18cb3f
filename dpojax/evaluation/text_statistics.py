"""How long, how varied and how repetitive sampled responses are, from their tokens alone.

A response is a sequence of tokens, ids or words, without padding or end-of-sequence token: what
counts as a token changes every number here, so compare only what one tokeniser made.

>>> responses = [["a", "b", "a", "b"], ["c"]]
>>> print(distinct_n(responses, 1), repetition(responses[0], 2), lengths(responses).mean)
0.6 0.33333333333333337 2.5
"""

from __future__ import annotations

import math
from collections.abc import Hashable, Sequence
from typing import NamedTuple

import numpy as np

Response = Sequence[Hashable]


class Lengths(NamedTuple):
    """Of responses, in tokens; nan where there is no response."""

    mean: float
    deviation: float  # of a sample, n - 1; nan for a single response
    shortest: float
    median: float
    longest: float


def lengths(responses: Sequence[Response]) -> Lengths:
    """Statistics of the number of tokens of each response.

    >>> print(lengths([[1, 2], [3], [4, 5, 6]]))
    Lengths(mean=2.0, deviation=1.0, shortest=1.0, median=2.0, longest=3.0)
    """
    n = np.array([len(response) for response in responses], np.float64)
    if not n.size:
        return Lengths(*[math.nan] * 5)
    deviation = float(n.std(ddof=1)) if n.size > 1 else math.nan
    return Lengths(float(n.mean()), deviation, float(n.min()), float(np.median(n)), float(n.max()))


def distinct_n(responses: Sequence[Response], n: int) -> float:
    """Different n-grams in all responses together, over all their tokens: in [0, 1].

    Li et al. 2016, who divide by tokens for every n, where others divide by n-grams.
    It falls as there are more responses: compare equal numbers of them. Nan without tokens.

    Raises:
      ValueError: n < 1.

    >>> distinct_n([[1, 2, 1, 2], [1, 2]], 2)  # (1, 2) and (2, 1), of 6 tokens
    0.3333333333333333
    """
    _check(n, "distinct_n")
    total = sum(len(response) for response in responses)
    different = {gram for response in responses for gram in _ngrams(response, n)}
    return len(different) / total if total else math.nan


def repetition(response: Response, n: int = 4) -> float:
    """Share of a response's n-grams that are repeats, 1 - different / all: seq-rep-n, in [0, 1).

    Welleck et al. 2019. Nan for a response of fewer than n tokens.

    Raises:
      ValueError: n < 1.

    >>> repetition([7, 7, 7, 7, 7], n=4)
    0.5
    """
    _check(n, "repetition")
    grams = _ngrams(response, n)
    return 1 - len(set(grams)) / len(grams) if grams else math.nan


def mean_repetition(responses: Sequence[Response], n: int = 4) -> float:
    """Mean of `repetition` over the responses that have an n-gram, nan if none has.

    >>> mean_repetition([[7, 7, 7, 7, 7], [1, 2, 3, 4], [1]], n=4)
    0.25
    """
    shares = [repetition(response, n) for response in responses if len(response) >= n]
    return sum(shares) / len(shares) if shares else math.nan


def _ngrams(response: Response, n: int) -> list[tuple]:
    return [tuple(response[i : i + n]) for i in range(len(response) - n + 1)]


def _check(n: int, caller: str) -> None:
    if n < 1:
        raise ValueError(f"{caller}: n must be at least 1, got {n}")
