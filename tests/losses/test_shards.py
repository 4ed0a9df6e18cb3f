"""Losses that see a whole batch give the same where devices share it."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from dpojax import losses
from dpojax.losses import Pair, RunningMean

BATCH = 16
MASK = jnp.asarray(np.arange(BATCH) % 5 != 2)
DRAW = np.random.default_rng(0).uniform(-30, -1, (4, BATCH)).astype(np.float32)
POLICY, REFERENCE = Pair(*DRAW[:2]), Pair(*DRAW[2:])


def aot(policy, reference, mask, axis_name):
    return losses.aot(policy, reference, beta=0.1, mask=mask, axis_name=axis_name)


def aot_unpaired(policy, reference, mask, axis_name):
    return losses.aot_unpaired(policy, reference, beta=0.1, mask=mask, axis_name=axis_name)


def kto(policy, reference, mask, axis_name):
    ratio = policy.rejected - reference.rejected
    baseline = losses.kto_baseline(ratio, mask, axis_name=axis_name)
    weights = {"desirable_weight": 1.0, "undesirable_weight": 1.0}
    return losses.kto(policy.chosen, reference.chosen, mask, beta=0.1, kl=baseline, **weights)


def bco(policy, reference, mask, axis_name):
    start = RunningMean(jnp.float32(0.3), jnp.float32(4.0))
    rewards = losses.implicit_rewards(policy, reference, 0.1)
    baseline = losses.update_baseline(start, rewards, mask, axis_name=axis_name)
    return losses.bco(policy, reference, beta=0.1, delta=baseline.mean)


EVERY = pytest.mark.parametrize("loss", [aot, aot_unpaired, kto, bco])


def value_and_gradient(function):
    """Of a sum that weighs every example differently, with respect to the policy."""

    def total(policy):
        values = function(policy)
        return jnp.sum(values * jnp.cos(jnp.arange(BATCH, dtype=jnp.float32))), values

    return jax.jit(jax.value_and_grad(total, has_aux=True))


@EVERY
@pytest.mark.parametrize("axes", ["data", ("data", "fsdp")], ids=["one axis", "two axes"])
def test_shards_with_an_axis_name_give_the_losses_and_gradients_of_the_whole_batch(loss, axes):
    want = value_and_gradient(lambda policy: loss(policy, REFERENCE, MASK, None))(POLICY)
    mesh = jax.make_mesh((4, 2), ("data", "fsdp"), axis_types=(AxisType.Auto,) * 2)
    shards = {"in_specs": P(axes), "out_specs": P(axes), "mesh": mesh}
    local = jax.shard_map(partial(loss, axis_name=axes), **shards)
    got = value_and_gradient(lambda policy: local(policy, REFERENCE, MASK))(POLICY)
    for one, of_whole in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        np.testing.assert_allclose(one, of_whole, rtol=1e-5, atol=1e-6)


@EVERY
def test_explicit_axes_change_no_loss_and_no_gradient(loss):
    want = value_and_gradient(lambda policy: loss(policy, REFERENCE, MASK, None))(POLICY)
    mesh = jax.make_mesh((8,), ("data",))
    with jax.set_mesh(mesh):
        place = NamedSharding(mesh, P("data"))
        policy, reference, mask = jax.device_put((POLICY, REFERENCE, MASK), place)
        weights = jax.device_put(jnp.cos(jnp.arange(BATCH, dtype=jnp.float32)), place)

        def total(policy):
            values = loss(policy, reference, mask, None)
            return jnp.sum(values * weights), values

        got = jax.jit(jax.value_and_grad(total, has_aux=True))(policy)
    for one, of_whole in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        np.testing.assert_allclose(one, of_whole, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("name", "loss"),
    [
        *(("aot", aot), ("kto_baseline", kto)),
        pytest.param("aot_unpaired", aot_unpaired, marks=pytest.mark.long),
        pytest.param("update_baseline", bco, marks=pytest.mark.long),
    ],
)
def test_a_shard_that_would_see_its_own_part_alone_is_refused_unless_that_is_meant(name, loss):
    mesh = jax.make_mesh((8,), ("data",), axis_types=(AxisType.Auto,))
    mapped = partial(jax.shard_map, mesh=mesh, in_specs=P("data"), out_specs=P("data"))
    with pytest.raises(ValueError, match=rf"^{name}: each shard .*\['data'\].*axis_name"):
        mapped(partial(loss, axis_name=None))(POLICY, REFERENCE, MASK)
    alone = mapped(partial(loss, axis_name=()))(POLICY, REFERENCE, MASK)
    first_two = jax.tree.map(lambda x: x[:2], (POLICY, REFERENCE, MASK))
    np.testing.assert_allclose(alone[:2], loss(*first_two, None), rtol=1e-5, atol=1e-6)
