"""Every loss runs through the one step on rows of the embedded task, however they are cut.

The model is a user's own, plugged in with two functions: a token's hidden state is a row of a
table, so it is a bigram model with a low-rank output, and compiles in no time.
"""

from functools import cache
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from dpojax import sharding
from dpojax.data import records, reviews, unpaired
from dpojax.data.packing import Costs, plan
from dpojax.data.rows import collate
from dpojax.data.tokenise import tokenise
from dpojax.data.tokenize_config import TokenizeConfig
from dpojax.logprobs import Head
from dpojax.losses import RunningMean
from dpojax.methods import preference
from dpojax.training.forward import FrozenWeights, build_score, language_model
from dpojax.training.state import State
from dpojax.training.step import build_step

from .conftest import GIVEN

COUNT, LENGTH = 36, 128
BIGRAM = SimpleNamespace(
    apply=lambda params, rows: params["table"][rows.tokens],
    head=lambda params: Head(params["head"]),
)
WRAPPERS = {
    "dpo, forward KL": ("dpo", {"divergence": "forward_kl"}),
    "hinge, JS": ("hinge", {"divergence": "js"}),
    "robust, alpha": ("robust", {"divergence": "alpha", "divergence_alpha": 0.5}),
    "dpo, length-desensitised": ("dpo", {"ld_alpha": 0.5, "ld_weight_reference": True}),
    "dpo, humanline": ("dpo", {"humanline_low": -1.0, "humanline_high": 1.5}),
    "kto, humanline": (
        "kto",
        {"humanline_low": -1.0, "humanline_high": 1.5},
    ),
    "dpo, synchronised": ("dpo", {"sync_every": 2}),
    "kto, synchronised": ("kto", {"sync_every": 1, "humanline_low": -1.0, "humanline_high": 1.5}),
    "ipo, WPO": ("ipo", {"length_norm": "sum", "wpo": "corrected"}),
    "mixture": ("dpo+bco+sft", {"weights": (0.8, 0.2, 1.0)}),
}
CASES = {loss: (loss, GIVEN.get(loss, {})) for loss in preference.LOSSES} | WRAPPERS
ALIKE = (
    *("robust", "hinge", "discopop", "nca", "sppo", "apo_zero", "apo_down", "gpo", "chipo"),
    *("alphapo", "tpo_l", "simper", "simnpo", "uni_dpo", "kto, humanline"),
)
ADAM, SGD = optax.scale_by_adam(), optax.identity()
COUPLED = (
    "beta_dpo",
    "alpha_dpo",
    "epsilon_dpo",
    "aot",
    "aot_unpaired",
    "kto",
    "bco",
    "bco_unpaired",
    "mixture",
)


@pytest.fixture(scope="module")
def start():
    """Weights of policy and reference."""
    rng = np.random.default_rng(0)
    size = len(reviews.tokenizer()), 8
    return {name: jnp.asarray(rng.normal(0, 0.3, size), jnp.float32) for name in ("table", "head")}


@pytest.fixture(scope="module")
def examples():
    """By form of data."""
    rows = reviews.preferences("train", COUNT, seed=0)
    found = [records.parse(row, f"reviews:{i}") for i, row in enumerate(rows)]
    ready = lambda some: tokenise(some, reviews.tokenizer(), TokenizeConfig(max_length=96))[0]
    halves = [half for record in found for half in unpaired.split(record)]
    single = ready(halves)
    labelled = list(unpaired.with_mismatched(single, range(len(single)), 96))
    return {"pairs": ready(found), "ranked": ready(found), "labelled": labelled}


@pytest.fixture(scope="module")
def batches(examples, start):
    """{(form, rows of a micro-batch)}: all examples with the reference's log-probs; 0 is one."""
    score, made = jax.jit(build_score(BIGRAM)), {}
    for form, some in examples.items():
        for micro_rows in (0, 8):
            everything = [range(len(some))]
            given = {"length": LENGTH, "multiple": 8, "micro_rows": micro_rows or None}
            if micro_rows:
                shape = plan(some, everything, **given, costs=Costs(overhead=0, step=8))
            else:
                shape = plan(some, everything, **given, max_buckets=1)
                rows = -(-shape.rows * shape.micro_batches // 8) * 8
                shape = shape._replace(rows=rows, micro_batches=1)
            rows = collate(some, everything[0], shape)
            assert not micro_rows or (len(rows.tokens) > 1 and len(rows.buckets) > 1)
            made[form, micro_rows] = rows._replace(reference=score(start, rows).logprob)
    return made


@pytest.fixture(scope="module")
def better(batches, start):
    """Weights that find every response likelier than the reference does: KTO's z is above 0."""
    step, rows, hyper = prepare("sft", batches, 0, ADAM, rate=0.02)
    state = state_of(start, ADAM)
    for _ in range(6):
        state, _ = step(state, rows, hyper)
    return state.params


def state_of(params, optimizer):
    zero = jnp.zeros(())
    mean = RunningMean(zero, zero)
    return State(zero, params, optimizer.init(params), jnp.zeros(2), mean, reference=params)


@cache
def compiled(case, optimizer):
    """The objective of a case and its jitted step, which several tests call."""
    loss, given = CASES[case]
    objective = preference.objective(loss, preference.resolve(loss, given))
    forward = language_model(BIGRAM, statistics=objective.statistics)
    return objective, jax.jit(build_step(forward, objective, optimizer, lambda _: 1.0))


def prepare(case, batches, micro_rows, optimizer, rate):
    """A jitted step, its rows and its numbers."""
    loss, given = CASES[case]
    options = preference.resolve(loss, given)
    objective, step = compiled(case, optimizer)
    rows = batches[preference.loss_requirements(loss).form, micro_rows]
    if not objective.needs_reference:
        rows = rows._replace(reference=None)
    return step, rows, preference.hyper(options | {"learning_rate": rate})


def value(report):
    return float(report.metrics["loss"].total / report.metrics["loss"].weight)


def slow_where_nothing_is_new(case):
    """Losses that read nothing of the batch that another one does not read train among the slow."""
    return pytest.param(case, marks=pytest.mark.long) if case in ALIKE else case


@pytest.mark.slow
@pytest.mark.parametrize("case", [slow_where_nothing_is_new(case) for case in CASES])
def test_a_few_steps_lower_the_loss_that_is_trained(case, batches, start):
    step, rows, hyper = prepare(case, batches, 0, ADAM, rate=0.02)
    state, values = state_of(start, ADAM), []
    for _ in range(9):
        state, report = step(state, rows, hyper, FrozenWeights(reference=start))
        assert report.finite
        values.append(value(report))
    assert state.step == 9
    assert values[-1] < values[0] - 1e-3, values


@pytest.mark.long
@pytest.mark.parametrize("case", [*COUPLED, "dpo", "plackett_luce", "tdpo", "ipo, WPO"])
def test_the_same_batch_gives_the_same_gradient_however_it_is_cut(case, batches, start, better):
    found = []
    for micro_rows in (0, 8):
        step, rows, hyper = prepare(case, batches, micro_rows, SGD, rate=1.0)
        state, report = step(state_of(better, SGD), rows, hyper, FrozenWeights(reference=start))
        moved = jax.tree.map(jnp.subtract, state.params, better)
        found.append((moved, state.baseline, report.metrics["loss"]))
    scale = max(float(jnp.abs(x).max()) for x in jax.tree.leaves(found[0][0]))
    assert scale > 1e-4
    close = lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-4 * scale)
    jax.tree.map(close, found[0][0], found[1][0])
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4), found[0][1:], found[1][1:]
    )
    if case == "kto":
        assert report.metrics["kto/baseline"].value > 1


@pytest.mark.slow
def test_a_sweep_over_epsilon_compiles_one_step(batches, start, better):
    """The forward pass perturbs logits by it, and the loss changes beta by it."""
    step, rows, hyper = prepare("epsilon_dpo", batches, 0, SGD, rate=1.0)
    frozen, moved = FrozenWeights(reference=start), []
    compiled_before = None
    for epsilon in (0.01, 0.5):
        numbers = hyper | {"epsilon": jnp.float32(epsilon)}
        state, _ = step(state_of(better, SGD), rows, numbers, frozen)
        moved.append(state)
        compiled_before = compiled_before or step._cache_size()
    assert step._cache_size() == compiled_before
    # Logits are perturbed by this epsilon, which moves the weights; beta is changed by it, too.
    tables = [np.asarray(state.params["table"]) for state in moved]
    assert np.abs(tables[0] - tables[1]).max() > 1e-5
    change = [abs(float(state.baseline.mean)) for state in moved]
    assert change[1] > 10 * change[0] > 0


@pytest.mark.slow
@pytest.mark.parametrize("case", ["aot", "kto", "bco"])
def test_coupled_losses_give_the_same_gradient_on_eight_devices(case, batches, start, better):
    step, rows, hyper = prepare(case, batches, 8, SGD, rate=1.0)
    one, _ = step(state_of(better, SGD), rows, hyper, FrozenWeights(reference=start))
    mesh = sharding.make_mesh(4, 2, 1)
    with jax.set_mesh(mesh):
        placed = sharding.put_rows(jax.tree.map(np.asarray, rows), mesh)
        eight, _ = step(state_of(better, SGD), placed, hyper)
    moved = [jax.tree.map(jnp.subtract, state.params, better) for state in (one, eight)]
    scale = max(float(jnp.abs(x).max()) for x in jax.tree.leaves(moved[0]))
    close = lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-4 * scale)
    jax.tree.map(close, *moved)


@pytest.mark.slow
@pytest.mark.parametrize(("loss", "every"), [("dpo", 2), ("kto", 1)])
def test_a_synchronised_reference_is_the_policy_before_the_last_update_of_each_period(
    loss, every, batches, start, better
):
    """Equal to fixed references that a plain loop puts into the rows."""
    synchronised, rows, hyper = prepare(f"{loss}, synchronised", batches, 8, SGD, rate=0.05)
    fixed, _, _ = prepare("kto, humanline" if loss == "kto" else loss, batches, 8, SGD, rate=0.05)
    score = jax.jit(build_score(BIGRAM))
    got = want = state_of(better, SGD)
    got, reference = got._replace(reference=start), start
    for step in range(4):
        policy = want.params
        want, report = fixed(want, rows._replace(reference=score(reference, rows).logprob), hyper)
        got, its_report = synchronised(got, rows, hyper)
        np.testing.assert_allclose(value(its_report), value(report), rtol=1e-5)
        if (step + 1) % every == 0:
            reference = policy
        for mine, its in zip(
            jax.tree.leaves((got.params, got.reference)), jax.tree.leaves((want.params, reference))
        ):
            np.testing.assert_allclose(mine, its, rtol=1e-4, atol=1e-5)
