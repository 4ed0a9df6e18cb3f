"""Statistics of sampled text: counts by hand, plain loops, and bounds."""

import doctest
import math
import statistics

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from dpojax.evaluation import text_statistics
from dpojax.evaluation.text_statistics import distinct_n, lengths, mean_repetition, repetition

responses = st.lists(st.lists(st.integers(0, 3), max_size=8), max_size=5)
SIZES = st.integers(1, 4)


def grams(response, n):
    """N-grams as text, from shifted copies."""
    return [" ".join(map(str, gram)) for gram in zip(*(response[i:] for i in range(n)))]


@given(responses, SIZES)
def test_distinct_n_counts_each_ngram_of_all_responses_once(texts, n):
    tokens = sum(map(len, texts))
    got = distinct_n(texts, n)
    if not tokens:
        assert math.isnan(got)
    else:
        assert got == len({gram for text in texts for gram in grams(text, n)}) / tokens


@given(st.lists(st.integers(0, 3), max_size=12), SIZES)
def test_repetition_is_the_share_of_ngrams_seen_before(text, n):
    seen, repeats = [], 0
    for gram in grams(text, n):
        repeats += gram in seen
        seen.append(gram)
    got = repetition(text, n)
    if not seen:
        assert math.isnan(got)
    else:
        np.testing.assert_allclose(got, repeats / len(seen), rtol=1e-12, atol=1e-12)


def test_ngrams_never_cross_from_one_response_to_the_next():
    assert distinct_n([["a"], ["b"], ["c"]], 2) == 0
    assert distinct_n([["a", "b"], ["c"]], 2) == 1 / 3


def test_repetition_of_a_corpus_is_the_mean_over_responses_that_are_long_enough():
    assert mean_repetition([[1, 1, 1], [1, 2, 3], [1]], n=2) == 0.25
    assert math.isnan(mean_repetition([[1], []], n=2))


@given(st.lists(st.integers(0, 9), min_size=2, max_size=20))
def test_length_statistics_are_those_of_the_counts(sizes):
    got = lengths([["token"] * size for size in sizes])
    expected = (
        statistics.mean(sizes),
        statistics.stdev(sizes),
        min(sizes),
        statistics.median(sizes),
        max(sizes),
    )
    np.testing.assert_allclose(got, expected, rtol=1e-9, atol=1e-12)


def test_what_has_no_value_is_nan():
    assert np.isnan(lengths([])).all()
    assert math.isnan(lengths([[1, 2]]).deviation)
    assert lengths([[1, 2]]).mean == 2


def test_an_ngram_of_no_token_is_refused():
    for call in (distinct_n, mean_repetition):
        with pytest.raises(ValueError, match="n must be at least 1, got 0"):
            call([[1, 2]], 0)


def test_examples_in_the_docstrings_run():
    result = doctest.testmod(text_statistics)
    assert result.attempted > 4
    assert result.failed == 0
