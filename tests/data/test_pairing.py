"""Preferences between completions: brute force, frequencies, and what is left out."""

import doctest
import itertools
from collections import Counter

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import binomtest, chisquare

from dpojax.data import pairing, reviews
from dpojax.data.pairing import NEUTRAL_WORDS, ROUNDING, Labels, pairs_of, places, ranking_of
from dpojax.data.records import parse

BRADLEY_TERRY = Labels("bradley_terry", temperature=2.0)
# A text has one score, as under any reward.
SCORES = {"": 0.0, "  ": 3.0, "a": 1.0, "b": 1.0, "c": -2.5, "d": 1.0 + 1e-12, "e": 4.0}
TEXTS = st.lists(st.sampled_from(sorted(SCORES)), max_size=7)


def test_scores_are_tied_where_they_differ_by_rounding_or_less():
    differences = [0.0, ROUNDING, -ROUNDING, 1.01 * ROUNDING, 1.0]
    assert Labels().tied(differences).tolist() == [True, True, True, False, False]
    assert Labels(tie=0.0).tied(differences).tolist() == [True, False, False, False, False]
    assert not Labels("bradley_terry").tied(differences).any()


@pytest.mark.parametrize("tie", [0.0, ROUNDING, NEUTRAL_WORDS])
def test_pairs_rankings_and_places_agree_on_what_is_tied(tie):
    labels = Labels(tie=tie)
    for difference in (0.0, 0.5 * tie, tie, 2 * tie + 1e-12):
        tied = bool(labels.tied(difference))
        scores = [difference, 0.0]
        assert (places(scores, labels) == [0, 0]) == tied
        assert pairs_of("ab", scores, "all", labels, rng(0))[1]["ties"] == tied
        assert ranking_of("ab", scores, labels, rng(0))[2]["ties"] == tied


def test_a_file_states_ties_by_equal_numbers_alone():
    row = {"prompt": "p", "responses": ["a", "b", "c"], "scores": [1.0, 1.0 + 1e-12, 1.0]}
    record = parse(row, "f:1")
    assert record.responses == ("b", "a", "c")
    assert record.rank == (0, 1, 1)


def test_no_pair_of_the_embedded_task_is_tied():
    labels, pairs = Labels(tie=NEUTRAL_WORDS), reviews.preferences("train", 500, 0)
    prompts, chosen, rejected = zip(*[(p["prompt"], p["chosen"], p["rejected"]) for p in pairs])
    difference = reviews.score(prompts, chosen) - reviews.score(prompts, rejected)
    assert not labels.tied(difference).any()
    assert labels.first_wins(difference).all()


def rng(*key):
    return np.random.default_rng(key)


def scored(texts):
    return [SCORES[text] for text in texts]


@given(TEXTS)
def test_deterministic_pairs_are_all_those_that_differ_in_text_and_score(texts):
    s = scored(texts)
    pairs, left_out = pairs_of(texts, s, "all", Labels(), rng(0))
    expected, expected_left_out = set(), Counter(empty=sum(not text.strip() for text in texts))
    for i, j in itertools.permutations(range(len(texts)), 2):
        if not texts[i].strip() or not texts[j].strip():
            continue
        if texts[i] != texts[j] and s[i] - s[j] > 1e-9:
            expected.add((i, j))
        elif i < j and texts[i] == texts[j]:
            expected_left_out["identical"] += 1
        elif i < j and abs(s[i] - s[j]) <= 1e-9:
            expected_left_out["ties"] += 1
    assert len(pairs) == len(expected)
    assert set(pairs) == expected
    assert left_out == expected_left_out


@given(TEXTS)
def test_best_against_worst_is_one_pair_with_the_widest_gap(texts):
    s = scored(texts)
    every, _ = pairs_of(texts, s, "all", Labels(), rng(0))
    pairs, left_out = pairs_of(texts, s, "best_worst", Labels(), rng(0))
    assert len(pairs) == bool(every)
    if every:
        assert pairs[0] in every
        assert s[pairs[0][0]] - s[pairs[0][1]] == max(s[i] - s[j] for i, j in every)
    elif sum(bool(text.strip()) for text in texts) > 1:
        assert left_out["identical"] + left_out["ties"] == 1


@pytest.mark.parametrize("mode", ["all", "best_worst"])
def test_sampled_labels_have_the_frequencies_of_bradley_and_terry(mode):
    scores, trials = [0.5, 3.0, -1.0], 3000
    wins = Counter()
    for trial in range(trials):
        wins.update(pairs_of("abc", scores, mode, BRADLEY_TERRY, rng(1, trial))[0])
    pairs = [(1, 2)] if mode == "best_worst" else [(0, 1), (0, 2), (1, 2)]
    assert {tuple(sorted(pair)) for pair in wins} == set(pairs)
    for i, j in pairs:
        p = 1 / (1 + np.exp(-(scores[i] - scores[j]) / 2))
        assert wins[i, j] + wins[j, i] == trials
        assert binomtest(wins[i, j], trials, p).pvalue > 1e-3


def test_sampled_labels_of_different_pairs_are_independent():
    same = 0
    for trial in range(2000):
        pairs, _ = pairs_of("abc", [0.0, 0.0, 0.0], "all", BRADLEY_TERRY, rng(2, trial))
        same += ((0, 1) in pairs) == ((1, 2) in pairs)
    assert binomtest(same, 2000, 0.5).pvalue > 1e-3


def test_a_label_depends_on_its_own_pair_alone():
    for trial in range(50):
        whole, _ = pairs_of("abcd", [0.0] * 4, "all", BRADLEY_TERRY, rng(3, trial))
        pairs, left_out = pairs_of(
            ["a", " ", "c", "c"], [0.0] * 4, "all", BRADLEY_TERRY, rng(3, trial)
        )
        assert pairs == [pair for pair in whole if sorted(pair) in ([0, 2], [0, 3])]
        assert left_out == {"empty": 1, "identical": 1}


def test_huge_differences_do_not_overflow():
    labels = Labels("bradley_terry", temperature=1e-3)
    assert pairs_of("ab", [-1e9, 1e9], "all", labels, rng(4))[0] == [(1, 0)]


@given(TEXTS)
def test_a_ranking_holds_every_text_once_and_states_exactly_the_pairs(texts):
    s = scored(texts)
    order, ranks, left_out = ranking_of(texts, s, Labels(), rng(0))
    distinct = {text for text in texts if text.strip()}
    pairs, _ = pairs_of(sorted(distinct), scored(sorted(distinct)), "all", Labels(), rng(0))
    stated = {
        (texts[i], texts[j])
        for (i, a), (j, b) in itertools.permutations(zip(order, ranks), 2)
        if a < b
    }
    assert stated == {(sorted(distinct)[i], sorted(distinct)[j]) for i, j in pairs}
    if order:
        assert sorted(texts[i] for i in order) == sorted(distinct)
        assert ranks[0] == 1
        assert ranks == sorted(ranks)
    assert left_out["identical"] == sum(bool(text.strip()) for text in texts) - len(distinct)
    assert left_out["ties"] == (not order and len(distinct) > 1)


def test_sampled_rankings_have_the_frequencies_of_plackett_and_luce():
    scores, trials = np.array([0.5, 3.0, -1.0]), 6000
    counts = Counter(
        tuple(ranking_of("abc", scores, BRADLEY_TERRY, rng(5, trial))[0]) for trial in range(trials)
    )
    weight = np.exp(scores / 2)
    orders = list(itertools.permutations(range(3)))
    expected = [
        weight[i] / weight.sum() * weight[j] / (weight[j] + weight[k]) for i, j, k in orders
    ]
    assert chisquare([counts[o] for o in orders], trials * np.array(expected)).pvalue > 1e-3


def test_the_example_of_the_docstring_is_what_it_gives():
    result = doctest.testmod(pairing)
    assert result.attempted
    assert not result.failed
