"""Laws of the losses, and the values and gradients of other people's code."""

import doctest
import json

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


@pytest.fixture(scope="module")
def golden(shared):
    return json.loads((shared / "reference" / "golden_losses.json").read_text())


@pytest.fixture
def x64():
    with jax.enable_x64(True):
        yield


def golden_case(golden, name):
    inputs = {k: jnp.asarray(v, jnp.float64) for k, v in golden["trl_dpo"][name]["inputs"].items()}
    policy, reference = Pair(inputs["pc"], inputs["pr"]), Pair(inputs["rc"], inputs["rr"])
    return policy, reference, Pair(inputs["lc"], inputs["lr"]), golden["trl_dpo"][name]["expected"]


@pytest.mark.parametrize("case", ["A", "B_identical_policy_and_ref", "C_extreme"])
@pytest.mark.parametrize("beta", [0.1, 0.5])
@pytest.mark.parametrize("name", ["sigmoid", "ipo"])
def test_values_and_gradients_are_those_of_trl(golden, x64, case, beta, name):
    policy, reference, lengths, expected = golden_case(golden, case)
    want = expected[f"{name} beta={beta}"]

    def loss(policy):
        if name == "sigmoid":
            return losses.dpo(policy, reference, beta=beta)
        return losses.ipo(policy, reference, beta=beta, length_norm="mean", lengths=lengths)

    gradient = jax.grad(lambda p: loss(p).mean())(policy)
    np.testing.assert_allclose(loss(policy).mean(), want["loss"], rtol=1e-9)
    per_pair = want["per_sequence_last_loss_type"]
    np.testing.assert_allclose(loss(policy), per_pair, rtol=1e-9)
    np.testing.assert_allclose(gradient.chosen, want["grad_policy_chosen_logp"], atol=1e-9)
    np.testing.assert_allclose(gradient.rejected, want["grad_policy_rejected_logp"], atol=1e-9)


@pytest.mark.parametrize(
    ("name", "loss"),
    [
        ("emdpo dpo beta=0.1", lambda p, r: losses.dpo(p, r, beta=0.1)),
        (
            "emdpo cdpo beta=0.1 ls=0.1",
            lambda p, r: losses.dpo(p, r, beta=0.1, label_smoothing=0.1),
        ),
        ("emdpo ipo beta=0.1", lambda p, r: losses.ipo(p, r, beta=0.1, length_norm="sum")),
    ],
)
def test_values_are_those_of_the_authors_code(golden, x64, name, loss):
    policy, reference, _, _ = golden_case(golden, "A")
    np.testing.assert_allclose(
        loss(policy, reference), golden["others"][name]["per_seq"], rtol=1e-6
    )


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


def test_gradients_stay_finite_at_extreme_log_probs():
    policy, reference = (
        Pair(jnp.float32(-1200), jnp.float32(0)),
        Pair(jnp.float32(0), jnp.float32(-1200)),
    )
    gradient = jax.grad(lambda p: losses.dpo(p, reference, beta=5.0))(policy)
    assert np.isfinite(jax.tree.leaves(gradient)).all()


def test_hyper_parameters_may_be_arrays():
    policy, reference = (
        Pair(jnp.float32(-1), jnp.float32(-2)),
        Pair(jnp.float32(-2), jnp.float32(-1)),
    )
    betas = jnp.array([0.1, 1.0])
    got = jax.vmap(lambda beta: losses.dpo(policy, reference, beta=beta))(betas)
    np.testing.assert_allclose(got, np.log1p(np.exp(-2 * np.asarray(betas))), rtol=1e-6)


def test_examples_in_the_docstrings_run():
    result = doctest.testmod(losses)
    assert result.attempted > 5
    assert result.failed == 0
