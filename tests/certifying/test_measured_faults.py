"""Faults that are put into a real stage's steps are named by the verdict on what they give."""

import dataclasses

import jax
import jax.numpy as jnp
import pytest

from dpojax.certifying.measure import measure
from dpojax.certifying.opening import open_variant, small
from dpojax.certifying.variants import baseline
from dpojax.certifying.verdict import judge
from dpojax.config.defaults import default_config

STEPS = 8


def tiny_config(**changes):
    config = default_config()
    config.stages = ("preference",)
    config.model.update(width=16, layers=1, heads=2, kv_heads=2, mlp_width=16, max_positions=128)
    config.tokens.max_length = 96
    config.max_buckets = 1
    config.preference.update(learning_rate=3e-3, warmup_steps=0)
    config.preference.lora.rank = 2
    config.update_from_flattened_dict(changes)
    return small(config, "preference")


@pytest.fixture(scope="module")
def opened():
    """Opens the stage on one device; the data are read once."""
    kept = {}

    def open_stage(**changes):
        config = tiny_config(**changes)
        exact = baseline(config, "preference")
        stage = open_variant(config, "preference", exact, jax.devices(), data=kept.get("data"))
        kept["data"] = stage.batches.data
        return stage

    return open_stage


@pytest.fixture(scope="module")
def exact(opened):
    return measure(opened(), STEPS)


def with_forward(stage, change):
    """The stage whose parameters go through `change` before each forward pass that is trained."""
    forward = stage.programs.forward

    def changed(params, rows, frozen, hyper):
        return forward(jax.tree.map(change, params), rows, frozen, hyper)

    return dataclasses.replace(stage, programs=stage.programs._replace(forward=changed))


@jax.custom_vjp
def shards_exchanged(x):
    """The identity, whose gradient comes back with the halves of its last axis exchanged."""
    return x


shards_exchanged.defvjp(lambda x: (x, None), lambda _, g: (jnp.roll(g, g.shape[-1] // 2, axis=-1),))


@pytest.mark.long
def test_the_same_steps_again_pass(opened, exact):
    found = judge(exact, measure(opened(), STEPS), is_exact=True)
    assert (found.passes, found.why) == (True, "")


@pytest.mark.long
def test_adapters_that_do_not_move_are_stuck_at_ln_2(opened, exact):
    stuck = opened(**{"preference.learning_rate": 0.0})
    found = judge(exact, measure(stuck, STEPS), is_exact=True)
    assert not found.passes
    assert found.why.startswith("stuck at ln 2 = 0.6931: in 8 steps")


@pytest.mark.slow
def test_gradients_on_the_wrong_shard_are_named_by_their_signs(opened, exact):
    found = judge(exact, measure(with_forward(opened(), shards_exchanged), STEPS), is_exact=False)
    assert not found.passes
    assert found.why.startswith("the gradient points elsewhere")


@pytest.mark.slow
def test_weights_of_two_bits_give_other_log_probs(opened, exact):
    """As float8 (e5m2) has them, in every pass."""
    stage = opened()
    init = stage.setup.model.init

    def rounded(key):
        params = init(key)
        return jax.tree.map(lambda x: x.astype(jnp.float8_e5m2).astype(x.dtype), params)

    model = stage.setup.model._replace(init=rounded)
    stage = dataclasses.replace(stage, setup=stage.setup._replace(model=model))
    found = judge(exact, measure(stage, STEPS), is_exact=True)
    assert not found.passes
    assert "log-probs" in found.why
