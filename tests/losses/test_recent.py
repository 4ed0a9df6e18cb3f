"""Laws of the preference objectives of 2024 to 2026, and their papers' formulas in plain numpy.

`expected` writes each formula down once more, in float64 and from the paper or the authors' code,
without our parts.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from dpojax import losses
from dpojax.losses import NO_REFERENCE, Pair

numbers = st.floats(-50, 0, width=32)
pairs = st.builds(lambda a, b: Pair(jnp.float32(a), jnp.float32(b)), numbers, numbers)
betas = st.floats(0.01, 2)
close = lambda got, want: np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-5)

POLICY = Pair(np.array([-12.0, -30.5, -8.25]), np.array([-14.0, -21.0, -8.5]))
REFERENCE = Pair(np.array([-12.5, -28.0, -9.0]), np.array([-13.0, -23.5, -8.0]))
LENGTHS = Pair(np.array([5, 11, 4]), np.array([4, 9, 6]))


def softplus(x):
    return np.logaddexp(0, x)


def expected(name):
    """The three pairs' losses."""
    (w, l), (n_w, n_l) = POLICY, LENGTHS
    d_w, d_l = w - REFERENCE.chosen, l - REFERENCE.rejected
    margin, absolute = 0.3 * (d_w - d_l), w / n_w - l / n_l
    return {
        "gpo logistic": np.log(1 + np.exp(-margin)),
        "gpo hinge": np.maximum(0, 1 - margin),
        "gpo squared": (margin - 1) ** 2,
        "gpo exponential": np.exp(-margin),
        "gpo truncated_quadratic": np.maximum(0, 1 - margin) ** 2,
        "chipo": np.log(
            1 + np.exp(-np.clip(0.3 * (np.exp(d_w) + d_w - np.exp(d_l) - d_l), -1.5, 1.5))
        ),
        "tpo_l": softplus(-(2 * (w / n_w - l / n_l) - 0.5)) + 0.25 * -w / n_w,
        "simper": -np.exp(w / n_w) + np.exp(l / n_l),
        "beta_dpo": softplus(-0.3 * (1 + 0.6 * (1.5 - 0.4)) * (d_w - d_l)),
        "alpha_dpo": softplus(
            -2 * (w / n_w - l / n_l - 0.25 - 0.05 * ((d_w / n_w - d_l / n_l) - 0.1) / 0.5)
        ),
        "epsilon_dpo": softplus(-0.3 / (1 + 0.25 * np.array([1, 0, -1])) * (d_w - d_l)),
        "mappo": softplus(-0.3 * (d_w - np.array([1.0, 0.25, 0.0]) * d_l)),
        # Only the second chosen response is less likely than under the reference, and good.
        "uni_dpo": 1
        / (1 + np.exp(-0.2 * np.array([2.0, 0.5, 7.0])))
        * (1 - 1 / (1 + np.exp(-(2 * absolute - 0.8)))) ** 1.5
        * softplus(-2 * (d_w / n_w - d_l / n_l))
        + 0.05 * np.array([0, 30.5 / 11, 0]),
        "lambda_dpo": np.log(np.exp(0.3 * d_w) + np.exp(0.3 * d_l)) - 0.3 * (0.8 * d_w + 0.2 * d_l),
        "npo": np.array([0.5 * 12 / 5, 2 / 0.3 * softplus(0.3 * d_w[1]), 0.5 * 8.25 / 4]),
        "simnpo": 2 / 0.3 * softplus(0.3 * w / n_w + 0.4),
        "astar_po": (0.3 * d_w - (np.array([1.0, 0.0, 1.0]) - 0.6)) ** 2,
    }[name]


def ours(name):
    name, *kind = name.split()
    loss, (policy, reference) = getattr(losses, name), (POLICY, REFERENCE)
    if name == "gpo":
        return loss(policy, reference, beta=0.3, convex=kind[0])
    if name == "chipo":
        return loss(policy, reference, beta=0.3, max_reward=0.75)
    if name == "tpo_l":
        nll = -policy.chosen / LENGTHS.chosen
        return loss(policy, beta=2.0, gamma=0.5, alpha=0.25, nll=nll, lengths=LENGTHS)
    if name == "beta_dpo":
        args = dict(beta=0.3, alpha=0.6, batch_gap=1.5, running_gap=0.4)
        return loss(policy, reference, **args)
    if name == "epsilon_dpo":
        return loss(policy, reference, beta=0.3, epsilon=0.25, steps=jnp.array([1, 0, -1]))
    if name == "alpha_dpo":
        args = dict(beta=2.0, gamma=2 * 0.25, alpha=2 * 0.05, gap_mean=0.1, gap_std=0.5)
        return loss(policy, reference, lengths=LENGTHS, **args)
    if name == "mappo":
        return loss(policy, reference, beta=0.3, score_gap=jnp.array([1.0, 0.25, 0.0]))
    if name == "uni_dpo":
        scores = Pair(jnp.array([8.0, 7.0, 9.0]), jnp.array([6.0, 6.5, 2.0]))
        args = dict(beta=2.0, scale=0.2, margin=0.8, gamma=1.5, alpha=0.05, good_score=7.0)
        return loss(policy, reference, lengths=LENGTHS, scores=scores, **args)
    if name == "lambda_dpo":
        targets = jnp.array([[0.8, 0.2]] * 3)
        return loss(np.stack(policy, -1), np.stack(reference, -1), targets, beta=0.3)
    if name == "npo":
        kept, nll = jnp.array([True, False, True]), -policy.chosen / LENGTHS.chosen
        args = dict(beta=0.3, retain_weight=0.5, nll=nll)
        return loss(policy.chosen, reference.chosen, kept, **args)
    if name == "simnpo":
        args = dict(beta=0.3, gamma=0.4, lengths=LENGTHS.chosen, retain_weight=0.5, nll=0.0)
        return loss(policy.chosen, jnp.zeros(3, bool), **args)
    if name == "astar_po":
        return loss(policy.chosen, reference.chosen, jnp.array([1.0, 0.0, 1.0]), 0.6, beta=0.3)
    return loss(policy, lengths=LENGTHS)


@pytest.mark.parametrize(
    "name",
    [
        "gpo logistic",
        "gpo hinge",
        "gpo squared",
        "gpo exponential",
        "gpo truncated_quadratic",
        "chipo",
        "tpo_l",
        "simper",
        "beta_dpo",
        "alpha_dpo",
        "epsilon_dpo",
        "mappo",
        "uni_dpo",
        "lambda_dpo",
        "npo",
        "simnpo",
        "astar_po",
    ],
)
def test_values_are_those_of_the_formula_in_float64(name):
    with jax.enable_x64(True):
        np.testing.assert_allclose(ours(name), expected(name), rtol=1e-12)


@given(pairs, pairs, st.floats(0.01, 2))
def test_gpo_holds_dpo_the_hinge_and_ipo(policy, reference, beta):
    gpo = lambda beta, convex: losses.gpo(policy, reference, beta=beta, convex=convex)
    close(gpo(beta, "logistic"), losses.dpo(policy, reference, beta=beta))
    close(gpo(beta, "hinge"), losses.hinge(policy, reference, beta=beta))
    ipo = losses.ipo(policy, reference, beta=beta, length_norm="sum")
    np.testing.assert_allclose(gpo(2 * beta, "squared"), 4 * beta**2 * ipo, rtol=1e-3, atol=1e-3)


@given(st.floats(-30, 30), st.floats(-30, 30), st.floats(0, 1))
@pytest.mark.parametrize("convex", ["exponential", "truncated_quadratic"])
def test_each_gpo_is_convex_and_falls_at_the_reference(convex, first, second, share):
    f = lambda margin: losses.gpo(
        Pair(jnp.float32(margin), jnp.float32(0)), NO_REFERENCE, beta=1.0, convex=convex
    )
    between = f(share * first + (1 - share) * second)
    chord = share * f(first) + (1 - share) * f(second)
    assert between <= chord * (1 + 1e-4) + 1e-5
    assert jax.grad(f)(0.0) < 0


def test_an_unknown_convex_function_is_refused():
    with pytest.raises(ValueError, match="gpo: convex must be one of"):
        losses.gpo(NO_REFERENCE, NO_REFERENCE, beta=1.0, convex="savage")


@given(st.floats(-6, 6))
def test_the_link_of_chipo_is_the_derivative_of_its_divergence(log_ratio):
    """Its f is (z - 1)^2 / 2 + z log z; scores are f' up to a constant (Wang et al. 2023)."""
    f = lambda z: (z - 1) ** 2 / 2 + z * np.log(z)
    z, step = np.exp(log_ratio), np.exp(log_ratio) * 1e-5
    slope = (f(z + step) - f(z - step)) / (2 * step)
    score = losses.divergence_scores(
        Pair(jnp.float32(log_ratio), jnp.float32(0)), NO_REFERENCE, "chi_squared"
    )
    np.testing.assert_allclose(score.chosen, slope, rtol=1e-4, atol=1e-4)


@given(pairs, pairs, betas)
def test_chipo_is_dpo_where_both_responses_have_become_unlikely(policy, reference, beta):
    """Its z vanishes against log z."""
    sunk = jax.tree.map(lambda x: x - 80, policy)
    got = losses.chipo(sunk, reference, beta=beta, max_reward=jnp.inf)
    close(got, losses.dpo(sunk, reference, beta=beta))


@given(pairs, pairs, st.floats(0.1, 3))
def test_chipo_never_costs_more_than_its_clip(policy, reference, max_reward):
    got = losses.chipo(policy, reference, beta=1.0, max_reward=max_reward)
    assert softplus(-2 * max_reward) - 1e-5 <= got <= softplus(2 * max_reward) + 1e-5


@given(pairs, betas)
def test_tpo_without_its_likelihood_is_simpo(policy, beta):
    args = dict(beta=beta, gamma=0.3, lengths=Pair(3, 7))
    close(losses.tpo_l(policy, alpha=0.0, nll=5.0, **args), losses.simpo(policy, **args))


@given(pairs, st.integers(1, 9), st.integers(1, 9))
def test_simper_lies_between_minus_one_and_one_and_changes_sign_with_the_pair(policy, n_w, n_l):
    loss = losses.simper(policy, lengths=Pair(n_w, n_l))
    assert -1 <= loss <= 1
    close(losses.simper(Pair(policy.rejected, policy.chosen), lengths=Pair(n_l, n_w)), -loss)


def forget(policy, reference, beta):
    """NPO of one response that is to be forgotten."""
    kept = jnp.asarray(False)
    return losses.npo(policy, reference, kept, beta=beta, retain_weight=1.0, nll=7.0)


@given(pairs, pairs, betas)
def test_npo_is_dpo_without_a_chosen_response(policy, reference, beta):
    got = forget(policy.rejected, reference.rejected, beta)
    alone = Pair(jnp.float32(0), policy.rejected), Pair(jnp.float32(0), reference.rejected)
    close(got * beta / 2, losses.dpo(*alone, beta=beta))


@given(numbers, numbers)
def test_npo_without_beta_is_gradient_ascent_and_stops_at_what_is_forgotten(policy, reference):
    slope = jax.grad(forget)
    np.testing.assert_allclose(
        slope(jnp.float32(policy), jnp.float32(reference), 1e-5), 1, atol=1e-3
    )
    assert slope(jnp.float32(reference - 100), jnp.float32(reference), 1.0) < 1e-6


@given(numbers, st.integers(1, 9), betas)
def test_simnpo_is_npo_of_means_against_a_reference_of_zero(policy, length, beta):
    args = dict(gamma=0.0, retain_weight=1.0, nll=0.0, lengths=length)
    got = losses.simnpo(jnp.float32(policy), jnp.asarray(False), beta=beta, **args)
    close(got, forget(jnp.float32(policy / length), jnp.float32(0), beta))


@given(st.lists(st.floats(-3, 3), min_size=1, max_size=6), st.floats(0.2, 5))
def test_the_optimal_policy_of_a_reward_has_no_astar_loss(rewards, beta):
    """It is reference * exp(r / beta) / Z, here with a uniform reference over all responses."""
    rewards = np.array(rewards)
    uniform = np.full(len(rewards), -np.log(len(rewards)))
    optimum = uniform + rewards / beta
    optimum -= np.log(np.exp(optimum).sum())
    values = losses.optimal_values(jnp.float32(rewards), beta=beta)
    loss = losses.astar_po(
        jnp.float32(optimum), jnp.float32(uniform), jnp.float32(rewards), values, beta=beta
    )
    np.testing.assert_allclose(loss, 0, atol=1e-8)


def test_optimal_values_lie_between_mean_and_maximum_and_see_no_absent_response():
    rewards, mask = jnp.array([1.0, 0.0, jnp.nan]), jnp.array([True, True, False])
    value = lambda beta: losses.optimal_values(rewards, mask, beta=beta)
    np.testing.assert_allclose(value(1e3), 0.5, atol=1e-3)
    np.testing.assert_allclose(value(1e-3), 1 + 1e-3 * np.log(0.5), rtol=1e-5)
    assert losses.optimal_values(rewards, jnp.zeros(3, bool), beta=1.0) == 0


@given(pairs, pairs, betas, st.floats(-5, 5))
def test_beta_dpo_is_dpo_without_alpha_and_in_an_average_batch(policy, reference, beta, gap):
    want = losses.dpo(policy, reference, beta=beta)
    args = dict(beta=beta, batch_gap=gap)
    close(losses.beta_dpo(policy, reference, alpha=0.0, running_gap=0.0, **args), want)
    close(losses.beta_dpo(policy, reference, alpha=0.6, running_gap=gap, **args), want)


@given(pairs, pairs, betas)
def test_the_beta_of_beta_dpo_stays_positive(policy, reference, beta):
    args = dict(alpha=1.0, batch_gap=-1e4, running_gap=0.0)
    got = losses.beta_dpo(policy, reference, beta=beta, **args)
    close(got, losses.dpo(policy, reference, beta=1e-3))


@given(pairs, pairs, betas, st.floats(0.01, 0.9))
def test_epsilon_dpo_without_steps_is_dpo_and_a_step_moves_beta(policy, reference, beta, epsilon):
    args = dict(beta=beta, epsilon=epsilon)
    loss = lambda steps: losses.epsilon_dpo(policy, reference, steps=steps, **args)
    close(loss(0), losses.dpo(policy, reference, beta=beta))
    close(loss(1), losses.dpo(policy, reference, beta=beta / (1 + epsilon)))
    close(loss(-1), losses.dpo(policy, reference, beta=beta / (1 - epsilon)))


@given(pairs, pairs, betas, st.floats(0, 1))
def test_the_gap_of_mappo_scales_the_pull_on_the_rejected_response(policy, reference, beta, gap):
    """Lan et al. 2025, eq. 10; with a gap of 1 it is DPO."""
    loss = lambda gap: lambda p: losses.mappo(p, reference, beta=beta, score_gap=gap)
    close(loss(1.0)(policy), losses.dpo(policy, reference, beta=beta))
    slope = jax.grad(loss(gap))(policy)
    np.testing.assert_allclose(slope.rejected, -gap * slope.chosen, rtol=1e-5, atol=1e-9)


@given(pairs, pairs, betas)
def test_uni_dpo_without_its_weights_is_half_of_dpo_norm(policy, reference, beta):
    args = dict(beta=beta, lengths=Pair(3, 7))
    alone = dict(scale=0.0, margin=0.8, gamma=0.0, alpha=0.0, good_score=7.0)
    got = losses.uni_dpo(policy, reference, scores=Pair(8.0, 2.0), **alone, **args)
    close(2 * got, losses.dpo_norm(policy, reference, **args))


@given(pairs, pairs, st.floats(0, 10))
def test_the_likelihood_of_uni_dpo_counts_for_good_responses_that_sank(policy, reference, score):
    def loss(alpha):
        args = dict(beta=2.0, lengths=Pair(4, 5), scores=Pair(score, 0.0), scale=0.1)
        return losses.uni_dpo(
            policy, reference, margin=0.8, gamma=1.0, alpha=alpha, good_score=7.0, **args
        )

    sunk = policy.chosen < reference.chosen and score >= 7
    close(loss(1.0) - loss(0.0), -policy.chosen / 4 if sunk else 0.0)


@given(st.lists(st.integers(-9, 9), min_size=3, max_size=3))
def test_epsilon_steps_follow_the_order_of_the_three_gaps(gaps):
    towards, policy, away = gaps
    of_gap = lambda gap: Pair(jnp.float32(gap - 20), jnp.float32(-20))
    steps = losses.epsilon_steps(of_gap(policy), away=of_gap(away), towards=of_gap(towards))
    assert steps == (towards < policy < away) - (towards > policy > away)


@given(pairs, pairs, betas)
def test_alpha_dpo_without_alpha_and_in_a_batch_of_equal_gaps_is_simpo(policy, reference, beta):
    args = dict(beta=beta, gamma=0.3, lengths=Pair(3, 7))
    loss = lambda alpha, std: losses.alpha_dpo(
        policy, reference, alpha=alpha, gap_mean=0.2, gap_std=std, **args
    )
    want = losses.simpo(policy, **args)
    close(loss(0.0, 1.0), want)
    close(loss(0.5, 0.0), want)


def test_no_gradient_flows_through_the_margin_of_alpha_dpo_or_the_beta_of_beta_dpo():
    policy, reference = Pair(jnp.float32(-3), jnp.float32(-4)), Pair(-3.5, -2.0)
    args = dict(beta=2.0, gamma=0.3, lengths=Pair(1, 1))
    slope = jax.grad(
        lambda p: losses.alpha_dpo(p, reference, alpha=0.1, gap_mean=0.0, gap_std=1.0, **args)
    )(policy)
    margin = 2.0 * (-3 + 4) - 0.3 - 0.1 * (0.5 + 2.0)
    np.testing.assert_allclose(slope.chosen, -2 / (1 + np.exp(margin)), rtol=1e-5)
    slope = jax.grad(
        lambda gap: losses.beta_dpo(
            policy, reference, beta=0.1, alpha=0.6, batch_gap=gap, running_gap=0.0
        )
    )(1.0)
    assert slope == 0


@given(st.lists(st.floats(-9, 9, width=32), min_size=2, max_size=9), st.integers(0, 3))
def test_gap_statistics_are_numpys_and_see_no_masked_gap(gaps, hidden):
    values = jnp.array([*gaps, *[jnp.nan] * hidden], jnp.float32)
    got = losses.gap_statistics(values, jnp.arange(len(values)) < len(gaps))
    np.testing.assert_allclose(got.mean, np.mean(gaps), rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(got.std, np.std(gaps, ddof=1), rtol=1e-3, atol=1e-4)


@pytest.mark.slow
@given(st.lists(st.tuples(numbers, numbers), min_size=1, max_size=9))
def test_humanline_in_range_is_the_wrapped_loss_and_beyond_it_a_token_is_still(tokens):
    policy, reference = jnp.float32(np.array(tokens).T)
    humanline = lambda p, low, high: losses.humanline_logprobs(p, reference, low=low, high=high)
    np.testing.assert_allclose(humanline(policy, -60.0, 60.0), policy, rtol=1e-5, atol=1e-5)
    ratio = np.asarray(policy - reference)
    got = humanline(policy, -1.0, 1.5)
    np.testing.assert_allclose(got - reference, np.clip(ratio, -1, 1.5), rtol=1e-4, atol=1e-5)
    slope = jax.grad(lambda p: humanline(p, -1.0, 1.5).sum())(policy)
    inside, beyond = (ratio > -0.99) & (ratio < 1.49), (ratio < -1.01) | (ratio > 1.51)
    assert (slope[inside] == 1).all()
    assert (slope[beyond] == 0).all()
