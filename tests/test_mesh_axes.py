"""Log-probs and their gradients are the same under every kind of mesh axis, in every dtype."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from dpojax.head import Head
from dpojax.logprobs import (
    perturbed_logprobs,
    token_kl,
    token_logprobs,
    token_logprobs_and_entropy,
    token_logprobs_plain,
    token_statistics,
)

ROWS, TOKENS, WIDTH, VOCABULARY = 8, 6, 16, 64
SPECS = P("data", "seq"), P("tensor"), P("tensor"), P("data", "seq")  # of `problem`'s arrays
SEVERAL, ONE = 200, 2**25  # logits of a chunk: several chunks, or a single one
# Rounding of sums of 64 products and of an exponential, relative to the largest entry; bfloat16
# rounds each factor of a product.
ROUNDING = {"float32": 3e-6, "bfloat16": 2**-7, "float64": 1e-14}


def problem(dtype: str):
    """Hidden states, weight, bias and targets."""
    rng = np.random.default_rng(0)
    hidden, weight = rng.normal(size=(ROWS, TOKENS, WIDTH)), rng.normal(size=(VOCABULARY, WIDTH))
    targets = rng.integers(0, VOCABULARY, (ROWS, TOKENS))
    # bfloat16 states meet master weights in float32, as in training.
    head_dtype = "float32" if dtype == "bfloat16" else dtype
    bias = rng.normal(size=VOCABULARY)
    return (
        jnp.asarray(hidden, dtype),
        *(jnp.asarray(x, head_dtype) for x in (weight, bias)),
        targets,
    )


def weighted_sum(values):
    """A number whose gradient weighs each token differently."""
    weights = np.cos(np.arange(ROWS * TOKENS)).reshape(ROWS, TOKENS)
    spec = jax.typeof(values).sharding.spec
    weights = jnp.asarray(weights, values.dtype)
    return jnp.sum(values * (weights if all(x is None for x in spec) else reshard(weights, spec)))


def reshard(x, spec):
    return jax.sharding.reshard(x, spec)


def local_logprobs(hidden, weight, bias, targets, *, max_logits):
    return token_logprobs(hidden, Head(weight, bias), targets, max_logits=max_logits)


def mapped_logprobs(tokens, axis_names, hidden, weight, bias, targets, *, max_logits):
    """In a shard_map with its default check of what varies: the head is the same in all shards."""
    local = partial(local_logprobs, max_logits=max_logits)
    specs = {"in_specs": (tokens, P(), P(), tokens), "out_specs": tokens}
    return jax.shard_map(local, **specs, axis_names=axis_names)(hidden, weight, bias, targets)


EVERY, SOME = P(("data", "seq", "tensor")), P(("data", "seq"))
ALL_MANUAL = partial(mapped_logprobs, EVERY, {"data", "seq", "tensor"})
SOME_MANUAL = partial(mapped_logprobs, SOME, {"data", "seq"})
# The kind of the mesh's axes, the function, and how its arrays are laid out.
MESHES = {
    "no mesh": (None, local_logprobs, None),
    "auto": (AxisType.Auto, local_logprobs, SPECS),
    "explicit": (AxisType.Explicit, local_logprobs, SPECS),
    "shard_map": (AxisType.Auto, ALL_MANUAL, (EVERY, P(), P(), EVERY)),
    "shard_map over some axes": (AxisType.Auto, SOME_MANUAL, (SOME, P("tensor"), P(), SOME)),
    "shard_map in an explicit mesh": (AxisType.Explicit, ALL_MANUAL, (EVERY, P(), P(), EVERY)),
}


def mesh_of(kind):
    return jax.make_mesh((2, 2, 2), ("data", "seq", "tensor"), axis_types=(kind,) * 3)


def on_mesh(mesh, arrays, specs):
    return [jax.device_put(x, NamedSharding(mesh, spec)) for x, spec in zip(arrays, specs)]


@pytest.mark.parametrize("max_logits", [ONE, SEVERAL], ids=["one chunk", "several chunks"])
@pytest.mark.parametrize("dtype", ROUNDING)
@pytest.mark.parametrize("name", MESHES)
def test_log_probs_and_gradients_equal_the_plain_twin_without_a_mesh(name, dtype, max_logits):
    kind, function, specs = MESHES[name]
    with jax.enable_x64(dtype == "float64"):
        arrays = problem(dtype)

        def plain(hidden, weight, bias, targets):
            values = token_logprobs_plain(hidden, Head(weight, bias), targets)
            return weighted_sum(values), values

        def tested(*arrays):
            values = function(*arrays, max_logits=max_logits)
            return weighted_sum(values), values

        want = jax.value_and_grad(plain, (0, 1, 2), has_aux=True)(*arrays)
        gradient = jax.jit(jax.value_and_grad(tested, (0, 1, 2), has_aux=True))
        if kind is None:
            got = gradient(*arrays)
        else:
            mesh = mesh_of(kind)
            with jax.set_mesh(mesh):
                got = gradient(*on_mesh(mesh, arrays, specs))
        for one, its_twin in zip(jax.tree.leaves(got), jax.tree.leaves(want)):
            assert one.dtype == its_twin.dtype
            scale = float(jnp.abs(its_twin).max())
            atol = ROUNDING[dtype] * scale
            np.testing.assert_allclose(*(np.asarray(x, "f8") for x in (one, its_twin)), 0, atol)


def entropies(hidden, head, targets, max_logits):
    return token_logprobs_and_entropy(hidden, head, targets, max_logits=max_logits).entropy


def statistics(hidden, head, targets, max_logits):
    return token_statistics(hidden, head, targets, max_logits=max_logits)[:5]


def divergences(hidden, head, targets, max_logits):
    del targets
    reference = Head(head.weight[::-1], head.bias)
    return token_kl(hidden, head, 2 * hidden, reference, max_logits=max_logits)


def perturbed(hidden, head, targets, max_logits):
    reference = 2 * hidden, Head(head.weight[::-1], head.bias)
    return perturbed_logprobs(hidden, head, *reference, targets, epsilon=0.1, max_logits=max_logits)


@pytest.mark.parametrize("function", [entropies, statistics, divergences, perturbed])
@pytest.mark.parametrize("name", ["explicit", "shard_map"])
def test_other_statistics_equal_those_without_a_mesh(name, function):
    arrays = problem("float32")

    def tested(hidden, weight, bias, targets):
        return function(hidden, Head(weight, bias), targets, SEVERAL)

    want = tested(*arrays)
    mesh = mesh_of(AxisType.Explicit)
    with jax.set_mesh(mesh):
        if name == "explicit":
            got = jax.jit(tested)(*on_mesh(mesh, arrays, SPECS))
        else:
            specs = (EVERY, P(), P(), EVERY)
            mapped = jax.shard_map(tested, in_specs=specs, out_specs=EVERY)
            got = jax.jit(mapped)(*on_mesh(mesh, arrays, specs))
    for one, its_twin in zip(jax.tree.leaves(got), jax.tree.leaves(want)):
        np.testing.assert_allclose(one, its_twin, rtol=1e-5, atol=1e-5)


def test_under_explicit_axes_results_and_gradients_are_laid_out_as_their_arguments():
    mesh = mesh_of(AxisType.Explicit)
    with jax.set_mesh(mesh):
        hidden, weight, bias, targets = on_mesh(mesh, problem("float32"), SPECS)

        def tested(hidden, weight, bias):
            values = token_logprobs(hidden, Head(weight, bias), targets)
            return weighted_sum(values), values

        gradients, values = jax.jit(jax.grad(tested, (0, 1, 2), has_aux=True))(hidden, weight, bias)
    assert values.sharding.spec == P("data", "seq")
    for one, its_argument in zip(gradients, (hidden, weight, bias)):
        assert one.sharding.is_equivalent_to(its_argument.sharding, one.ndim)
