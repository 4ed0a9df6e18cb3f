"""Mistakes that broadcasting or rounding would hide are refused by name, or made impossible."""

import inspect

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from every_loss import EVERY

from dpojax import losses
from dpojax.losses import NO_REFERENCE, Pair, dpo, kto, per_token

THREE = Pair(jnp.array([-1.0, -2.0, -3.0]), jnp.array([-2.0, -2.0, -2.0]))
COLUMN = jax.tree.map(lambda x: x[:, None], THREE)


def labelled(**changed):
    arguments = {"policy": jnp.zeros(2), "reference": jnp.zeros(2)}
    arguments |= {"desirable": jnp.array([True, False]), "beta": 0.1, "kl": 0.0}
    return kto(**arguments | changed, desirable_weight=1.0, undesirable_weight=1.0)


WRONG = {
    "a column for a row": (
        lambda: dpo(THREE, COLUMN, beta=0.1),
        r"dpo: reference has shape \(3, 1\)",
    ),
    "halves that differ": (
        lambda: dpo(Pair(THREE.chosen, COLUMN.rejected), NO_REFERENCE, beta=0.1),
        r"dpo: policy has shape \(3, 1\)",
    ),
    "several betas": (
        lambda: dpo(THREE, THREE, beta=jnp.ones(2)),
        "dpo: beta has shape .*jax.vmap",
    ),
    "lengths of another shape": (lambda: per_token(THREE, COLUMN), "per_token: lengths has shape"),
    "a mask of another shape": (
        lambda: losses.aot(THREE, THREE, beta=0.1, mask=jnp.ones(2, bool)),
        "aot: mask has shape",
    ),
    "integers": (
        lambda: dpo(Pair(-1, -2), NO_REFERENCE, beta=0.1),
        "dpo: policy must hold log-prob",
    ),
    "a tuple": (lambda: dpo((-1.0, -2.0), NO_REFERENCE, beta=0.1), "dpo: policy must be a Pair"),
    "an array for a pair": (
        lambda: dpo(THREE, jnp.ones(3), beta=0.1),
        "dpo: reference must be a Pair",
    ),
    "a number as text": (
        lambda: dpo(THREE, THREE, beta="0.1"),
        "dpo: beta must be one array or number, got str",
    ),
    "a pair for an array": (
        lambda: losses.humanline_logprobs(THREE, THREE, low=-1.0, high=1.5),
        "humanline_logprobs: policy must be one array .* Pair; call it once for each half",
    ),
    "lists": (
        lambda: dpo(Pair([-1.0], [-2.0]), NO_REFERENCE, beta=0.1),
        "dpo: policy must hold arrays",
    ),
    "labels of 1 and -1": (
        lambda: labelled(desirable=jnp.array([1, -1])),
        "kto: desirable must be boolean, got int32.*labels > 0",
    ),
}


@pytest.mark.parametrize("mistake", WRONG)
def test_a_mistake_is_refused_by_name_and_also_under_jit(mistake):
    call, message = WRONG[mistake]
    with jax.numpy_rank_promotion("allow"):  # as it is for users
        for run in (call, jax.jit(call)):
            with pytest.raises((TypeError, ValueError), match=message):
                run()


def test_a_scalar_reference_and_a_beta_for_each_pair_are_no_mistakes():
    assert dpo(THREE, NO_REFERENCE, beta=jnp.array([0.1, 0.2, 0.3])).shape == (3,)


@pytest.mark.parametrize(
    "name", sorted(EVERY.keys() - {"plackett_luce_scores"})
)  # that of `ranked`
def test_bfloat16_log_probs_are_computed_as_float32_ones_of_the_same_value(name):
    draw = np.random.default_rng(0)
    rounded = lambda: Pair(*(jnp.bfloat16(draw.uniform(-30, -1, 5)) for _ in range(2)))
    policy, reference, lengths = rounded(), rounded(), Pair(jnp.arange(1, 6), jnp.arange(2, 7))
    in_float32 = lambda pair: jax.tree.map(jnp.float32, pair)
    got = EVERY[name](policy, reference, lengths, 0.3)
    want = EVERY[name](in_float32(policy), in_float32(reference), lengths, 0.3)
    assert got.dtype == jnp.float32
    np.testing.assert_array_equal(got, want)


def of_log_probs(name):
    function = getattr(losses, name)
    names = inspect.signature(function).parameters if inspect.isfunction(function) else ()
    return not {"policy", "log_ratio", "logprobs"}.isdisjoint(names)


@pytest.mark.parametrize("name", list(filter(of_log_probs, sorted(losses.__all__))))
def test_every_function_of_log_probs_is_checked(name):
    assert hasattr(getattr(losses, name), "__wrapped__")


def test_the_checks_add_nothing_to_a_program():
    bare = inspect.unwrap(dpo)
    programs = [jax.jit(f).lower(THREE, NO_REFERENCE, beta=0.1).as_text() for f in (dpo, bare)]
    assert len({text.split("(", 1)[1] for text in programs}) == 1


def test_a_completion_shows_the_losses_and_no_files():
    assert dir(losses) == sorted(losses.__all__)
