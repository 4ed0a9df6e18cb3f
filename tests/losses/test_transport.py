"""Losses that sort their batch."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from dpojax import losses
from dpojax.losses import Pair

batches = arrays.arrays(
    np.float32, (4, 5), elements=st.integers(-50, 0).map(lambda x: np.float32(x / 2)), unique=True
)
BOTH = [losses.aot, losses.aot_unpaired]


def split(values):
    policy = Pair(jnp.array(values[0]), jnp.array(values[1]))
    return policy, Pair(jnp.array(values[2]), jnp.array(values[3]))


def by_hand(first, second, beta):
    return np.log1p(np.exp(-beta * (np.sort(first) - np.sort(second)).astype(np.float64))).sum()


@given(batches)
def test_the_paired_form_compares_sorted_gaps_of_policy_and_reference(values):
    got = losses.aot(*split(values), beta=0.1)
    want = by_hand(values[0] - values[1], values[2] - values[3], 0.1)
    np.testing.assert_allclose(got.sum(), want, rtol=1e-5)


@given(batches)
def test_the_unpaired_form_compares_sorted_log_ratios(values):
    got = losses.aot_unpaired(*split(values), beta=0.1)
    want = by_hand(values[0] - values[2], values[1] - values[3], 0.1)
    np.testing.assert_allclose(got.sum(), want, rtol=1e-5)


@given(batches, st.permutations(range(5)))
def test_partners_of_the_unpaired_form_may_be_shuffled(values, order):
    want = losses.aot_unpaired(*split(values), beta=0.1)
    values[1], values[3] = values[1][list(order)], values[3][list(order)]
    got = losses.aot_unpaired(*split(values), beta=0.1)
    np.testing.assert_allclose(got, want, rtol=1e-5)


@partial(jax.jit, static_argnums=0)
def value_and_gradient(loss, policy, reference, mask):
    total = lambda policy: loss(policy, reference, beta=0.1, mask=mask, label_smoothing=0.1).sum()
    return jax.value_and_grad(total)(policy)


@pytest.mark.parametrize("loss", BOTH)
@given(batches, arrays.arrays(bool, 5).filter(np.any))
def test_masked_pairs_might_as_well_not_be_there(loss, values, mask):
    subset = split(values[:, mask])
    padded = split(np.where(mask, values, np.nan))
    value, gradient = value_and_gradient(loss, *padded, mask)
    want, wanted_gradient = value_and_gradient(loss, *subset, None)
    np.testing.assert_allclose(value, want, rtol=1e-5)
    for got, expected in zip(jax.device_get(gradient), wanted_gradient):
        np.testing.assert_allclose(got[mask], expected, rtol=1e-4, atol=1e-6)
        np.testing.assert_array_equal(got[~mask], 0)


@pytest.mark.parametrize("loss", BOTH)
def test_a_batch_without_pairs_costs_nothing(loss):
    policy, reference = split(np.full((4, 3), -2.0, np.float32))
    got = loss(policy, reference, beta=0.1, mask=jnp.zeros(3, bool))
    np.testing.assert_array_equal(got, 0)


@given(batches)
def test_a_pair_alone_is_dpo(values):
    policy, reference = split(values[:, :1])
    want = losses.dpo(policy, reference, beta=0.1)
    for loss in BOTH:
        np.testing.assert_allclose(loss(policy, reference, beta=0.1), want, rtol=1e-4)
