"""Single responses, running baselines, and the pair losses that are sums of two of them."""

import jax
import jax.numpy as jnp
import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from dpojax import losses
from dpojax.losses import Pair, RunningMean

numbers = st.floats(-50, 0, width=32)
pairs = st.builds(lambda a, b: Pair(jnp.float32(a), jnp.float32(b)), numbers, numbers)
EMPTY = RunningMean(jnp.zeros(()), jnp.zeros(()))


@given(pairs, pairs, st.floats(-2, 2))
def test_a_pair_of_bco_is_a_good_and_a_bad_response(policy, reference, delta):
    args = dict(beta=0.2, delta=delta)
    good = losses.bco_unpaired(policy.chosen, reference.chosen, True, **args)
    bad = losses.bco_unpaired(policy.rejected, reference.rejected, False, **args)
    want = losses.bco(policy, reference, **args)
    np.testing.assert_allclose(good + bad, want, rtol=1e-5)


@given(pairs, pairs)
def test_a_pair_of_apo_zero_is_a_good_and_a_bad_response(policy, reference):
    good = losses.apo_zero_unpaired(policy.chosen, reference.chosen, True, beta=0.2)
    bad = losses.apo_zero_unpaired(policy.rejected, reference.rejected, False, beta=0.2)
    want = losses.apo_zero(policy, reference, beta=0.2)
    np.testing.assert_allclose(good + bad, want, rtol=1e-5, atol=1e-7)


@given(numbers, numbers, st.floats(0, 20))
def test_good_and_bad_values_of_kto_add_up_to_one(policy, reference, kl):
    args = dict(beta=0.1, kl=kl, desirable_weight=1.0, undesirable_weight=1.0)
    good = losses.kto(policy, reference, True, **args)
    bad = losses.kto(policy, reference, False, **args)
    np.testing.assert_allclose(good + bad, 1, rtol=1e-5)


def test_the_weights_of_kto_belong_to_good_and_to_bad_responses():
    args = dict(beta=0.1, kl=0.0, desirable_weight=3.0, undesirable_weight=5.0)
    got = losses.kto(jnp.zeros(2), jnp.zeros(2), jnp.array([True, False]), **args)
    np.testing.assert_allclose(got, [1.5, 2.5], rtol=1e-6)


def test_no_gradient_flows_through_baselines():
    ratio = jnp.array([0.4, -0.2, 0.3])
    np.testing.assert_array_equal(jax.grad(losses.kto_baseline)(ratio), 0)
    args = dict(beta=0.1, desirable_weight=1.0, undesirable_weight=1.0)
    kto = lambda kl: losses.kto(jnp.float32(-1), jnp.float32(-2), True, kl=kl, **args)
    assert jax.grad(kto)(0.5) == 0
    pair = Pair(jnp.float32(-1), jnp.float32(-2))
    assert jax.grad(lambda d: losses.bco(pair, pair, beta=0.1, delta=d))(0.5) == 0
    reward = jax.grad(lambda r: losses.update_baseline(EMPTY, Pair(r, r)).mean)(1.0)
    assert reward == 0


def test_the_kl_estimate_is_a_weighted_mean_that_is_never_negative():
    ratio = jnp.array([1.0, jnp.nan, 4.0])
    np.testing.assert_allclose(losses.kto_baseline(ratio, jnp.array([1, 0, 2])), 3, rtol=1e-6)
    assert losses.kto_baseline(jnp.array([-1.0, 0.5])) == 0
    assert losses.kto_baseline(jnp.ones(2), jnp.zeros(2)) == 0


def test_the_running_baseline_is_the_mean_of_all_rewards_of_existing_pairs():
    draw = np.random.default_rng(0)
    state, seen = EMPTY, []
    for size in (3, 1, 5):
        chosen, rejected = draw.normal(3, 2, (2, size)).astype(np.float32)
        mask = draw.random(size) < 0.7
        seen += [*chosen[mask], *rejected[mask]]
        spoiled = Pair(*(jnp.where(mask, x, jnp.nan) for x in (chosen, rejected)))
        state = losses.update_baseline(state, spoiled, mask)
    assert state.count == len(seen)
    np.testing.assert_allclose(state.mean, np.mean(seen), rtol=1e-5)


def test_an_empty_batch_leaves_the_running_baseline_alone():
    state = RunningMean(jnp.float32(0.7), jnp.float32(4))
    rewards = Pair(jnp.ones(2), jnp.ones(2))
    assert losses.update_baseline(state, rewards, jnp.zeros(2, bool)) == state
