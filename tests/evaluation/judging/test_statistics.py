"""Win rates, intervals and differences against closed forms and numbers worked out by hand."""

import math
import time

import numpy as np
import pytest
from scipy.stats import beta, binomtest

from dpojax.evaluation.judging.bootstrap import SIGNED, mean_over_prompts, ratio
from dpojax.evaluation.judging.statistics import difference, repeatability, win_rate
from dpojax.evaluation.judging.verdicts import Choice, Judgement, Outcome, Reply

FIRST, SECOND, TIE, UNPARSED = map(Reply, Choice)
WIN, LOSS = Judgement(FIRST, SECOND), Judgement(SECOND, FIRST)
ALWAYS_FIRST, ALWAYS_SECOND = Judgement(FIRST, FIRST), Judgement(SECOND, SECOND)
TIED, HALF_TIED = Judgement(TIE, TIE), Judgement(FIRST, TIE)
UNREAD, HALF_UNREAD = Judgement(UNPARSED, UNPARSED), Judgement(FIRST, UNPARSED)


@pytest.mark.parametrize("wins", [0, 1, 7, 25, 49, 50])
def test_the_interval_of_wins_and_losses_is_that_of_a_beta_distribution(wins):
    """Beta(k + 1, n - k + 1), widened to hold the value itself."""
    rate = win_rate([WIN] * wins + [LOSS] * (50 - wins), range(50), resamples=40_000)
    low, high = beta(wins + 1, 51 - wins).ppf([0.025, 0.975])
    assert rate.value == wins / 50
    np.testing.assert_allclose(rate.low, min(low, wins / 50), atol=2e-3)
    np.testing.assert_allclose(rate.high, max(high, wins / 50), atol=2e-3)


def test_of_many_prompts_the_interval_is_that_of_the_central_limit_theorem():
    rng = np.random.default_rng(0)
    values = rng.choice([0, 0.25, 0.5, 1], 1000)
    measured = mean_over_prompts(values, np.arange(1000), resamples=5_000)
    half = 1.959964 * values.std() / math.sqrt(1000)
    np.testing.assert_allclose(measured.low, values.mean() - half, atol=2e-3)
    np.testing.assert_allclose(measured.high, values.mean() + half, atol=2e-3)


def test_a_number_between_minus_one_and_one_has_half_a_pseudo_prompt_at_each_end():
    """Of -1 and 1 alone the interval is that of 2 Beta(k + 1/2, n - k + 1/2) - 1."""
    measured = ratio([1.0] * 9 + [-1.0] * 21, np.ones(30), SIGNED, resamples=40_000)
    low, high = 2 * beta(9.5, 21.5).ppf([0.025, 0.975]) - 1
    np.testing.assert_allclose(measured, [-0.4, low, high], atol=4e-3)


def test_every_prompt_counts_the_same():
    rate = win_rate([WIN, WIN, WIN, LOSS], ["many", "many", "many", "one"])
    assert rate.value == 0.5
    assert (rate.prompts, rate.comparisons) == (2, 4)


def test_ten_equal_samples_of_a_prompt_say_as_much_as_one():
    once = win_rate([WIN] * 30 + [LOSS] * 20, range(50))
    often = win_rate([WIN] * 300 + [LOSS] * 200, np.repeat(np.arange(50), 10).tolist())
    np.testing.assert_allclose(often[:3], once[:3])


def test_the_order_of_comparisons_does_not_change_the_width():
    """A resample gives weights to prompts by their order of appearance, so only draws differ."""
    rng = np.random.default_rng(0)
    order, ids = rng.permutation(200), np.arange(200)
    judgements = [WIN if i % 3 else LOSS for i in range(200)]
    one = win_rate(judgements, ids)
    other = win_rate([judgements[i] for i in order], ids[order])
    assert one.value == other.value
    np.testing.assert_allclose(one[1:3], other[1:3], atol=0.01)


def test_counts_and_what_is_left_out():
    judgements = [WIN, LOSS, ALWAYS_FIRST, TIED, HALF_TIED, UNREAD, HALF_UNREAD]
    rate = win_rate(judgements, ["a", "a", "b", "b", "c", "d", "a"])
    assert rate.counts == {
        Outcome.WIN: 1,
        Outcome.LOSS: 1,
        Outcome.TIE: 2,
        Outcome.INCONSISTENT: 1,
        Outcome.UNPARSED: 2,
    }
    assert rate.value == pytest.approx((0.5 + 0.5 + 0.75) / 3)
    assert (rate.prompts, rate.prompts_left_out, rate.comparisons) == (3, 1, 7)
    assert rate.share(Outcome.UNPARSED) == pytest.approx(2 / 7)


def test_position_bias_and_flip_rate_by_hand():
    """Favours of the first response: 0, 0, 1, 1, -1, 0, 1/2; the half that was read is left out."""
    judgements = [WIN, LOSS, ALWAYS_FIRST, ALWAYS_FIRST, ALWAYS_SECOND, TIED, HALF_TIED]
    rate = win_rate([*judgements, HALF_UNREAD], range(8))
    assert rate.position_bias.value == pytest.approx(1.5 / 7)
    assert rate.flip_rate.value == pytest.approx(3 / 7)


def test_that_a_is_better_is_no_position_bias():
    rate = win_rate([WIN] * 40, range(40))
    assert rate.position_bias.value == 0
    assert rate.position_bias.low < 0 < rate.position_bias.high
    assert rate.flip_rate.low == rate.flip_rate.value == 0 < rate.flip_rate.high


def test_a_symmetric_judge_has_no_position_bias():
    rate = win_rate([WIN, LOSS], ["a", "b"], is_symmetric=True)
    assert math.isnan(rate.position_bias.value)
    assert math.isnan(rate.flip_rate.high)


def test_identical_responses_of_which_nobody_asked_do_not_dilute_the_flip_rate():
    judgements = [ALWAYS_FIRST, WIN, TIED, TIED]
    rate = win_rate(judgements, range(4), asked=[True, True, False, False])
    assert rate.flip_rate.value == rate.position_bias.value == 0.5
    assert rate.value == pytest.approx((0.5 + 1 + 0.5 + 0.5) / 4)


def test_without_a_score_nothing_is_known_and_nothing_is_lost():
    for judgements in ([], [UNREAD, HALF_UNREAD]):
        rate = win_rate(judgements, range(len(judgements)))
        assert all(map(math.isnan, rate[:3]))
        assert rate.counts[Outcome.UNPARSED] == len(judgements)
        assert rate.prompts == 0


def test_a_difference_pairs_prompts_by_their_ids():
    """Prompts of one policy alone, or without a score, are left out: 1 - 0, 0.5 - 1 and 1 - 1."""
    first = difference(
        [WIN, WIN, ALWAYS_FIRST, WIN, WIN],
        ["x", "a", "b", "c", "d"],
        [LOSS, WIN, WIN, UNREAD, WIN],
        ["a", "b", "c", "d", "y"],
    )
    assert first.value == pytest.approx((1 - 0.5 + 0) / 3)
    assert first.prompts == 3


def test_pairing_makes_a_difference_more_certain_than_two_win_rates():
    """The policies differ on 8 of 200 prompts: their own intervals overlap."""
    ids = list(range(200))
    better = [WIN] * 110 + [LOSS] * 90
    worse = [LOSS] * 8 + [WIN] * 102 + [LOSS] * 90
    gap, rates = difference(better, ids, worse, ids), [win_rate(x, ids) for x in (better, worse)]
    assert gap.value == pytest.approx(8 / 200)
    assert gap.low > 0
    assert rates[0].low < rates[1].high
    assert gap.high - gap.low < 0.5 * (rates[0].high - rates[0].low)


def test_equal_policies_have_a_difference_of_zero_that_is_not_certain():
    gap = difference([WIN, LOSS] * 25, range(50), [WIN, LOSS] * 25, range(50))
    assert gap.value == 0
    assert -0.1 < gap.low < 0 < gap.high < 0.1


def test_repeatability_has_a_wilson_interval():
    pairs = [(FIRST, FIRST)] * 17 + [(FIRST, SECOND), (TIE, FIRST)] + [(UNPARSED, UNPARSED)]
    measured = repeatability(pairs)
    ends = binomtest(18, 20).proportion_ci(method="wilson")
    np.testing.assert_allclose(measured[:3], [0.9, ends.low, ends.high])
    assert measured.asked == 20
    assert repeatability([]) is None


def test_judgements_without_an_id_are_refused():
    with pytest.raises(ValueError, match="2 judgements need as many ids, got 1"):
        win_rate([WIN, LOSS], ["a"])


def test_2000_resamples_of_1000_prompts_take_less_than_a_second():
    judgements = [WIN, LOSS, ALWAYS_FIRST, TIED] * 250
    start = time.process_time()
    win_rate(judgements, range(1000), resamples=2000, seed=12345)
    assert time.process_time() - start < 1
