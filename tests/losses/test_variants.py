"""Losses and weights without recorded values, against their formulas and limits."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from dpojax import losses
from dpojax.losses import NO_REFERENCE, HeadTail, Pair

numbers = st.floats(-50, 0, width=32)
pairs = st.builds(lambda a, b: Pair(jnp.float32(a), jnp.float32(b)), numbers, numbers)
betas = st.floats(0.01, 2)
flip = lambda pair: Pair(pair.rejected, pair.chosen)
close = lambda got, want: np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-5)


@given(pairs, pairs, betas)
def test_a_soft_label_is_the_expectation_over_hard_ones(policy, reference, beta):
    right = losses.dpo(policy, reference, beta=beta)
    wrong = losses.dpo(flip(policy), flip(reference), beta=beta)
    got = losses.dpo_soft(policy, reference, beta=beta, probability=0.7)
    close(got, 0.7 * right + 0.3 * wrong)


@given(pairs, pairs, betas, st.floats(0, 0.4))
def test_the_robust_loss_is_unbiased_under_flips(policy, reference, beta, flips):
    robust = lambda p, r: losses.robust(p, r, beta=beta, label_smoothing=flips)
    unflipped, flipped = robust(policy, reference), robust(flip(policy), flip(reference))
    want = losses.dpo(policy, reference, beta=beta)
    np.testing.assert_allclose(
        (1 - flips) * unflipped + flips * flipped, want, rtol=1e-3, atol=1e-3
    )


@given(st.floats(-4, 4), st.floats(0.05, 3))
def test_ties_follow_rao_and_kupper(margin, threshold):
    """P(i beats j) = p_i / (p_i + nu p_j), and what is left over is a tie."""
    strength, nu = np.exp(margin), np.exp(threshold)
    wins, loses = strength / (strength + nu), 1 / (1 + nu * strength)
    policy = Pair(jnp.float32(margin), jnp.float32(0))
    args = dict(beta=1.0, threshold=threshold)
    close(losses.dpo_ties(policy, NO_REFERENCE, tie=0, **args), -np.log(wins))
    close(losses.dpo_ties(policy, NO_REFERENCE, tie=1, **args), -np.log(1 - wins - loses))


def test_exo_is_least_where_the_policy_agrees_with_the_smoothed_label():
    policy = Pair(jnp.log(jnp.float32(0.9)), jnp.log(jnp.float32(0.1)))
    loss = lambda p: losses.exo(p, NO_REFERENCE, beta=1.0, label_smoothing=0.1)
    np.testing.assert_allclose(loss(policy), 0, atol=1e-6)
    np.testing.assert_allclose(jax.grad(loss)(policy), 0, atol=1e-6)


@pytest.mark.parametrize(("loss", "smoothing"), [("exo", 0.0), ("exo", 0.5), ("robust", 0.5)])
def test_impossible_smoothing_is_refused(loss, smoothing):
    with pytest.raises(ValueError, match=f"{loss}: label_smoothing must be in"):
        getattr(losses, loss)(NO_REFERENCE, NO_REFERENCE, beta=0.1, label_smoothing=smoothing)


@given(st.floats(1, 100))
def test_beyond_its_margin_the_hinge_is_flat(margin):
    policy = Pair(jnp.float32(margin), jnp.float32(0))
    loss = lambda p: losses.hinge(p, NO_REFERENCE, beta=1.0)
    assert loss(policy) == 0
    assert jax.tree.leaves(jax.grad(loss)(policy)) == [0, 0]


@given(pairs, betas)
def test_losses_at_the_reference_do_not_depend_on_the_pair(policy, beta):
    at = lambda name, **arguments: getattr(losses, name)(policy, policy, beta=beta, **arguments)
    np.testing.assert_allclose(at("nca"), 2 * np.log(2), rtol=1e-6)
    np.testing.assert_allclose(at("bco", delta=0.0), 2 * np.log(2), rtol=1e-6)
    np.testing.assert_allclose([at("hinge"), at("apo_zero"), at("apo_down")], 1, rtol=1e-6)
    np.testing.assert_allclose(at("sppo"), 1 / (2 * beta**2), rtol=1e-5)
    np.testing.assert_allclose(at("discopop", tau=0.05), (np.log(2) + 1) / 2, rtol=1e-6)
    np.testing.assert_allclose(at("dpo_norm", lengths=Pair(3, 9)), np.log(2), rtol=1e-6)


@given(pairs, pairs, betas)
def test_dpop_adds_to_dpo_only_where_the_chosen_response_lost(policy, reference, beta):
    lost = max(0.0, float(reference.chosen) - float(policy.chosen))
    lowered = Pair(policy.chosen - 3 * lost, policy.rejected)
    got = losses.dpop(policy, reference, beta=beta, penalty=3.0)
    close(got, losses.dpo(lowered, reference, beta=beta))


@given(pairs, pairs, betas, st.floats(-3, 3))
def test_an_offset_is_a_shift_of_the_margin(policy, reference, beta, offset):
    moved = Pair(policy.chosen - offset / beta, policy.rejected)
    got = losses.odpo(policy, reference, beta=beta, offset=offset)
    np.testing.assert_allclose(got, losses.dpo(moved, reference, beta=beta), rtol=1e-3, atol=1e-4)


def test_tdpo_takes_the_kl_difference_from_the_margin_and_can_hold_the_chosen_one_fixed():
    policy, kl = Pair(jnp.float32(-3), jnp.float32(-4)), Pair(jnp.float32(1), jnp.float32(3))
    loss = lambda kl, stop: losses.tdpo(
        policy, NO_REFERENCE, beta=0.5, kl=kl, alpha=0.25, stop_chosen=stop
    )
    want = np.log1p(np.exp(-0.5 * (1 - 0.25 * 2)))
    weight = 0.5 * 0.25 / (1 + np.exp(0.5 * (1 - 0.25 * 2)))
    for stop in (True, False):
        np.testing.assert_allclose(loss(kl, stop), want, rtol=1e-6)
        gradient = jax.grad(loss)(kl, stop)
        np.testing.assert_allclose(gradient, [0 if stop else -weight, weight], rtol=1e-5)


@pytest.mark.parametrize("form", ["sq", "bwd_kl", "fwd_kl"])
def test_every_rpo_is_zero_where_the_implicit_margin_is_the_reward_models(form):
    policy = Pair(jnp.float32(3), jnp.float32(1))
    scores = Pair(5.0, 1.0)
    loss = lambda p: losses.rpo(p, NO_REFERENCE, beta=1.0, scores=scores, scale=0.5, form=form)
    np.testing.assert_allclose(loss(policy), 0, atol=1e-6)
    np.testing.assert_allclose(jax.grad(loss)(policy), 0, atol=1e-6)
    assert loss(Pair(policy.chosen + 1, policy.rejected)) > 0.01


def test_unknown_forms_and_divergences_are_refused():
    with pytest.raises(ValueError, match="rpo: form must be"):
        losses.rpo(NO_REFERENCE, NO_REFERENCE, beta=1, scores=NO_REFERENCE, scale=1, form="kl")
    with pytest.raises(ValueError, match="kind must be one of"):
        losses.divergence_scores(NO_REFERENCE, NO_REFERENCE, "tv")
    for kind, alpha in (("alpha", None), ("js", 0.5)):
        with pytest.raises(ValueError, match="'alpha' takes alpha"):
            losses.divergence_scores(NO_REFERENCE, NO_REFERENCE, kind, alpha=alpha)


@given(st.floats(-5, 5))
def test_the_alpha_divergence_meets_both_kl_divergences(log_ratio):
    pair = Pair(jnp.float32(log_ratio), jnp.float32(0))
    score = lambda *args, **kwargs: losses.divergence_scores(pair, NO_REFERENCE, *args, **kwargs)
    close(score("alpha", alpha=0.0).chosen, 1 - np.exp(-log_ratio))
    close(score("forward_kl").chosen, 1 - np.exp(-log_ratio))
    close(score("alpha", alpha=1.0).chosen, log_ratio)
    close(score("reverse_kl").chosen, log_ratio)
    np.testing.assert_allclose(score("alpha", alpha=1.001).chosen, log_ratio, atol=0.02)


@given(pairs, betas)
def test_alphapo_without_bend_is_simpo(policy, beta):
    args = dict(beta=beta, gamma=0.3, lengths=Pair(3, 7))
    close(losses.alphapo(policy, alpha=0.0, **args), losses.simpo(policy, **args))


@given(st.floats(-30, -0.01))
def test_the_odds_of_orpo_are_those_of_the_mean_likelihood(mean):
    got = losses.orpo(
        Pair(jnp.float32(4 * mean), jnp.float32(-2)), beta=1.0, lengths=Pair(4, 2), nll=0.0
    )
    odds = lambda log_p: log_p - np.log(-np.expm1(log_p))
    want = np.log1p(np.exp(odds(-1.0) - odds(mean)))
    np.testing.assert_allclose(got, want, rtol=1e-3, atol=1e-6)


def test_slic_is_a_hinge_with_a_likelihood_term():
    loss = lambda gap: losses.slic(Pair(gap, jnp.float32(0)), margin=1.0, alpha=0.5, nll=3.0)
    np.testing.assert_allclose([loss(0.25), loss(5.0)], [0.75 + 1.5, 1.5], rtol=1e-6)


@given(pairs)
def test_bradley_terry_margins_and_centring(scores):
    close(losses.bradley_terry(scores), losses.dpo(scores, NO_REFERENCE, beta=1.0))
    moved = Pair(scores.chosen - 2, scores.rejected)
    close(losses.bradley_terry(scores, margin=2.0), losses.bradley_terry(moved))
    centred = losses.bradley_terry(scores, centring=0.1) - losses.bradley_terry(scores)
    total = float(scores.chosen) + float(scores.rejected)
    np.testing.assert_allclose(centred, 0.1 * total**2, rtol=1e-3, atol=1e-3)


def test_unlikelihood_pulls_both_ways():
    gradient = jax.grad(lambda p: losses.unlikelihood(p, alpha=0.25))(Pair(-1.0, -2.0))
    assert gradient == Pair(-1, 0.25)


def test_length_desensitising_weighs_the_tail_of_the_reference_only_on_demand():
    parts = HeadTail(Pair(jnp.float32(-4), jnp.float32(-5)), Pair(jnp.float32(-2), jnp.float32(0)))
    both = losses.ld_logprobs(parts, parts, alpha=0.5, weight_reference=True)
    one = losses.ld_logprobs(parts, parts, alpha=0.5, weight_reference=False)
    assert both == (Pair(-5, -5), Pair(-5, -5))
    assert one == (Pair(-5, -5), Pair(-6, -5))


def test_wpo_weighs_by_mean_likelihood_without_a_gradient():
    policy, lengths = Pair(jnp.float32(-2), jnp.float32(-6)), Pair(4, 3)
    weigh = lambda p, collision, clamp: losses.wpo_weights(
        p, lengths=lengths, log_collision=collision, clamp=clamp
    )
    np.testing.assert_allclose(weigh(policy, None, None), np.exp(-0.5 - 2), rtol=1e-6)
    collision = Pair(-8.0, -9.0)
    np.testing.assert_allclose(weigh(policy, collision, None), np.exp(1.5 + 1), rtol=1e-6)
    np.testing.assert_allclose(weigh(policy, collision, 1.0), 1, rtol=1e-6)
    assert jax.tree.leaves(jax.grad(weigh)(policy, None, None)) == [0, 0]


def test_a_mixture_wants_a_weight_for_each_loss():
    with pytest.raises(ValueError, match="2 losses and 1 weights"):
        losses.mixture([jnp.zeros(2), jnp.zeros(2)], [1.0])
