"""Length, diversity and repetition of sampled responses, computed from their tokens.

A response is a sequence of tokens (ids or words) without padding and end-of-sequence token. Every
number here depends on the tokenizer, so only compare numbers that one tokenizer made.

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
    """Lengths of responses in tokens; nan if there is no response."""

    mean: float
    deviation: float  # standard deviation with n - 1; nan for a single response
    shortest: float
    median: float
    longest: float


def lengths(responses: Sequence[Response]) -> Lengths:
    """Statistics of the numbers of tokens of responses.

    >>> print(lengths([[1, 2], [3], [4, 5, 6]]))
    Lengths(mean=2.0, deviation=1.0, shortest=1.0, median=2.0, longest=3.0)
    """
    n = np.array([len(response) for response in responses], np.float64)
    if not n.size:
        return Lengths(*[math.nan] * 5)
    deviation = float(n.std(ddof=1)) if n.size > 1 else math.nan
    return Lengths(float(n.mean()), deviation, float(n.min()), float(np.median(n)), float(n.max()))


def distinct_n(responses: Sequence[Response], n: int) -> float:
    """Distinct n-grams in all responses together, divided by all their tokens: in [0, 1].

    Li et al. 2016 divide by tokens for every n; others divide by n-grams. The value falls with the
    number of responses, so only compare equal numbers of them. It is nan without tokens.

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
    """seq-rep-n of Welleck et al. 2019: share of n-grams that are repeats, 1 - distinct / all.

    It is in [0, 1), and nan for a response of fewer than n tokens.

    Raises:
      ValueError: n < 1.

    >>> repetition([7, 7, 7, 7, 7], n=4)
    0.5
    """
    _check(n, "repetition")
    grams = _ngrams(response, n)
    return 1 - len(set(grams)) / len(grams) if grams else math.nan


def mean_repetition(responses: Sequence[Response], n: int = 4) -> float:
    """Mean of `repetition` over the responses with n tokens or more; nan if there is none.

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
