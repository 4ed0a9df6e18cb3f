"""Policy gradients: against plain loops, closed forms and sums over all sequences of a language."""

import doctest
import itertools
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from dpojax import rl

TOKENS, CLIP = 6, 0.2
LENGTHS = np.array([6, 3, 1, 0])
gae = jax.jit(rl.gae)


@pytest.fixture(autouse=True)
def x64():
    with jax.enable_x64(True):
        yield


@pytest.fixture
def rollout():
    """log-probs of three models, rewards and values, [4, TOKENS], with junk in the padding."""
    draw = np.random.default_rng(0)
    mask = np.arange(TOKENS) < LENGTHS[:, None]
    names = ("policy", "old", "reference", "rewards", "values", "advantages")
    arrays = {name: draw.normal(size=mask.shape) for name in names}
    return {name: np.where(mask, x, np.nan) for name, x in arrays.items()} | {"mask": mask}


def gae_by_loops(rewards, values, lengths, discount, gae_lambda):
    """The sum of equation 16, term by term."""
    out = np.zeros(rewards.shape)
    for row, length in enumerate(lengths):
        value = np.append(values[row, :length], 0)
        error = [rewards[row, t] + discount * value[t + 1] - value[t] for t in range(length)]
        for t in range(length):
            out[row, t] = sum(
                (discount * gae_lambda) ** (k - t) * error[k] for k in range(t, length)
            )
    return out


@pytest.mark.parametrize(
    ("discount", "gae_lambda"), [(1.0, 0.95), (0.9, 0.5), (0.99, 1.0), (1.0, 0.0)]
)
def test_advantages_are_the_double_sum_of_their_definition(rollout, discount, gae_lambda):
    rewards, values, mask = rollout["rewards"], rollout["values"], rollout["mask"]
    got = gae(rewards, values, mask, discount=discount, gae_lambda=gae_lambda)
    want = gae_by_loops(rewards, values, LENGTHS, discount, gae_lambda)
    np.testing.assert_allclose(got.advantages, want, atol=1e-12)
    np.testing.assert_allclose(got.returns, want + np.where(mask, values, 0), atol=1e-12)


def test_decay_one_is_monte_carlo_and_decay_zero_one_step(rollout):
    rewards, values = rollout["rewards"][:1], rollout["values"][:1]
    mask = np.ones(rewards.shape, bool)
    long = gae(rewards, values, mask, discount=1.0, gae_lambda=1.0)
    to_come = np.cumsum(rewards[:, ::-1], axis=1)[:, ::-1]
    np.testing.assert_allclose(long.advantages, to_come - values, atol=1e-12)
    np.testing.assert_allclose(long.returns, to_come, atol=1e-12)
    short = gae(rewards, values, mask, discount=0.9, gae_lambda=0.0)
    after = np.append(values[:, 1:], np.zeros((1, 1)), axis=1)
    np.testing.assert_allclose(short.returns, rewards + 0.9 * after, atol=1e-12)


def test_tokens_that_are_masked_inside_a_response_are_stepped_over(rollout):
    """As if the response had been written without them."""
    rewards, values = rollout["rewards"][:1], rollout["values"][:1]
    present = np.array([0, 2, 3, 5])
    mask = np.isin(np.arange(TOKENS), present)[None]
    got = gae(rewards, values, mask, discount=0.9, gae_lambda=0.8)
    want = gae(
        rewards[:, present], values[:, present], mask[:, present], discount=0.9, gae_lambda=0.8
    )
    np.testing.assert_allclose(got.advantages[:, present], want.advantages, atol=1e-12)
    assert (np.asarray(got.returns)[~mask] == 0).all()


@pytest.mark.slow
def test_advantages_of_a_sweep_are_those_of_its_runs(rollout):
    run = partial(rl.gae, rollout["rewards"], rollout["values"], rollout["mask"])
    discounts, lambdas = jnp.array([1.0, 0.9]), jnp.array([0.95, 0.5])
    swept = jax.jit(jax.vmap(lambda d, l: run(discount=d, gae_lambda=l)))(discounts, lambdas)
    for i in range(2):
        one = run(discount=float(discounts[i]), gae_lambda=float(lambdas[i]))
        np.testing.assert_allclose(swept.returns[i], one.returns, rtol=1e-12, atol=1e-12)


def test_whitened_tokens_are_standardised_over_the_batch(rollout):
    x, mask = rollout["rewards"] * 3 + 7, rollout["mask"]
    present = x[mask]
    want = (present - present.mean()) / np.sqrt(present.var(ddof=1) + 1e-8)
    got = np.asarray(rl.whiten(x, mask))
    np.testing.assert_allclose(got[mask], want, atol=1e-12)
    assert (got[~mask] == 0).all()
    unmoved = np.asarray(rl.whiten(x, mask, shift_mean=False))
    np.testing.assert_allclose(unmoved[mask], want + present.mean(), atol=1e-12)
    assert (unmoved[~mask] == 0).all()


@pytest.mark.parametrize("count", [0, 1])
def test_whitening_hardly_any_token_is_finite(count):
    got = rl.whiten(jnp.array([3.0, 4.0]), jnp.arange(2) < count)
    np.testing.assert_array_equal(got, 0)


def test_the_surrogate_is_the_lesser_of_two_products(rollout):
    mask = rollout["mask"]
    policy, old, advantages = (rollout[name][mask] for name in ("policy", "old", "advantages"))
    loss, gradient = jax.vmap(
        jax.value_and_grad(lambda p, o, a: rl.clipped_surrogate(p, o, a, clip=CLIP))
    )(policy, old, advantages)
    ratio = np.exp(policy - old)
    plain, held = ratio * advantages, np.clip(ratio, 1 - CLIP, 1 + CLIP) * advantages
    np.testing.assert_allclose(loss, -np.minimum(plain, held), rtol=1e-12)
    np.testing.assert_allclose(gradient, np.where(plain <= held, -plain, 0), rtol=1e-12)
    assert 0 < (plain > held).sum() < mask.sum()


@pytest.mark.parametrize(
    ("log_ratio", "advantage", "loss"),
    [(1000.0, 2.0, -2.4), (-1000.0, -2.0, 1.6), (-1000.0, 2.0, 0.0), (1000.0, 0.0, 0.0)],
)
def test_extreme_ratios_that_are_clipped_have_no_gradient(log_ratio, advantage, loss):
    function = lambda p: rl.clipped_surrogate(p, 0.0, jnp.float32(advantage), clip=CLIP)
    got, gradient = jax.value_and_grad(function)(jnp.float32(log_ratio))
    np.testing.assert_allclose(got, loss, rtol=1e-6)
    assert gradient == 0


def test_at_the_sampler_the_surrogate_is_the_policy_gradient(rollout):
    mask = rollout["mask"]
    policy, advantages = jnp.array(rollout["policy"][mask]), rollout["advantages"][mask]
    function = lambda p: rl.clipped_surrogate(p, policy, advantages, clip=CLIP).sum()
    np.testing.assert_allclose(jax.grad(function)(policy), -advantages, rtol=1e-12)


def test_the_value_loss_is_the_greater_of_two_squared_errors(rollout):
    mask = rollout["mask"]
    new, old, returns = (rollout[name][mask] for name in ("values", "policy", "rewards"))
    run = jax.value_and_grad(lambda v, o, r: rl.clipped_value_loss(v, o, r, clip=0.3))
    loss, gradient = jax.vmap(run)(new, old, returns)
    held = old + np.clip(new - old, -0.3, 0.3)
    plain, other = (new - returns) ** 2, (held - returns) ** 2
    np.testing.assert_allclose(loss, 0.5 * np.maximum(plain, other), rtol=1e-12)
    is_held = (np.abs(new - old) > 0.3) & (other > plain)
    np.testing.assert_allclose(gradient, np.where(is_held, 0, new - returns), rtol=1e-9)
    assert 0 < is_held.sum() < mask.sum()


class Language:
    """Two autoregressive models of three tokens over an alphabet of three; all 27 sequences."""

    def __init__(self):
        draw = np.random.default_rng(1)
        self.sequences = np.array(list(itertools.product(range(3), repeat=3)))
        models = [
            [draw.dirichlet(np.ones(3), 3**t).reshape([3] * (t + 1)) for t in range(3)]
            for _ in range(2)
        ]
        columns = [tuple(self.sequences[:, : t + 1].T) for t in range(3)]
        self.policy, self.reference = (
            np.log(np.stack([model[t][columns[t]] for t in range(3)], 1)) for model in models
        )
        self.probability = np.exp(self.policy.sum(1))
        self.kl = self.probability @ (self.policy - self.reference).sum(1)


@pytest.mark.parametrize("estimator", ["k1", "k3"])
def test_kl_estimates_are_unbiased(estimator):
    """Summed over the tokens of every sequence that there is, and of whole sequences."""
    language = Language()
    mask = np.ones(language.policy.shape)
    each = rl.sequence_kl(language.policy, language.reference, mask, estimator=estimator)
    np.testing.assert_allclose(language.probability.sum(), 1, rtol=1e-12)
    np.testing.assert_allclose(language.probability @ each, language.kl, rtol=1e-12)
    whole = (language.policy - language.reference).sum(1)
    each = rl.kl_estimate(whole, estimator=estimator)
    np.testing.assert_allclose(language.probability @ each, language.kl, rtol=1e-12)


def test_k2_and_k3_are_never_negative_and_keep_the_digits_of_small_ratios():
    size = np.logspace(-6, 1, 40)
    d = np.concatenate([-size, size]).astype(np.float32).astype(np.float64)
    np.testing.assert_allclose(rl.kl_estimate(d, estimator="k2"), d * d / 2, rtol=1e-12)
    series = d**2 / 2 - d**3 / 6 + d**4 / 24
    exact = np.where(np.abs(d) < 1e-3, series, np.exp(-d) - 1 + d)
    k3 = np.asarray(rl.kl_estimate(jnp.float32(d), estimator="k3"))
    assert (k3 >= 0).all()
    assert (np.abs(k3 - exact) <= 1e-6 * (np.abs(d) + exact)).all()


def test_the_expected_gradient_is_zero_for_k1_and_the_kls_for_k2():
    draw = np.random.default_rng(2)
    logits, reference = jnp.array(draw.normal(size=5)), np.log(draw.dirichlet(np.ones(5)))
    sampler = jax.nn.softmax(logits)

    def expected(estimator):
        each = lambda x: rl.kl_estimate(jax.nn.log_softmax(x) - reference, estimator=estimator)
        return jax.jit(jax.grad(lambda x: (sampler * each(x)).sum()))(logits)

    exact = lambda x: (jax.nn.softmax(x) * (jax.nn.log_softmax(x) - reference)).sum()
    np.testing.assert_allclose(expected("k1"), 0, atol=1e-12)
    np.testing.assert_allclose(
        expected("k2"), jax.jit(jax.grad(exact))(logits), rtol=1e-9, atol=1e-12
    )


def test_an_unknown_estimator_is_named():
    with pytest.raises(ValueError, match="'k4'"):
        rl.kl_estimate(0.1, estimator="k4")


def test_shaped_rewards_are_penalties_with_the_score_on_the_last_token(rollout):
    scores = np.array([1.0, -2.0, 3.0, 50.0])
    policy, reference, mask = rollout["policy"], rollout["reference"], rollout["mask"]
    got = rl.shape_rewards(scores, policy, reference, mask, kl_coefficient=0.3)
    want = np.zeros(mask.shape)
    for row, length in enumerate(LENGTHS):
        for t in range(length):
            want[row, t] = -0.3 * (policy[row, t] - reference[row, t])
            want[row, t] += scores[row] if t == length - 1 else 0
    np.testing.assert_allclose(got, want, rtol=1e-12)
    k3 = rl.shape_rewards(scores, policy, reference, mask, kl_coefficient=0.3, kl_estimator="k3")
    penalty = rl.sequence_kl(policy, reference, mask, estimator="k3")
    np.testing.assert_allclose(k3.sum(1)[:3], (scores - 0.3 * penalty)[:3], rtol=1e-12)


def test_a_response_that_was_cut_pays_and_one_that_stopped_does_not():
    got = rl.missing_eos_penalty(jnp.array([[0.5, 0.5]]), jnp.array([[True, False]]), 1.0)
    np.testing.assert_array_equal(got, [[0.5, -0.5]])


update_at_six_nats = jax.jit(partial(rl.update_kl, target=6.0, steps=64, horizon=10000))


@given(st.floats(0, 40), st.integers(1, 20))
def test_the_coefficient_grows_geometrically_at_a_constant_error(kl, updates):
    state = rl.AdaptiveKL(jnp.array(0.2))
    for _ in range(updates):
        state = update_at_six_nats(state, kl)
    error = min(max((kl - 6) / 6, -0.2), 0.2)
    want = 0.2 * (1 + error * 64 / 10000) ** updates
    np.testing.assert_allclose(state.coefficient, want, rtol=1e-12)


def test_an_infinite_horizon_fixes_the_coefficient():
    state = rl.AdaptiveKL(jnp.array([0.05, 0.2]))
    got = rl.update_kl(state, jnp.array([1.0, 90.0]), target=6.0, steps=64, horizon=jnp.inf)
    np.testing.assert_array_equal(got.coefficient, state.coefficient)


def test_the_diagnostics_are_sums_over_present_tokens(rollout):
    policy, old, advantages, mask = (rollout[x] for x in ("policy", "old", "advantages", "mask"))
    advantages[0, np.argmax(policy[0] - old[0])] = 0  # out of bounds, but with nothing to clip
    d = (policy - old)[mask]
    total, weight = rl.approx_kl(policy, old, mask)
    np.testing.assert_allclose([total, weight], [(np.exp(d) - 1 - d).sum(), len(d)], rtol=1e-12)
    total, _ = rl.approx_kl(policy, old, mask, estimator="k2")  # as TRL's approxkl
    np.testing.assert_allclose(total, (0.5 * d**2).sum(), rtol=1e-12)
    ratio, sign = np.exp(d), np.sign(advantages[mask])
    active = -sign * np.clip(ratio, 1 - CLIP, 1 + CLIP) > -sign * ratio  # as TRL's clipfrac
    total, weight = rl.clip_fraction(policy, old, advantages, mask, clip=CLIP)
    assert (total, weight) == (active.sum(), len(d))
    assert 0 < total < weight


@jax.jit
def everything(policy, old, reference, rewards, values, advantages, mask):
    """Every function that takes a mask."""
    shape = partial(rl.shape_rewards, jnp.ones(len(mask)), policy, reference, mask)
    return {
        "gae": gae(rewards, values, mask, discount=0.9, gae_lambda=0.8),
        "whiten": rl.whiten(values, mask),
        "shape": shape(kl_coefficient=0.1, kl_estimator="k3"),
        "sequence": rl.sequence_kl(policy, reference, mask, estimator="k3"),
        "approx": rl.approx_kl(policy, old, mask),
        "clip": rl.clip_fraction(policy, old, advantages, mask, clip=CLIP),
    }


@pytest.mark.parametrize("junk", [np.nan, 1e30, -1e30])
def test_padding_changes_nothing(rollout, junk):
    padded = {
        name: np.pad(x, ((0, 0), (0, 3)))
        if name == "mask"
        else np.pad(np.where(rollout["mask"], x, junk), ((0, 0), (0, 3)), constant_values=junk)
        for name, x in rollout.items()
    }
    cut = lambda x: x[:, :TOKENS] if x.ndim == 2 else x
    got = jax.tree.map(cut, everything(**padded))
    jax.tree.map(partial(np.testing.assert_allclose, atol=1e-12), got, everything(**rollout))


@pytest.mark.parametrize("junk", [np.nan, 1e30, -1e30])
def test_gradients_through_padding_are_zero(rollout, junk):
    mask = rollout.pop("mask")
    arrays = {name: jnp.where(mask, x, junk) for name, x in rollout.items()}

    total = lambda x: sum(leaf.sum() for leaf in jax.tree.leaves(everything(**x, mask=mask)))
    for name, gradient in jax.jit(jax.grad(total))(arrays).items():
        assert np.isfinite(gradient).all(), name
        assert (np.asarray(gradient)[~mask] == 0).all(), name


def test_the_diagnostics_of_micro_batches_add_up_to_those_of_the_batch(rollout):
    policy, old, advantages, mask = (rollout[x] for x in ("policy", "old", "advantages", "mask"))
    for run in (
        lambda rows: rl.approx_kl(policy[rows], old[rows], mask[rows]),
        lambda rows: rl.clip_fraction(
            policy[rows], old[rows], advantages[rows], mask[rows], clip=CLIP
        ),
    ):
        parts = [run(slice(0, 1)), run(slice(1, 4))]
        np.testing.assert_allclose(np.sum(parts, axis=0), run(slice(0, 4)), rtol=1e-12)


def test_examples_in_the_docstrings_run():
    with jax.enable_x64(False):
        result = doctest.testmod(rl)
    assert result.attempted > 10
    assert result.failed == 0
