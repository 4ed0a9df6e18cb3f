"""Wilson's interval, against published numbers and its closed form."""

import math

import pytest

from dpojax.intervals import wilson_interval

Z95 = 1.959963984540054


@pytest.mark.parametrize(("count", "of"), [(0, 5), (5, 5), (1, 2), (3, 7), (8, 10), (620, 1000)])
def test_the_interval_is_the_closed_form_of_wilson(count, of):
    share, slack = count / of, Z95**2 / of
    half = Z95 * math.sqrt(share * (1 - share) / of + slack / (4 * of))
    low, high = (share + slack / 2 - half) / (1 + slack), (share + slack / 2 + half) / (1 + slack)
    assert wilson_interval(count, of) == pytest.approx((low, high), abs=1e-12)


def test_eight_of_ten_are_what_brown_cai_and_dasgupta_compute():
    """Brown, Cai and DasGupta 2001, equation 4."""
    low, high = wilson_interval(8, 10)
    assert (round(low, 3), round(high, 3)) == (0.490, 0.943)


def test_a_higher_level_gives_a_wider_interval():
    narrow, wide = wilson_interval(8, 10, level=0.9), wilson_interval(8, 10, level=0.99)
    assert wide.low < narrow.low < 0.8 < narrow.high < wide.high


def test_no_trial_has_no_interval():
    with pytest.raises(ValueError, match="at least 1 trial"):
        wilson_interval(0, 0)
