"""What a verdict says of gradients, log-probs and losses that were made wrong by hand."""

import numpy as np
import pytest
from exact_measurement import EXACT, LN2, exact_measurement

from dpojax.certifying.compare import FLOOR, compare, sign_agreement
from dpojax.certifying.verdict import BOUNDS, judge


def verdict(is_exact=True, **changes):
    return judge(EXACT, EXACT._replace(**changes), is_exact=is_exact)


def with_gradient(gradient):
    return {"gradient": gradient, "gradient_norm": np.array(np.linalg.norm(gradient))}


def test_float32_passes_against_itself_and_all_measures_are_at_their_best():
    found = verdict()
    assert (found.passes, found.why) == (True, "")
    assert found.measures._asdict() == {
        "logprob_max": 0,
        "logprob_rms": 0,
        "sign_agreement": 1,
        "gradient_error": 0,
        "norm_ratio": 1,
        "margin_noise": 0,
        "curve_distance": 0,
        "learned": 1,
    }


def test_rounding_of_each_precision_passes_its_own_bounds_and_bfloat16_not_those_of_float32():
    rng = np.random.default_rng(1)

    def rounded(x, bits):
        return x * (1 + rng.uniform(-1, 1, x.shape) * 2.0**-bits)

    def in_bits(bits):
        fields = ("losses", "before", "margins", "gradient")
        return {name: rounded(getattr(EXACT, name), bits) for name in fields}

    assert verdict(**in_bits(24)).passes
    bfloat16 = in_bits(8) | {"losses": EXACT.losses}
    assert verdict(is_exact=False, **bfloat16).passes
    assert not verdict(is_exact=True, **bfloat16).passes
    four_bits = verdict(is_exact=False, **in_bits(2))  # as float8 with a mantissa of two bits
    assert not four_bits.passes
    assert "log-probs" in four_bits.why


@pytest.mark.parametrize("is_exact", [True, False])
def test_shards_of_a_gradient_that_lie_in_the_wrong_order_are_named_by_their_signs(is_exact):
    first, second = np.split(EXACT.gradient, 2)
    permuted = np.concatenate([np.roll(first, 125), second])
    found = verdict(is_exact, **with_gradient(permuted))
    assert not found.passes
    assert found.why.startswith("the gradient points elsewhere: sign agreement")
    # The signs of independent numbers agree in one of two, give or take a few of 500.
    assert found.measures.sign_agreement == pytest.approx(0.5, abs=0.1)
    assert found.measures.norm_ratio == pytest.approx(1)


@pytest.mark.parametrize("is_exact", [True, False])
@pytest.mark.parametrize("factor", [1 / 8, 8])
def test_a_sum_over_eight_devices_that_is_left_out_or_done_twice_is_named(is_exact, factor):
    found = verdict(is_exact, **with_gradient(factor * EXACT.gradient))
    assert not found.passes
    assert "sum over devices" in found.why
    assert found.measures.norm_ratio == pytest.approx(factor)


@pytest.mark.parametrize("is_exact", [True, False])
def test_a_loss_that_stays_while_that_of_float32_falls_is_stuck_at_ln_2(is_exact):
    stuck = {"losses": np.full(6, LN2), "first_batch": np.full(2, LN2), "margins": np.zeros(20)}
    found = verdict(is_exact, **stuck)
    assert not found.passes
    assert found.why.startswith("stuck at ln 2 = 0.6931: in 6 steps the loss of the first batch")
    assert found.measures.learned == 0


def test_margins_that_are_half_noise_fail_although_the_loss_is_right():
    noise = np.random.default_rng(2).normal(0, 0.3, 20)
    found = verdict(is_exact=False, margins=EXACT.margins + noise)
    assert not found.passes
    assert "noise" in found.why


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_what_is_not_finite_fails_with_the_step(bad):
    losses = EXACT.losses.copy()
    losses[2] = bad
    found = verdict(losses=losses)
    assert not found.passes
    assert found.why == f"the loss of step 3 is {bad}"
    assert not verdict(gradient_norm=np.array(bad)).passes


def test_where_float32_learns_nothing_only_the_first_step_is_judged():
    still = exact_measurement(
        losses=np.full(6, LN2), first_batch=np.full(2, LN2), margins=np.zeros(20)
    )
    found = judge(still, still, is_exact=True)
    assert found.passes
    assert "the first batch did not fall in 6 steps: only the first step" in found.why
    wrong = still._replace(before=still.before + 1)
    assert not judge(still, wrong, is_exact=True).passes


def test_signs_below_the_floor_do_not_count_and_others_count_by_their_size():
    """Of the parameter (4, 3, tiny) its root mean square is about 2.9, and tiny lies below."""
    tiny = 0.5 * FLOOR
    exact = EXACT._replace(gradient=np.array([4.0, -3.0, tiny]), sizes=np.array([3]))
    flipped = exact._replace(gradient=np.array([4.0, -3.0, -tiny]))
    assert sign_agreement(exact, flipped) == 1
    flipped = exact._replace(gradient=np.array([4.0, 3.0, tiny]))
    assert sign_agreement(exact, flipped) == pytest.approx(4 / 7)
    nothing = exact._replace(gradient=np.zeros(3))
    assert sign_agreement(exact, nothing) == 0


def test_a_parameter_counts_by_the_size_of_its_gradient_and_one_without_any_does_not():
    """Biases of keys have no gradient but rounding, and LoRA's a has none at all at first."""
    flipped = EXACT.gradient.copy()
    flipped[500:] *= -1
    sizes = np.abs(EXACT.gradient)
    agreement = sign_agreement(EXACT, EXACT._replace(gradient=flipped))
    assert agreement == pytest.approx(sizes[:500].sum() / sizes.sum(), abs=1e-4)
    zero = EXACT._replace(gradient=np.concatenate([EXACT.gradient[:500], np.zeros(500)]))
    assert sign_agreement(zero, zero) == 1


def test_every_bound_has_a_measure_and_a_reason_and_is_tighter_in_float32():
    for bound in BOUNDS:
        assert bound.measure in compare(EXACT, EXACT)._fields
        assert bound.reason
        assert (bound.exact > bound.rounded) == bound.at_least
