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


def share_of(weights):
    return jnp.float32(weights / weights.sum())


weights = arrays.arrays(np.float32, 4, elements=st.floats(0.125, 4, width=32))


@given(rewards, weights, weights, st.floats(0, 1))
def test_the_loss_of_mixed_preferences_is_the_mixed_loss(reward, first, second, part):
    loss = lambda targets: losses.lambda_dpo(jnp.array(reward), jnp.zeros(4), targets, beta=0.5)
    first, second = share_of(first), share_of(second)
    mixed = part * loss(first) + (1 - part) * loss(second)
    np.testing.assert_allclose(loss(part * first + (1 - part) * second), mixed, rtol=1e-4)


@given(rewards, st.integers(0, 3))
def test_a_list_with_one_preferred_response_is_s_dpo(reward, best):
    got = losses.lambda_dpo(jnp.array(reward), jnp.zeros(4), jnp.eye(4)[best], beta=0.5)
    ordered = np.concatenate([reward[[best]], np.delete(reward, best)])
    want = losses.plackett_luce(jnp.array(ordered), jnp.zeros(4), beta=0.5, top=1)
    np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-5)


@given(logprobs, logprobs, logprobs, logprobs, st.floats(0, 1))
def test_a_list_of_two_is_dpo_with_a_soft_label(chosen, rejected, old_chosen, old_rejected, share):
    policy, reference = Pair(chosen, rejected), Pair(old_chosen, old_rejected)
    targets = jnp.array([share, 1 - share])
    got = losses.lambda_dpo(jnp.array(policy), jnp.array(reference), targets, beta=0.3)
    want = losses.dpo_soft(policy, reference, beta=0.3, probability=share)
    np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-5)


@given(weights, st.floats(0.1, 2))
def test_a_list_is_learnt_where_the_rewards_share_is_the_target(weight, beta):
    targets = share_of(weight)
    learnt = jnp.log(targets) / beta + 3.0
    loss = lambda policy: losses.lambda_dpo(policy, jnp.zeros(4), targets, beta=beta)
    value, slope = jax.value_and_grad(loss)(learnt)
    np.testing.assert_allclose(value, -(targets * jnp.log(targets)).sum(), rtol=1e-4)
    np.testing.assert_allclose(slope, 0, atol=1e-5)


list_and_gradient = jax.jit(jax.value_and_grad(losses.lambda_dpo))


@given(rewards, weights, arrays.arrays(bool, 4))
def test_responses_that_a_list_lacks_might_as_well_not_be_there(reward, weight, mask):
    spoiled = np.where(mask, reward, np.float32(np.nan))
    targets = np.where(mask, weight, 0) / max(weight[mask].sum(), 1e-3)
    arguments = dict(beta=0.5, mask=mask)
    value, gradient = list_and_gradient(spoiled, jnp.zeros(4), jnp.float32(targets), **arguments)
    np.testing.assert_array_equal(gradient[~mask], 0)
    if mask.sum() < 2:
        assert value == 0
        return
    there = reward[mask], jnp.zeros(int(mask.sum())), jnp.float32(targets[mask])
    np.testing.assert_allclose(value, losses.lambda_dpo(*there, beta=0.5), rtol=1e-4, atol=1e-6)
