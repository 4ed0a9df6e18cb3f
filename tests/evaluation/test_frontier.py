"""Estimates of the frontier: against enumeration, closed forms, and themselves drawn many times."""

import doctest
import itertools
import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from dpojax.evaluation import frontier
from dpojax.evaluation.frontier import Points


@pytest.mark.parametrize("n", range(1, 8))
def test_best_of_n_is_the_mean_over_all_subsets(n):
    rewards = np.random.default_rng(n).integers(0, 4, (5, 7)) + 0.5
    each = [np.mean([max(subset) for subset in itertools.combinations(row, n)]) for row in rewards]
    got = frontier.best_of_n(rewards, n)
    np.testing.assert_allclose(got.value, np.mean(each), rtol=1e-12)
    np.testing.assert_allclose(
        got.error, np.std(each, ddof=1) / math.sqrt(5), rtol=1e-9, atol=1e-12
    )


def test_best_of_n_is_unbiased():
    """Over every sample of four that a prompt with three responses can have."""
    reference, reward = np.array([0.5, 0.3, 0.2]), np.array([0.0, 1.0, 3.0])
    draws = np.array(list(itertools.product(range(3), repeat=4)))
    estimates = [frontier.best_of_n(reward[draw][None], 2).value for draw in draws]
    below = np.cumsum(reference) ** 2
    expected = np.diff(below, prepend=0) @ reward
    np.testing.assert_allclose(reference[draws].prod(1) @ estimates, expected, rtol=1e-12)


def test_best_of_many_does_not_overflow():
    """The expected maximum of n of the numbers 1 to m is n (m + 1) / (n + 1)."""
    got = frontier.best_of_n(np.arange(1.0, 5001)[None], 2000).value
    np.testing.assert_allclose(got, 2000 * 5001 / 2001, rtol=1e-9)


def best_of_n_by_enumeration(reference, reward, n):
    """Its distribution over responses; ties go to one of the tied draws at random."""
    chosen = np.zeros(len(reference))
    for draws in itertools.product(range(len(reference)), repeat=n):
        best = [y for y in draws if reward[y] == max(reward[list(draws)])]
        np.add.at(chosen, best, reference[list(draws)].prod() / len(best))
    return chosen


@pytest.mark.parametrize("n", [1, 2, 3, 5])
@pytest.mark.parametrize(
    "reward", [[0.0, 1.0, 2.0, 3.0], [0.0, 1.0, 1.0, 0.0], [2.0, 0.0, 1.0, 2.0]]
)
def test_the_kl_of_best_of_n_is_that_of_its_distribution(n, reward):
    """With samples whose shares are the reference's probabilities exactly."""
    counts, reward = np.array([2, 4, 6, 8]), np.array(reward)
    chosen = best_of_n_by_enumeration(counts / 20, reward, n)
    expected = (chosen * np.log(chosen / (counts / 20))).sum()
    got = frontier.best_of_n_kl(np.repeat(reward, counts)[None], n).value
    np.testing.assert_allclose(got, expected, rtol=1e-10, atol=1e-12)
    assert got <= frontier.best_of_n_kl_bound(n) + 1e-12


def test_without_ties_the_kl_of_best_of_n_is_the_closed_form_for_every_n():
    rewards = np.random.default_rng(0).normal(size=(3, 64))
    for n in (1, 2, 7, 64):
        got = frontier.best_of_n_kl(rewards, n)
        np.testing.assert_allclose(got.value, math.log(n) - (n - 1) / n, rtol=1e-9, atol=1e-12)
        np.testing.assert_allclose(got.error, 0, atol=1e-12)


def test_the_closed_form_is_the_kl_of_the_largest_of_n_uniform_numbers():
    for n in (2, 8):
        draws = np.random.default_rng(n).random((200_000, n)).max(1)
        log_ratio = np.log(n) + (n - 1) * np.log(draws)
        error = log_ratio.std() / math.sqrt(len(draws))
        assert abs(log_ratio.mean() - frontier.best_of_n_kl_bound(n)) < 4 * error


small = st.integers(0, 5).map(float)


@given(st.lists(st.tuples(small, small), max_size=12))
def test_the_front_is_exactly_the_points_that_nothing_dominates(points):
    kl, reward = np.array(points).reshape(-1, 2).T
    index = frontier.pareto_front(kl, reward)
    better = lambda a, b: a[0] <= b[0] and a[1] >= b[1] and a != b
    expected = {p for p in points if not any(better(q, p) for q in points)}
    assert [points[i] for i in index] == sorted(expected)
    assert all(points.index(points[i]) == i for i in index)


def test_points_with_a_nan_are_not_on_the_front():
    assert frontier.pareto_front([0.0, np.nan, 1.0], [np.nan, 9.0, 0.5]).tolist() == [2]


def points(kl, reward, error):
    kl = np.array(kl)
    return Points(kl, np.array(reward), np.zeros(len(kl)), np.full(len(kl), error))


def test_the_shortfall_is_the_largest_gap_on_a_fine_grid():
    draw = np.random.default_rng(0)
    compared = 0
    for _ in range(50):
        fronts = []
        for size in (3, 5):
            kl = draw.uniform(0, 10) + np.sort(draw.uniform(0, 8, size))
            fronts.append(points(kl, np.sort(draw.uniform(0, 1, size)), 0.1))
        a, b = fronts
        got = frontier.front_below(a, b)
        grid = np.linspace(max(a.kl[0], b.kl[0]), min(a.kl[-1], b.kl[-1]), 20001)
        if grid[0] > grid[-1]:
            assert np.isnan(got).all()
            continue
        gap = np.interp(grid, b.kl, b.reward) - np.interp(grid, a.kl, a.reward)
        np.testing.assert_allclose(got.reward, gap.max(), atol=1e-3)
        np.testing.assert_allclose(got.sigmas, gap.max() / math.sqrt(0.02), atol=1e-2)
        compared += 1
    assert 20 < compared < 50


def test_a_front_that_lies_above_has_a_negative_shortfall():
    a, b = points([0.0, 4.0], [0.5, 0.9], 0.0), points([1.0, 5.0], [0.2, 0.9], 0.1)
    got = frontier.front_below(a, b)
    np.testing.assert_allclose([got.reward, got.reward_at], [0.725 - 0.9, 4.0])
    np.testing.assert_allclose(got.sigmas, -1.75)


def test_points_below_the_front_do_not_count_and_errors_of_kl_act_through_the_slope():
    a = points([0.0, 1.0, 2.0], [0.0, -5.0, 1.0], 0.0)._replace(kl_error=np.full(3, 0.2))
    got = frontier.front_below(a, points([0.0, 2.0], [0.1, 1.3], 0.0))
    np.testing.assert_allclose([got.reward, got.reward_at], [0.3, 2.0])
    np.testing.assert_allclose(got.sigmas, 0.3 / (0.5 * 0.2))


def test_samples_of_one_prompt_are_one_observation():
    """With equally many of each, the error is that of the prompts' means."""
    values = np.random.default_rng(0).normal(size=(30, 4)) + np.arange(30)[:, None]
    prompts = np.repeat([f"p{i}" for i in range(30)], 4)
    shuffled = np.random.default_rng(1).permutation(120)
    got = frontier.mean_over_prompts(values.ravel()[shuffled], prompts[shuffled])
    means = values.mean(1)
    np.testing.assert_allclose(got, [means.mean(), means.std(ddof=1) / math.sqrt(30)], rtol=1e-10)
    alone = frontier.mean_over_prompts(means)
    np.testing.assert_allclose(alone, got, rtol=1e-10)
    assert np.isnan(frontier.mean_over_prompts([1.0, 2.0], ["a", "a"]).error)


def test_errors_of_unequal_prompts_cover_the_mean():
    """Groups of 1 to 6 samples that share an offset; ignoring the groups would cover too little."""
    hits = plain = 0
    for seed in range(300):
        draw = np.random.default_rng(seed)
        prompts = np.repeat(np.arange(50), draw.integers(1, 7, 50))
        values = draw.normal(size=50)[prompts] + draw.normal(0, 0.5, len(prompts))
        got, naive = frontier.mean_over_prompts(values, prompts), frontier.mean_over_prompts(values)
        hits += abs(got.value) < 1.96 * got.error
        plain += abs(naive.value) < 1.96 * naive.error
    assert 0.91 * 300 <= hits <= 0.98 * 300
    assert plain < 0.85 * 300


def test_both_kl_estimates_are_unbiased_and_the_one_of_tokens_varies_less():
    """By all nine sequences of two tokens over three."""
    draw = np.random.default_rng(3)
    models = [(draw.dirichlet(np.ones(3)), draw.dirichlet(np.ones(3), 3)) for _ in range(2)]
    first, second = np.array(list(itertools.product(range(3), repeat=2))).T
    policy, reference = (np.log(a[first]) + np.log(b[first, second]) for a, b in models)
    (p1, p2), (q1, q2) = models
    token_kl = np.stack(
        [np.full(9, (p1 * np.log(p1 / q1)).sum()), (p2 * np.log(p2 / q2)).sum(1)[first]], axis=1
    )
    probability = np.exp(policy)
    exact = (probability * (policy - reference)).sum()
    np.testing.assert_allclose(probability @ token_kl.sum(1), exact, rtol=1e-12)
    sampled = draw.choice(9, 4000, p=probability)
    plain = frontier.sequence_kl(policy[sampled], reference[sampled])
    exact_tokens = frontier.sequence_kl_of_tokens(token_kl[sampled], np.ones((4000, 2)))
    for got in (plain, exact_tokens):
        assert abs(got.value - exact) < 3 * got.error
    assert exact_tokens.error < 0.7 * plain.error
    junk = np.pad(token_kl[sampled], ((0, 0), (0, 2)), constant_values=np.nan)
    mask = np.arange(4) < np.full((4000, 1), 2)
    assert frontier.sequence_kl_of_tokens(junk, mask) == exact_tokens


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: frontier.best_of_n([[1.0, 2.0]], 3), "from 1 to the 2 samples"),
        (lambda: frontier.best_of_n([[1.0, 2.0, np.nan]], 1), r"\[0, 2\] is not finite"),
        (lambda: frontier.best_of_n([1.0, 2.0], 1), r"\[prompts, samples\]"),
        (lambda: frontier.mean_over_prompts([]), "need values"),
        (lambda: frontier.mean_over_prompts([1.0], [1, 2]), "as many prompts"),
    ],
)
def test_bad_input_is_named(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_examples_in_the_docstrings_run():
    result = doctest.testmod(frontier)
    assert result.attempted > 10
    assert result.failed == 0
