"""The derivations of Rafailov et al. 2023, with numbers, on finite sets of responses."""

import doctest
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.optimize

from dpojax import losses, theory
from dpojax.losses import Pair

PROMPTS, RESPONSES, BETA = 3, 4, 0.7


@pytest.fixture(autouse=True)
def x64():
    with jax.enable_x64(True):
        yield


@pytest.fixture
def problem():
    """log reference and reward, [PROMPTS, RESPONSES]."""
    draw = np.random.default_rng(0)
    reference = np.log(draw.dirichlet(np.ones(RESPONSES), PROMPTS))
    return jnp.array(reference), jnp.array(draw.normal(0, 2, (PROMPTS, RESPONSES)))


def expected_dpo(policy, reference, preferences):
    """The DPO loss in expectation over labels of all ordered pairs of different responses."""
    first, second = np.nonzero(~np.eye(RESPONSES, dtype=bool))
    pair = lambda values: Pair(values[:, first], values[:, second])
    loss = losses.dpo(pair(policy), pair(reference), beta=BETA)
    return (preferences[:, first, second] * loss).sum()


def minimise(loss):
    """Logits [PROMPTS, RESPONSES] where a function of them is least."""
    flat = jax.jit(jax.value_and_grad(lambda x: loss(x.reshape(PROMPTS, RESPONSES))))
    function = lambda x: tuple(map(np.asarray, flat(x)))
    start = np.zeros(PROMPTS * RESPONSES)
    solution = scipy.optimize.minimize(function, start, jac=True, options={"gtol": 1e-10})
    return jnp.array(solution.x.reshape(PROMPTS, RESPONSES))


def test_the_optimal_policy_is_the_reference_times_exp_reward_over_beta(problem):
    reference, reward = map(np.asarray, problem)
    weight = np.exp(reference) * np.exp(reward / BETA)
    want = weight / weight.sum(-1, keepdims=True)
    np.testing.assert_allclose(np.exp(theory.optimal_policy(*problem, beta=BETA)), want)
    np.testing.assert_allclose(
        np.exp(theory.log_partition(*problem, beta=BETA)), weight.sum(-1), rtol=1e-12
    )


def test_the_optimal_policy_maximises_reward_minus_kl(problem):
    """Against random policies, and against a numerical optimiser that knows nothing of it."""
    best = theory.optimal_policy(*problem, beta=BETA)
    value = theory.objective(best, *problem, beta=BETA)
    others = np.log(np.random.default_rng(1).dirichlet(np.ones(RESPONSES), (500, PROMPTS)))
    objective = lambda policy: theory.objective(policy, *problem, beta=BETA)
    values = jax.vmap(objective)(jnp.array(others))
    assert (np.asarray(values) < np.asarray(value)).all()
    logits = minimise(lambda x: -objective(jax.nn.log_softmax(x)).sum())
    np.testing.assert_allclose(jax.nn.softmax(logits), jnp.exp(best), atol=1e-6)
    np.testing.assert_allclose(value, BETA * theory.log_partition(*problem, beta=BETA), rtol=1e-12)


def test_dpo_on_the_preferences_of_a_reward_recovers_its_optimal_policy(problem):
    """Without ever seeing the reward: section 4, equations 4 to 7."""
    reference, reward = problem
    labels = theory.preferences(reward)
    logits = minimise(lambda x: expected_dpo(jax.nn.log_softmax(x), reference, labels))
    best = theory.optimal_policy(reference, reward, beta=BETA)
    np.testing.assert_allclose(jax.nn.softmax(logits), jnp.exp(best), atol=1e-6)


def test_rewards_that_differ_by_a_function_of_the_prompt_give_the_same_preferences(problem):
    """Lemma 1, for pairs and for whole rankings."""
    _, reward = problem
    moved = reward + jnp.array([[5.0], [-3.0], [0.1]])
    np.testing.assert_allclose(theory.preferences(moved), theory.preferences(reward), rtol=1e-12)
    ranking = lambda r: theory.plackett_luce(r[:, jnp.array([2, 0, 3, 1])])
    np.testing.assert_allclose(ranking(moved), ranking(reward), rtol=1e-10)


def test_rewards_that_differ_by_a_function_of_the_prompt_have_the_same_optimal_policy(problem):
    """Lemma 2; a shift of one response alone is not of that kind."""
    reference, reward = problem
    best = lambda r: theory.optimal_policy(reference, r, beta=BETA)
    moved = reward + jnp.array([[5.0], [-3.0], [0.1]])
    np.testing.assert_allclose(best(moved), best(reward), rtol=1e-9, atol=1e-9)
    assert np.abs(best(reward.at[:, 0].add(1.0)) - best(reward)).max() > 0.1


def test_each_class_of_rewards_has_exactly_one_implicit_reward(problem):
    """Theorem 1 and proposition 1: the projection exists, is in the class, and is unique."""
    reference, reward = problem
    projected = theory.project(reward, reference, beta=BETA)
    best = theory.optimal_policy(reference, reward, beta=BETA)
    np.testing.assert_allclose(
        projected, theory.implicit_reward(best, reference, beta=BETA), atol=1e-9
    )
    assert np.ptp(reward - projected, axis=-1).max() < 1e-9
    np.testing.assert_allclose(theory.log_partition(reference, projected, beta=BETA), 0, atol=1e-9)
    moved = theory.project(reward + jnp.array([[5.0], [-3.0], [0.1]]), reference, beta=BETA)
    np.testing.assert_allclose(moved, projected, atol=1e-9)
    again = theory.project(projected, reference, beta=BETA)
    np.testing.assert_allclose(again, projected, atol=1e-9)


def test_the_implicit_reward_with_its_partition_function_is_the_reward(problem):
    """Equation 5."""
    reference, reward = problem
    best = theory.optimal_policy(reference, reward, beta=BETA)
    log_z = theory.log_partition(reference, reward, beta=BETA)[:, None]
    got = theory.implicit_reward(best, reference, beta=BETA, log_partition=log_z)
    np.testing.assert_allclose(got, reward, atol=1e-9)


def test_the_gradient_of_dpo_is_weighted_by_how_wrong_the_implicit_rewards_are(problem):
    """beta sigmoid(r_l - r_w) (grad log pi(y_w) - grad log pi(y_l)), here in the logits."""
    reference, logits = problem[0][0], problem[1][0]
    pair = lambda values: Pair(values[1], values[2])
    loss = lambda x: losses.dpo(pair(jax.nn.log_softmax(x)), pair(reference), beta=BETA)
    reward = theory.implicit_reward(jax.nn.log_softmax(logits), reference, beta=BETA)
    weight = BETA * theory.bradley_terry(reward[2], reward[1])
    want = weight * (jnp.eye(RESPONSES)[2] - jnp.eye(RESPONSES)[1])
    np.testing.assert_allclose(jax.grad(loss)(logits), want, atol=1e-12)


def test_two_ranked_responses_are_a_bradley_terry_pair(problem):
    """Appendix A.3: equation 18 with K = 2 is equation 1."""
    reward = problem[1]
    want = theory.bradley_terry(reward[:, 0], reward[:, 1])
    np.testing.assert_allclose(theory.plackett_luce(reward[:, :2]), want, rtol=1e-12)
    np.testing.assert_allclose(want, 1 / (1 + np.exp(reward[:, 1] - reward[:, 0])), rtol=1e-12)


def test_the_probabilities_of_all_rankings_add_up_to_one(problem):
    orders = jnp.array(list(itertools.permutations(range(RESPONSES))))
    probability = theory.plackett_luce(problem[1][:, orders])
    np.testing.assert_allclose(probability.sum(-1), 1, rtol=1e-12)
    first = probability[:, orders[:, 0] == 2].sum(-1)
    np.testing.assert_allclose(first, jax.nn.softmax(problem[1])[:, 2], rtol=1e-12)


def test_ranking_losses_are_log_probabilities_of_implicit_rewards(problem):
    """Equation 20 is the logarithm of equation 18."""
    reference, policy = problem
    got = losses.plackett_luce(policy, reference, beta=BETA)
    reward = theory.implicit_reward(policy, reference, beta=BETA)
    np.testing.assert_allclose(got, -np.log(theory.plackett_luce(reward)), rtol=1e-10)


def test_kl_is_zero_at_the_reference_and_forgives_impossible_responses(problem):
    reference, other = problem[0], jax.nn.log_softmax(problem[1])
    np.testing.assert_allclose(theory.kl(reference, reference), 0, atol=1e-15)
    p, q = np.exp(other), np.exp(reference)
    np.testing.assert_allclose(theory.kl(other, reference), (p * np.log(p / q)).sum(-1), rtol=1e-10)
    sure = jnp.array([0.0, -jnp.inf])
    np.testing.assert_allclose(theory.kl(sure, jnp.log(jnp.array([0.25, 0.75]))), np.log(4))


def test_a_baseline_changes_the_variance_of_reinforce_and_not_its_mean(problem):
    """By summing over all samples; a common offset of the rewards is what a baseline removes."""
    policy, reward = problem[0], problem[1] + 10

    def moments(baseline):
        samples = theory.reinforce(policy, reward, baseline=baseline)
        weight = jnp.exp(policy)[:, :, None]
        mean = (weight * samples).sum(1)
        return mean, (weight * (samples - mean[:, None]) ** 2).sum((1, 2))

    value = theory.expected_reward(policy, reward)[:, None]
    soft_value = BETA * theory.log_partition(policy, reward, beta=BETA)[:, None]
    gradient = jax.grad(lambda x: theory.expected_reward(jax.nn.log_softmax(x), reward).sum())
    plain = moments(0.0)
    np.testing.assert_allclose(plain[0], gradient(policy), atol=1e-9)
    for baseline in (value, soft_value):
        mean, variance = moments(baseline)
        np.testing.assert_allclose(mean, plain[0], atol=1e-9)
        assert (variance < 0.2 * plain[1]).all()


def test_examples_in_the_docstrings_run():
    with jax.enable_x64(False):
        result = doctest.testmod(theory)
    assert result.attempted > 10
    assert result.failed == 0
