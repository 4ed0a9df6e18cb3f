"""Laws of the losses that see only the margin."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from dpojax import losses
from dpojax.losses import Pair

numbers = st.floats(-50, 0, width=32)
pairs = st.builds(lambda a, b: Pair(jnp.float32(a), jnp.float32(b)), numbers, numbers)


@given(pairs, st.floats(0.01, 5))
def test_at_the_reference_every_pair_costs_log_two(pair, beta):
    np.testing.assert_allclose(losses.dpo(pair, pair, beta=beta), np.log(2), rtol=1e-6)


@given(pairs, pairs, st.floats(0.01, 5))
def test_the_gradient_is_beta_times_the_probability_of_being_wrong(policy, reference, beta):
    """Rafailov et al. 2023, eq. 7: the weight on grad log pi(y_w) is beta sigmoid(r_l - r_w)."""
    gradient = jax.grad(lambda p: losses.dpo(p, reference, beta=beta))(policy)
    r_w = beta * (float(policy.chosen) - float(reference.chosen))
    r_l = beta * (float(policy.rejected) - float(reference.rejected))
    weight = beta / (1 + np.exp(r_w - r_l))
    np.testing.assert_allclose(gradient.chosen, -weight, rtol=1e-4, atol=1e-7)
    np.testing.assert_allclose(gradient.rejected, weight, rtol=1e-4, atol=1e-7)


@given(pairs, pairs, st.floats(-20, 20))
def test_only_the_margin_counts(policy, reference, shift):
    moved = jax.tree.map(lambda x: x + shift, reference)
    want = losses.dpo(policy, reference, beta=0.1)
    np.testing.assert_allclose(losses.dpo(policy, moved, beta=0.1), want, rtol=1e-4)


@given(pairs, pairs, st.floats(0, 0.49))
def test_label_smoothing_mixes_the_loss_with_that_of_the_flipped_pair(policy, reference, smoothing):
    flip = lambda pair: Pair(pair.rejected, pair.chosen)
    right = losses.dpo(policy, reference, beta=0.3)
    wrong = losses.dpo(flip(policy), flip(reference), beta=0.3)
    got = losses.dpo(policy, reference, beta=0.3, label_smoothing=smoothing)
    np.testing.assert_allclose(got, (1 - smoothing) * right + smoothing * wrong, rtol=1e-5)


def test_ipo_is_least_where_the_log_ratio_gap_is_one_over_two_beta():
    reference = Pair(jnp.float32(-3.0), jnp.float32(-4.0))
    policy = Pair(jnp.float32(-3.0 + 5.0), jnp.float32(-4.0))
    loss = lambda p: losses.ipo(p, reference, beta=0.1, length_norm="sum")
    assert loss(policy) == 0
    assert jax.tree.leaves(jax.grad(loss)(policy)) == [0, 0]


def test_ipo_says_which_length_norms_there_are():
    pair = Pair(jnp.zeros(1), jnp.zeros(1))
    with pytest.raises(ValueError, match="'sum' or 'mean'"):
        losses.ipo(pair, pair, beta=0.1, length_norm="tokens")
    with pytest.raises(ValueError, match="needs lengths"):
        losses.ipo(pair, pair, beta=0.1, length_norm="mean")
