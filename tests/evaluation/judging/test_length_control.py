"""The length-controlled win rate against a fit of scipy, and where it is not known."""

import numpy as np
import pytest
from scipy.optimize import minimize
from scipy.special import expit, log_expit

from dpojax.evaluation.judging.length_control import length_controlled
from dpojax.evaluation.judging.statistics import win_rate
from dpojax.evaluation.judging.verdicts import Choice, Judgement, Reply

FIRST, SECOND, TIE, UNPARSED = map(Reply, Choice)
JUDGEMENTS = {
    1.0: Judgement(FIRST, SECOND),
    0.75: Judgement(FIRST, TIE),
    0.5: Judgement(FIRST, FIRST),
    0.25: Judgement(TIE, FIRST),
    0.0: Judgement(SECOND, FIRST),
}
UNREAD = Judgement(UNPARSED, FIRST)


def scipy_fit(scores, gaps, weights):
    """The win rate at equal lengths by a general minimiser of the negative log-likelihood."""
    mean = np.average(gaps, weights=weights)
    lengths = np.tanh(gaps / np.sqrt(np.average((gaps - mean) ** 2, weights=weights)))

    def loss(parameters):
        logits = parameters[0] + parameters[1] * lengths
        return -np.sum(weights * (scores * log_expit(logits) + (1 - scores) * log_expit(-logits)))

    return expit(minimize(loss, np.zeros(2), tol=1e-12).x[0])


def test_the_value_is_that_of_another_optimiser_also_for_fractions():
    rng = np.random.default_rng(0)
    gaps = rng.normal(30, 60, 300)
    scores = np.round(4 * np.clip(rng.normal(expit(gaps / 60), 0.3), 0, 1)) / 4
    judgements = [JUDGEMENTS[score] for score in scores]
    measured = length_controlled(judgements, range(300), 500 + gaps, np.full(300, 500))
    np.testing.assert_allclose(measured.value, scipy_fit(scores, gaps, np.ones(300)), atol=1e-6)
    assert measured.low < measured.value < measured.high


def test_a_prompt_with_many_samples_counts_once():
    rng = np.random.default_rng(1)
    ids = np.repeat(np.arange(80), rng.integers(1, 5, 80))
    gaps = rng.normal(0, 10, len(ids))
    scores = (rng.random(len(ids)) < expit(0.5 + gaps / 10)).astype(float)
    measured = length_controlled([JUDGEMENTS[x] for x in scores], ids, gaps, np.zeros(len(ids)))
    weights = 1 / np.bincount(ids)[ids]
    np.testing.assert_allclose(measured.value, scipy_fit(scores, gaps, weights), atol=1e-6)


def test_where_lengths_do_not_matter_it_is_the_win_rate():
    """Each length difference has the same share of wins."""
    gaps = np.tile([-30.0, -10.0, 10.0, 30.0], 40)
    scores = np.repeat([1.0, 1.0, 1.0, 0.0], 40)
    judgements = [JUDGEMENTS[score] for score in scores]
    measured = length_controlled(judgements, range(160), gaps, np.zeros(160))
    np.testing.assert_allclose(measured.value, 0.75, atol=1e-9)
    rate = win_rate(judgements, range(160))
    np.testing.assert_allclose(measured[1:], rate[1:3], atol=0.01)


def test_swapping_the_sides_turns_it_round():
    rng = np.random.default_rng(2)
    a, b = rng.integers(10, 90, (2, 120))
    scores = (rng.random(120) < expit((a - b) / 30)).astype(float)
    forward = length_controlled([JUDGEMENTS[x] for x in scores], range(120), a, b)
    backward = length_controlled([JUDGEMENTS[1 - x] for x in scores], range(120), b, a)
    np.testing.assert_allclose(forward.value, 1 - backward.value, atol=1e-9)


def test_the_unit_of_length_plays_no_part():
    rng = np.random.default_rng(3)
    a, b = rng.integers(10, 90, (2, 60))
    judgements = [JUDGEMENTS[x] for x in (rng.random(60) < 0.6).astype(float)]
    one = length_controlled(judgements, range(60), a, b)
    np.testing.assert_allclose(length_controlled(judgements, range(60), 7.0 * a, 7.0 * b), one)


def test_comparisons_without_a_score_are_left_out():
    rng = np.random.default_rng(4)
    a, b = rng.integers(10, 90, (2, 60))
    judgements = [JUDGEMENTS[x] for x in (rng.random(60) < 0.6).astype(float)]
    more = length_controlled([*judgements, UNREAD], range(61), np.append(a, 5000), np.append(b, 0))
    np.testing.assert_allclose(more, length_controlled(judgements, range(60), a, b))


@pytest.mark.parametrize(
    ("gaps", "scores"),
    [
        pytest.param([-2, -1, 1, 2] * 10, [0, 0, 1, 1] * 10, id="the longer always wins"),
        pytest.param([-2, -1, 1, 2] * 10, [1, 1, 0, 0] * 10, id="the shorter always wins"),
        pytest.param([-2, 1, 1, 2] * 10, [0, 0, 1, 1] * 10, id="only at one length both"),
        pytest.param([-2, 1, 1, 2] * 10, [0, 0.5, 1, 1] * 10, id="a fraction between them"),
        pytest.param([-2, -1, 1, 2] * 10, [1, 1, 1, 1] * 10, id="A always wins"),
        pytest.param([5, 5, 5, 5] * 10, [0, 1, 0, 1] * 10, id="all differences equal"),
        pytest.param([1, 2, 3, 4] * 10, [0, 1, 0, 1] * 10, id="A is always longer"),
        pytest.param([-1, -2, -3, -4] * 10, [0, 1, 0, 1] * 10, id="A is always shorter"),
        pytest.param([], [], id="nothing was judged"),
    ],
)
def test_it_is_not_known_where_lengths_separate_the_sides(gaps, scores):
    judgements = [JUDGEMENTS[float(score)] for score in scores]
    zeros = np.zeros(len(gaps))
    assert length_controlled(judgements, range(len(gaps)), gaps, zeros, resamples=50) is None


def test_it_is_known_as_soon_as_lengths_overlap():
    gaps, scores = [-2, -1, 1, 2] * 10, [0.0, 1.0, 0.0, 1.0] * 10
    judgements = [JUDGEMENTS[score] for score in scores]
    measured = length_controlled(judgements, range(40), gaps, np.zeros(40))
    np.testing.assert_allclose(measured.value, 0.5, atol=1e-9)


def test_arguments_of_different_lengths_are_refused():
    with pytest.raises(ValueError, match="1 judgements need as many ids and lengths"):
        length_controlled([UNREAD], ["a"], [1, 2], [3, 4])
