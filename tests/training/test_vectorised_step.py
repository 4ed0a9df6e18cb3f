"""Members of a sweep side by side are what each would be alone."""

from functools import cache, partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from dpojax import sharding
from dpojax.methods import preference
from dpojax.models.decoder import SHARDING_RULES
from dpojax.planning.hlo import collectives
from dpojax.training.forward import NO_FROZEN_WEIGHTS, FrozenWeights, language_model
from dpojax.training.state import abstract_state, initial_state, make_schedule, new_state
from dpojax.training.step import build_step
from dpojax.training.vectorised_step import (
    MemberHyperparameters,
    abstract_member_states,
    build_take_member,
    build_vectorised_step,
    new_member_states,
    stack,
)

BETAS = (0.05, 0.1, 0.5, 2.0)
STEPS = 3
SGD, ADAM = optax.identity(), optax.scale_by_adam()


def member(beta, *, rate=0.1, steps=STEPS, seed=0) -> MemberHyperparameters:
    hyper = {"learning_rate": rate, "beta": beta, "label_smoothing": 0.1, "alpha": 0.5}
    whole = jnp.int32
    return MemberHyperparameters(
        jax.tree.map(jnp.float32, hyper), whole(1), whole(steps), whole(seed)
    )


@cache
def make_step(model, objective, optimizer):
    def make(warmup_steps, steps):
        schedule = make_schedule("cosine", warmup_steps, steps)
        forward = language_model(model, statistics=objective.statistics)
        return build_step(forward, objective, optimizer, schedule)

    return make


@cache
def step_alone(make, warmup_steps: int, steps: int):
    """Jitted, with Python's numbers in its schedule; members that differ in `hyper` share it."""
    return jax.jit(make(warmup_steps, steps))


def alone(
    make, optimizer, params, rows, hyperparameters: MemberHyperparameters, frozen=NO_FROZEN_WEIGHTS
):
    """The member trained by itself on one device."""
    mesh = sharding.make_mesh(devices=jax.devices()[:1])
    abstract = abstract_state(params, optimizer, mesh, SHARDING_RULES)
    start = jax.tree.map(jnp.copy, params)
    state = new_state(start, optimizer, abstract, seed=int(hyperparameters.seed))
    step = step_alone(make, int(hyperparameters.warmup_steps), int(hyperparameters.steps))
    for _ in range(int(hyperparameters.steps)):
        state, report = step(state, rows, hyperparameters.hyper, frozen)
    return state, report


class VectorisedSweep:
    """Members on a mesh with the given axes."""

    def __init__(
        self, make, optimizer, params, members, *, axis=1, mesh=(1, 1, 1), rows_differ=False
    ):
        self.rows_differ = rows_differ
        devices = jax.devices()[: axis * int(np.prod(mesh))]
        plain = sharding.make_mesh(axis * mesh[0], *mesh[1:], devices=devices)
        self.plain, self.mesh = plain, sharding.sweep_mesh(plain, axis)
        own = abstract_state(params, optimizer, plain, SHARDING_RULES)
        self.abstract = abstract_member_states(own, len(members), self.mesh)
        self.hyperparameters = stack(members, self.mesh)
        start = partial(initial_state, optimizer=optimizer)
        make_state = lambda p, seed: start(p, seed=seed)
        self.states = new_member_states(
            params, make_state, self.hyperparameters.seed, self.abstract
        )
        self.take_member = build_take_member(own)
        self.step = build_vectorised_step(make, self.abstract, rows_differ=rows_differ)

    def place(self, rows):
        if self.rows_differ:
            return jax.device_put(rows, NamedSharding(self.mesh, PartitionSpec("sweep")))
        return sharding.put_rows(rows, self.mesh)

    def train(self, rows, steps=STEPS, frozen=NO_FROZEN_WEIGHTS):
        placed = self.place(rows)
        frozen = jax.device_put(frozen, sharding.replicated(self.plain))
        with jax.set_mesh(self.mesh):
            for _ in range(steps):
                self.states, self.reports = self.step(
                    self.states, placed, self.hyperparameters, frozen
                )
        return [self.take_member(self.states, i) for i in range(len(self.states.alive))]


def assert_same(got, want, atol):
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=atol), got, want)


AXES = [pytest.param(1, marks=pytest.mark.long), 2]  # of members, in devices


@pytest.mark.parametrize(
    ("optimizer", "tolerance", "axis", "mesh"),
    [
        pytest.param(SGD, 1e-6, 1, (1, 1, 1), marks=pytest.mark.long),
        (SGD, 1e-6, 4, (1, 1, 1)),
        pytest.param(SGD, 1e-6, 2, (2, 1, 2), marks=pytest.mark.long),
        # It divides by the root of a second moment: near 0 it makes much of a rounding.
        pytest.param(ADAM, 1e-4, 2, (2, 1, 2), marks=pytest.mark.long),
    ],
    ids=["one device", "a device each", "data and tensor", "adam"],
)
def test_members_together_equal_members_alone(
    model, objective, params, rows, optimizer, tolerance, axis, mesh
):
    make = make_step(model, objective, optimizer)
    members = [member(beta, rate=0.004 * (i + 1)) for i, beta in enumerate(BETAS)]
    sweep = VectorisedSweep(make, optimizer, params, members, axis=axis, mesh=mesh)
    states = sweep.train(rows)
    assert sweep.step._cache_size() == 1
    for i, hyperparameters in enumerate(members):
        state, report = alone(make, optimizer, params, rows, hyperparameters)
        assert_same(states[i].params, state.params, tolerance)
        total = sweep.reports.metrics["loss"].total[i]
        np.testing.assert_allclose(total, report.metrics["loss"].total, atol=1e-4)
    first, last = states[0].params, states[-1].params
    assert max(jax.tree.leaves(jax.tree.map(lambda a, b: jnp.abs(a - b).max(), first, last))) > 1e-3


@pytest.mark.long
@pytest.mark.parametrize("axis", AXES, ids=["one device", "a device each"])
def test_a_member_that_ends_early_is_left_as_it_was(model, objective, params, rows, axis):
    make = make_step(model, objective, SGD)
    members = [member(0.1, steps=2), member(0.1, steps=4)]
    sweep = VectorisedSweep(make, SGD, params, members, axis=axis)
    states = sweep.train(rows, steps=4)
    assert [int(state.step) for state in states] == [2, 4]
    assert sweep.reports.metrics["loss"].weight.tolist() == [0, 10]
    for state, hyperparameters in zip(states, members):
        assert_same(
            state.params,
            alone(make, SGD, params, rows, hyperparameters)[0].params,
            1e-6,
        )


@pytest.mark.parametrize("axis", AXES, ids=["one device", "a device each"])
def test_a_member_that_fails_fails_alone_and_for_good(model, objective, params, rows, axis):
    make = make_step(model, objective, SGD)
    two = [member(np.nan), member(0.1)]
    sweep = VectorisedSweep(make, SGD, params, two, axis=axis)
    broken, healthy = sweep.train(rows)
    assert sweep.states.alive.tolist() == [False, True]
    assert_same(broken.params, params, 0)
    assert int(broken.step) == 0
    want, _ = alone(make, SGD, params, rows, member(0.1))
    assert_same(healthy.params, want.params, 1e-6)


@pytest.mark.slow
def test_members_may_have_batches_of_their_own(model, objective, params, rows):
    make = make_step(model, objective, SGD)
    other = rows._replace(tokens=(rows.tokens + 1) % model.config.vocab_size)
    members = [member(0.1), member(0.5)]
    sweep = VectorisedSweep(make, SGD, params, members, axis=2, rows_differ=True)
    both = jax.tree.map(lambda *x: np.stack(x), rows, other)
    for state, hyperparameters, own in zip(sweep.train(both), members, (rows, other)):
        want, _ = alone(make, SGD, params, own, hyperparameters)
        assert_same(state.params, want.params, 1e-6)


@pytest.mark.long
def test_frozen_weights_are_the_same_for_all_members(model, params, reference_params, rows):
    objective = preference.objective("tdpo", {"alpha": 0.5, "stop_chosen": True})
    make = make_step(model, objective, SGD)
    members = [member(beta, steps=1) for beta in BETAS[-2:]]
    sweep = VectorisedSweep(make, SGD, params, members, axis=2)
    frozen = FrozenWeights(reference=reference_params)
    state = sweep.train(rows, steps=1, frozen=frozen)[-1]
    want, _ = alone(make, SGD, params, rows, members[-1], frozen)
    assert_same(state.params, want.params, 1e-6)
    moved = jax.tree.map(lambda a, b: jnp.abs(a - b).max(), state.params, params)
    assert min(jax.tree.leaves(moved)) > 0


@pytest.mark.parametrize(
    ("members", "mesh"),
    [pytest.param(4, (1, 2, 2), marks=pytest.mark.long), (2, (1, 1, 1))],
    ids=["two members on four devices", "a device each"],
)
def test_no_collective_crosses_the_sweep_axis(model, objective, params, rows, members, mesh):
    make = make_step(model, objective, ADAM)
    sweep = VectorisedSweep(make, ADAM, params, [member(0.1)] * members, axis=2, mesh=mesh)
    with jax.set_mesh(sweep.mesh):
        placed = sweep.place(rows)
        lowered = sweep.step.lower(sweep.states, placed, sweep.hyperparameters, NO_FROZEN_WEIGHTS)
    found = collectives(lowered.compile().as_text())
    groups = [group for collective in found for group in collective.groups]
    half = int(np.prod(mesh))  # devices of one place on the sweep axis
    assert bool(groups) == (half > 1)  # the other axes do communicate
    crossing = [group for group in groups if len({device // half for device in group}) > 1]
    assert not crossing
