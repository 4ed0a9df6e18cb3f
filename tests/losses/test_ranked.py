"""Rankings, against sums over all permutations."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from dpojax import losses
from dpojax.losses import Pair

rewards = arrays.arrays(np.float32, 4, elements=st.floats(-5, 5, width=32))
logprobs = st.floats(-50, 0, width=32)


def probability(ranked):
    """A ranking's probability by choosing from what is left, in plain numpy."""
    strength = np.exp(np.asarray(ranked, np.float64))
    return np.prod([strength[k] / strength[k:].sum() for k in range(len(strength))])


@given(logprobs, logprobs, logprobs, logprobs, st.floats(0.01, 2))
def test_two_responses_are_dpo(chosen, rejected, old_chosen, old_rejected, beta):
    policy, reference = Pair(chosen, rejected), Pair(old_chosen, old_rejected)
    got = losses.plackett_luce(jnp.array(policy), jnp.array(reference), beta=beta)
    want = losses.dpo(policy, reference, beta=beta)
    np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-5)


@given(rewards)
def test_the_loss_is_the_log_probability_of_the_ranking(reward):
    got = losses.plackett_luce(jnp.array(reward), jnp.zeros(4), beta=1.0)
    np.testing.assert_allclose(got, -np.log(probability(reward)), rtol=1e-4, atol=1e-5)


@given(rewards, st.floats(0.01, 2))
def test_the_first_place_alone_is_the_softmax_loss_of_s_dpo(log_ratios, beta):
    """-log sigmoid(-log sum_l exp(beta (d_l - d_w))), Chen et al. 2024, over the rejected ones."""
    got = losses.plackett_luce(jnp.array(log_ratios), jnp.zeros(4), beta=beta, top=1)
    best, *others = np.float64(log_ratios)
    rivals = np.log(sum(np.exp(beta * (other - best)) for other in others))
    np.testing.assert_allclose(got, np.logaddexp(0, rivals), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("top", [1, 2, 3, 4])
def test_a_partial_ranking_sums_over_the_orders_of_the_rest(top):
    reward = np.array([0.3, -1.0, 2.0, 0.5])
    tails = itertools.permutations(reward[top:])
    want = sum(probability([*reward[:top], *tail]) for tail in tails)
    got = losses.plackett_luce_scores(jnp.array(reward), top=top)
    np.testing.assert_allclose(got, -np.log(want), rtol=1e-5)


value_and_gradient = jax.jit(jax.value_and_grad(losses.plackett_luce_scores))


@given(rewards, arrays.arrays(bool, 4))
def test_masked_responses_might_as_well_not_be_there(reward, mask):
    spoiled = np.where(mask, reward, np.float32(np.nan))
    value, gradient = jax.device_get(value_and_gradient(spoiled, mask=mask))
    np.testing.assert_array_equal(gradient[~mask], 0)
    if not mask.any():
        assert value == 0
        return
    want, wanted_gradient = value_and_gradient(reward[mask])
    np.testing.assert_allclose(value, want, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(gradient[mask], wanted_gradient, rtol=1e-4, atol=1e-5)


def test_places_count_present_responses_only():
    reward, mask = jnp.array([9.0, 1.0, 2.0, 3.0]), jnp.array([False, True, True, True])
    got = losses.plackett_luce_scores(reward, mask=mask, top=1)
    np.testing.assert_allclose(got, losses.plackett_luce_scores(reward[1:], top=1), rtol=1e-6)


@given(rewards, st.permutations(range(4)))
def test_ranks_say_what_the_order_says(reward, order):
    order = np.array(order)
    want = losses.plackett_luce_scores(jnp.array(reward))
    got = losses.plackett_luce_scores(jnp.array(reward[order]), ranks=jnp.array(order))
    np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-6)


def test_a_tie_of_two_costs_as_much_as_both_orders():
    reward = jnp.array([1.5, 0.0])
    got = losses.plackett_luce_scores(reward, ranks=jnp.array([0, 0]))
    np.testing.assert_allclose(got, np.log1p(np.exp(-1.5)) + np.log1p(np.exp(1.5)), rtol=1e-6)


def test_tied_responses_are_each_chosen_from_all_that_are_not_ahead():
    reward = np.array([2.0, 1.0, 0.0, -1.0])
    got = losses.plackett_luce_scores(jnp.array(reward), ranks=jnp.array([0, 1, 1, 2]))
    strength = np.exp(reward)
    chosen = [strength[0] / strength.sum(), *(strength[1:3] / strength[1:].sum())]
    np.testing.assert_allclose(got, -np.log(chosen).sum(), rtol=1e-6)


def test_at_the_reference_a_ranking_of_k_costs_log_k_factorial():
    logprobs = jnp.array([[-3.0, -50.0, -7.0, -1.0]])
    got = losses.plackett_luce(logprobs, logprobs, beta=0.3)
    np.testing.assert_allclose(got, [np.log(24)], rtol=1e-6)
