"""Optimisers and schedules against torch and the authors' formula; shardings of the moments."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from ml_collections import ConfigDict

from dpojax import sharding
from dpojax.models.decoder import SHARDING_RULES
from dpojax.training.state import (
    abstract_state,
    make_optimizer,
    make_schedule,
    new_state,
    warmup_steps,
)

BASE = dict(b1=0.9, b2=0.999, eps=1e-8, rms_decay=0.99, weight_decay=0.0, clip_norm=0.0)


def config(**changes):
    return ConfigDict(BASE | changes)


def run_ours(optimizer, params, gradients, rate):
    opt_state = optimizer.init(params)
    for gradient in gradients:
        updates, opt_state = optimizer.update(gradient, opt_state, params)
        params = jax.tree.map(lambda p, u: p - rate * u, params, updates)
    return params


@pytest.mark.parametrize(
    ("ours", "theirs"),
    [
        (config(name="rmsprop"), lambda torch, p: torch.optim.RMSprop([p], lr=1e-2)),
        (
            config(name="adamw", weight_decay=0.1),
            lambda torch, p: torch.optim.AdamW([p], lr=1e-2, weight_decay=0.1),
        ),
        (
            config(name="adamw", clip_norm=0.5),
            lambda torch, p: torch.optim.AdamW([p], lr=1e-2, weight_decay=0.0),
        ),
    ],
    ids=["rmsprop", "adamw with decay", "adamw with clipping"],
)
def test_updates_equal_torch(ours, theirs):
    torch = pytest.importorskip("torch", reason="compares with torch")
    rng = np.random.default_rng(0)
    start, gradients = rng.normal(size=(3, 4)), rng.normal(size=(5, 3, 4))
    p = torch.nn.Parameter(torch.tensor(start, dtype=torch.float32))
    optimizer = theirs(torch, p)
    for gradient in gradients:
        p.grad = torch.tensor(gradient, dtype=torch.float32)
        if ours.clip_norm:
            torch.nn.utils.clip_grad_norm_([p], ours.clip_norm)
        optimizer.step()
    as_tree = lambda x: {"kernel": jnp.asarray(x, jnp.float32)}
    got = run_ours(make_optimizer(ours), as_tree(start), map(as_tree, gradients), 1e-2)
    np.testing.assert_allclose(got["kernel"], p.detach().numpy(), atol=1e-6)


def test_weight_decay_spares_norms_and_biases():
    kernel = {"kernel": jnp.ones(2), "bias": jnp.ones(2)}
    adapters = {"a": jnp.ones(2), "b": jnp.ones(2)}
    params = {"x": kernel, "norm": {"scale": jnp.ones(2)}, "y": adapters}
    optimizer = make_optimizer(config(name="adamw", weight_decay=0.5))
    updates, _ = optimizer.update(
        jax.tree.map(jnp.zeros_like, params), optimizer.init(params), params
    )
    for decayed in (updates["x"]["kernel"], *updates["y"].values()):
        assert decayed.tolist() == [0.5, 0.5]
    assert not np.any([updates["x"]["bias"], updates["norm"]["scale"]])


def test_an_unknown_optimiser_or_schedule_is_named():
    with pytest.raises(ValueError, match=r"adamw.*got 'sgd'"):
        make_optimizer(config(name="sgd"))
    with pytest.raises(ValueError, match="got 'sqrt'"):
        make_schedule("sqrt", 1, 10)


@pytest.mark.parametrize("schedule", ["constant", "linear", "cosine"])
def test_schedules_have_the_authors_warm_up_and_the_closed_form_afterwards(schedule):
    factor = make_schedule(schedule, 150, 1150)
    step = np.arange(1150)
    warm = np.minimum((step + 1) / 151, 1.0)  # emdpo trainers.py, LambdaLR
    after = np.clip((step - 150) / 1000, 0, 1)
    want = {
        "constant": warm,
        "linear": warm * (1 - after),
        "cosine": warm * 0.5 * (1 + np.cos(np.pi * after)),
    }[schedule]
    np.testing.assert_allclose(jax.vmap(factor)(jnp.arange(1150)), want, atol=1e-6)


def test_the_moments_are_sharded_as_their_parameters(model, params):
    mesh = sharding.make_mesh(1, 4, 2)
    optimizer = make_optimizer(config(name="adamw"))
    abstract = abstract_state(params, optimizer, mesh, SHARDING_RULES)
    placed = jax.device_put(
        jax.tree.map(np.array, params), jax.tree.map(lambda x: x.sharding, abstract.params)
    )
    state = new_state(placed, optimizer, abstract, seed=3)
    mu = optax.tree.get(state.opt_state, "mu")
    kernel = mu["blocks"]["mlp"]["up"]["kernel"]
    assert kernel.sharding == state.params["blocks"]["mlp"]["up"]["kernel"].sharding
    assert kernel.addressable_shards[0].data.size * 8 == kernel.size
    assert jax.random.wrap_key_data(state.rng) == jax.random.key(3)


@pytest.mark.parametrize(
    ("schedule", "lowest"), [("linear", 0.1), ("cosine", 0.25), ("wsd", 0.0), ("wsd", 0.2)]
)
def test_schedules_fall_to_the_lowest_rate_and_wsd_in_its_last_share_alone(schedule, lowest):
    """100 steps with a warm-up of 10; wsd falls along a line over the last 30."""
    factor = make_schedule(schedule, 10, 100, lowest=lowest, decay_share=0.3)
    step = np.arange(101)
    warm = np.minimum((step + 1) / 11, 1.0)
    begin = 70 if schedule == "wsd" else 10
    after = np.clip((step - begin) / (100 - begin), 0, 1)
    shape = 0.5 * (1 + np.cos(np.pi * after)) if schedule == "cosine" else 1 - after
    want = warm * (lowest + (1 - lowest) * shape)
    got = jax.vmap(factor)(jnp.arange(101))
    np.testing.assert_allclose(got, want, atol=1e-6)
    assert got[100] == pytest.approx(lowest, abs=1e-6)
    if schedule == "wsd":
        np.testing.assert_array_equal(got[10:71], 1.0)


@pytest.mark.parametrize(
    ("ratio", "steps", "want"),
    [(0.1, 30, 3), (0.1, 31, 4), (0.0, 50, 0), (1.0, 7, 7), (0.07, 1, 1)],
)
def test_a_warm_up_ratio_is_the_share_of_the_steps_rounded_up(ratio, steps, want):
    assert warmup_steps(ConfigDict(dict(warmup_steps=None, warmup_ratio=ratio)), steps) == want


@pytest.mark.parametrize("schedule", ["constant", "linear", "cosine", "wsd"])
def test_members_of_a_sweep_have_the_schedule_of_a_run_alone(schedule):
    """There the steps of warm-up and run are traced."""

    def factors(warmup, steps):
        factor = make_schedule(schedule, warmup, steps, lowest=0.1, decay_share=0.3)
        return jax.vmap(factor)(jnp.arange(50))

    for warmup, steps in ((0, 50), (7, 41), (60, 50)):
        traced = jax.jit(factors)(warmup, steps)
        np.testing.assert_allclose(traced, factors(warmup, steps), rtol=1e-6)
