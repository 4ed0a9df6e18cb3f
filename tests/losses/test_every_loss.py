"""What every loss keeps to: shapes, arrays as hyper-parameters, finite gradients, examples."""

import doctest
import importlib
import inspect
import itertools
import pkgutil

import every_loss
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from every_loss import EVERY, PAIR

from dpojax import losses
from dpojax.losses import Pair

PARTS = pkgutil.iter_modules(losses.__path__, "dpojax.losses.")
MODULES = ["dpojax.losses", *(part.name for part in PARTS)]


def some_pairs(shape, seed=0):
    draw = np.random.default_rng(seed)
    pair = lambda: Pair(*(jnp.float32(draw.uniform(-30, -1, shape)) for _ in range(2)))
    lengths = Pair(*(jnp.int32(draw.integers(1, 9, shape)) for _ in range(2)))
    return pair(), pair(), lengths


def test_every_public_loss_is_held_to_the_laws():
    public = set(losses.__all__) - every_loss.NO_LOSSES
    assert public == {name.split()[0] for name in EVERY}


@pytest.mark.parametrize("name", EVERY)
def test_there_is_one_number_per_example_in_any_leading_shape(name):
    batch = some_pairs((2, 3))
    got = EVERY[name](*batch, 0.3)
    assert got.shape == (2, 3)
    first, second = (jax.tree.map(lambda x, row=row: x[row], batch) for row in (0, 1))
    want = [EVERY[name](*first, 0.3), EVERY[name](*second, 0.3)]
    np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", PAIR)
def test_an_example_does_not_see_the_rest_of_its_batch(name):
    batch = some_pairs((3,))
    alone = jax.tree.map(lambda x: x[1], batch)
    got = PAIR[name](*alone, 0.3)
    assert got.shape == ()
    np.testing.assert_allclose(got, PAIR[name](*batch, 0.3)[1], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", EVERY)
def test_beta_may_be_an_array_under_vmap_and_jit(name):
    batch = some_pairs((3,))
    betas = jnp.array([0.05, 0.5, 2.0])
    got = jax.jit(jax.vmap(lambda beta: EVERY[name](*batch, beta)))(betas)
    want = [EVERY[name](*batch, beta) for beta in betas.tolist()]
    np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("beta", [0.01, 0.1, 5.0])
@pytest.mark.parametrize("length", [1, 300])
@pytest.mark.parametrize("name", EVERY)
def test_losses_and_gradients_are_finite_in_float32_from_zero_to_minus_1200(name, length, beta):
    levels = [0.0, -1e-6, -5.0, -90.0, -1200.0]
    grid = jnp.float32(np.array(list(itertools.product(levels, repeat=4))).T)
    policy, reference = Pair(grid[0], grid[1]), Pair(grid[2], grid[3])
    lengths = Pair(*(jnp.full(grid.shape[1], length) for _ in range(2)))
    value, pull = jax.vjp(lambda p: EVERY[name](p, reference, lengths, beta), policy)
    (gradient,) = pull(jnp.ones_like(value))
    assert value.dtype == jnp.float32
    assert np.isfinite(value).all()
    assert np.isfinite(gradient).all()


@pytest.mark.parametrize("module", MODULES)
def test_examples_in_the_docstrings_run(module):
    module = importlib.import_module(module)
    here = [x for x in vars(module).values() if getattr(x, "__module__", "") == module.__name__]
    # doctest finds no function behind a decorator by itself.
    finder, runner = doctest.DocTestFinder(recurse=False), doctest.DocTestRunner()
    for documented in (module, *(inspect.unwrap(x) for x in here if callable(x))):
        for examples in finder.find(documented, documented.__name__, globs=dict(vars(module))):
            runner.run(examples)
    assert runner.tries > 0
    assert runner.failures == 0


def test_every_public_function_shows_an_example():
    public = [getattr(losses, name) for name in losses.__all__]
    functions = [f for f in public if inspect.isfunction(f)]
    assert len(functions) > 30
    assert [f.__name__ for f in functions if ">>>" not in f.__doc__] == []
