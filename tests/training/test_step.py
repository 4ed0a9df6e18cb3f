"""The step's laws: packing, sharding and micro-batches change nothing; the gradient is eq. 7."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from dpojax import losses, sharding
from dpojax.data.packing import USUAL, Buckets, Costs, plan
from dpojax.data.rows import collate
from dpojax.losses import Pair
from dpojax.methods import sft
from dpojax.models import decoder
from dpojax.models.attention import plain_rows
from dpojax.models.decoder import SHARDING_RULES
from dpojax.training.forward import (
    Distributions,
    build_divergence,
    build_hidden,
    language_model,
)
from dpojax.training.state import abstract_state, clip_by_norm, initial_state, new_state
from dpojax.training.step import build_evaluate, build_step, updated_if

ONE_AXIS = [pytest.param(shape, marks=pytest.mark.long) for shape in ((8, 1, 1), (1, 8, 1))]


def one(schedule_step):
    return 1.0


def sgd():
    return optax.identity()  # the step itself subtracts learning_rate times the gradient


@pytest.fixture(scope="module")
def step(model, objective):
    return jax.jit(build_step(language_model(model), objective, sgd(), one))


@pytest.fixture(scope="module")
def start(model, params):
    abstract = abstract_state(params, sgd(), sharding.make_mesh(devices=jax.devices()[:1]), RULES)
    return lambda: new_state(jax.tree.map(jnp.copy, params), sgd(), abstract, seed=0)


RULES = SHARDING_RULES


@pytest.fixture(scope="module")
def stepped(step, start, rows, hyper):
    return step(start(), rows, hyper)


def gradient_of(stepped, params, hyper):
    state, _ = stepped
    return jax.tree.map(lambda p, q: (p - q) / hyper["learning_rate"], params, state.params)


def assert_close(got, want, atol=1e-5):
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=atol), got, want)


@partial(jax.jit, static_argnums=0)
def full_logprobs(model, params, tokens):
    """Log-probs [R, T - 1] of tokens [R, T] but the first of each row, by all logits."""
    logprobs = jax.nn.log_softmax(decoder.logits(model, params, plain_rows(tokens)))[:, :-1]
    return jnp.take_along_axis(logprobs, tokens[:, 1:, None], axis=-1)[..., 0]


def separate_logprobs(model, params, examples, score_from=None):
    """Per-token log-probs of each (prompt + response) alone in a row of its own, full logits.

    Returns [examples, K, T - 1] log-probs and the mask of those after the prompt (or after the
    first `score_from` tokens). Right padding cannot be seen by a causal model.
    """
    width = max(len(e.prompt) + len(y) for e in examples for y in e.responses)
    tokens = np.zeros((len(examples), len(examples[0].responses), width), np.int32)
    mask = np.zeros((*tokens.shape[:2], width - 1), bool)
    for i, e in enumerate(examples):
        for k, y in enumerate(e.responses):
            whole = np.concatenate([e.prompt, y])
            tokens[i, k, : len(whole)] = whole
            mask[i, k, (score_from or len(e.prompt)) - 1 : len(whole) - 1] = True
    got = full_logprobs(model, params, jnp.asarray(tokens).reshape(-1, width))
    return got.reshape(mask.shape), mask


def separate_sums(model, params, examples):
    logprobs, mask = separate_logprobs(model, params, examples)
    return jnp.where(mask, logprobs, 0).sum(-1)


def test_packed_shared_prompt_rows_equal_separate_sequences_in_value_and_gradient(
    model, params, reference_params, pairs, hyper, stepped
):
    reference = Pair(*separate_sums(model, reference_params, pairs).T)

    def loss(params):
        policy = Pair(*separate_sums(model, params, pairs).T)
        return losses.dpo(policy, reference, beta=0.5, label_smoothing=0.1).mean()

    value, gradient = jax.jit(jax.value_and_grad(loss))(params)
    metric = stepped[1].metrics["loss"]
    np.testing.assert_allclose(metric.total / metric.weight, value, atol=1e-5)
    assert_close(gradient_of(stepped, params, hyper), gradient)


def test_the_gradient_is_equation_seven(model, params, reference_params, pairs, hyper, stepped):
    """-beta sigmoid(r_l - r_w) (grad log pi(y_w) - grad log pi(y_l)), averaged over the pairs;
    with label smoothing e the weight is beta (sigmoid(r_l - r_w) - e)."""
    ratio = separate_sums(model, params, pairs) - separate_sums(model, reference_params, pairs)
    wrong = 1 / (1 + np.exp(0.5 * (ratio[:, 0] - ratio[:, 1])))
    weight = 0.5 * (wrong - 0.1)

    def weighted(params):
        sums = separate_sums(model, params, pairs)
        return -jnp.mean(weight * (sums[:, 0] - sums[:, 1]))

    assert_close(gradient_of(stepped, params, hyper), jax.jit(jax.grad(weighted))(params))


FINE = Costs(overhead=0, step=4)  # shorter micro-batches wherever something fits into them


@pytest.mark.parametrize(
    ("micro_rows", "costs"),
    [
        (2, USUAL),
        pytest.param(1, FINE, marks=pytest.mark.slow),
        pytest.param(3, FINE, marks=pytest.mark.slow),
    ],
    ids=["2", "1 fine", "3 fine"],
)
def test_micro_batches_equal_one_batch(micro_rows, costs, step, start, pairs, rows, hyper, stepped):
    from dpojax.training.reference import Store

    store = Store(pairs)
    store.write(rows, rows.reference)
    shape = plan(pairs, [range(10)], length=32, micro_rows=micro_rows, costs=costs)
    shape = shape._replace(micro_batches=shape.micro_batches + 1)  # the last is empty
    parts = store.attach(collate(pairs, range(10), shape))
    state, report = step(start(), parts, hyper)
    assert len(parts.tokens) > 2
    assert len(parts.buckets) > 1 or costs == USUAL
    assert_close(state.params, stepped[0].params, atol=1e-6)
    assert_close(report.metrics, stepped[1].metrics, atol=1e-4)


@pytest.mark.slow
def test_scores_of_shorter_micro_batches_lie_where_those_of_whole_ones_do(
    score, pairs, reference_params
):
    shape = plan(pairs, [range(10)], length=32, micro_rows=3, costs=FINE)
    rows = collate(pairs, range(10), shape)
    assert len(shape.buckets) > 1
    got = score(reference_params, rows)
    whole = score(reference_params, rows._replace(buckets=Buckets()))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=2e-5), got, whole)


@pytest.mark.slow
def test_a_bad_example_is_found_in_a_shorter_micro_batch(step, start, pairs, hyper):
    shape = plan(pairs, [range(10)], length=32, micro_rows=1, costs=FINE)
    rows = collate(pairs, range(10), shape._replace(micro_batches=shape.micro_batches + 1))
    reference = np.zeros(rows.target.shape, np.float32)
    worst = np.argmin([len(e.prompt) + sum(map(len, e.responses)) for e in pairs])
    place = tuple(np.argwhere(rows.example == worst)[0])
    reference[place[:2]][rows.response[place[:2]] // rows.present.shape[-1] == place[2]] = np.nan
    _, report = step(start(), rows._replace(reference=reference), hyper)
    assert rows.example[report.bad].tolist() == [worst]
    assert not report.finite


@pytest.mark.parametrize("shape", [(2, 2, 2), (1, 4, 2), *ONE_AXIS], ids=str)
def test_eight_devices_equal_one(shape, model, objective, params, rows, hyper, stepped):
    mesh = sharding.make_mesh(*shape)
    abstract = abstract_state(params, sgd(), mesh, RULES)
    shardings = jax.tree.map(lambda x: x.sharding, abstract)
    with jax.set_mesh(mesh):
        placed = jax.device_put(jax.tree.map(np.array, params), shardings.params)
        state = new_state(placed, sgd(), abstract, seed=0)
        step = jax.jit(
            build_step(language_model(model), objective, sgd(), one),
            donate_argnums=0,
            out_shardings=(shardings, None),
        )
        new, report = step(state, sharding.put_rows(rows, mesh), hyper)
        assert all(leaf.is_deleted() for leaf in jax.tree.leaves(state.params)), "not donated"
    assert_close(new.params, stepped[0].params, atol=2e-6)
    assert_close(report.metrics, stepped[1].metrics, atol=1e-4)
    assert jax.tree.map(lambda x: x.sharding, new) == shardings
    whole = [x.sharding.is_fully_replicated for x in jax.tree.leaves(new.params) if x.ndim > 2]
    assert not any(whole) or shape == (8, 1, 1)


@pytest.mark.slow
def test_no_array_is_replicated_because_the_partitioner_knew_no_better(
    model, objective, params, rows, hyper, capfd
):
    """XLA warns when it gathers activations or weights whole in order to lay them out anew."""
    mesh = sharding.make_mesh(2, 2, 2)
    abstract = abstract_state(params, sgd(), mesh, RULES)
    with jax.set_mesh(mesh):
        step = jax.jit(build_step(language_model(model), objective, sgd(), one))
        step.lower(abstract, sharding.put_rows(rows, mesh), hyper).compile()
    assert "Involuntary full rematerialization" not in capfd.readouterr().err


def test_a_loss_that_is_not_finite_leaves_the_state_and_names_the_example(
    step, start, rows, hyper, params
):
    poisoned = np.array(rows.reference)
    place = tuple(np.argwhere(rows.response >= 0)[0])
    poisoned[place] = np.nan
    state, report = step(start(), rows._replace(reference=poisoned), hyper)
    slot = rows.response[place] // 2
    assert not report.finite
    assert np.argwhere(report.bad).tolist() == [[*place[:2], slot]]
    assert state.step == 0
    assert_close(state.params, params, atol=0)
    assert report.metrics["updates/lost"] == (0, 0)


def test_the_step_counts_and_changes_the_parameters_otherwise(stepped, params):
    state, report = stepped
    assert report.finite
    assert state.step == 1
    moved = jax.tree.map(lambda a, b: float(jnp.abs(a - b).max()), state.params, params)
    assert all(change > 0 for change in jax.tree.leaves(moved))


def evaluation(score, objective):
    metrics = jax.jit(build_evaluate(objective))
    return lambda params, rows, hyper: metrics(score(params, rows), rows, hyper)


def test_evaluation_is_exact_for_any_batch_size_and_a_ragged_last_batch(
    score, objective, params, pairs, rows, hyper
):
    from dpojax.training.reference import Store

    evaluate = evaluation(score, objective)
    want = evaluate(params, rows, hyper)
    store = Store(pairs)
    store.write(rows, rows.reference)
    batches = [range(0, 4), range(4, 8), range(8, 10)]
    shape = plan(pairs, batches, length=32)
    parts = [evaluate(params, store.attach(collate(pairs, b, shape)), hyper) for b in batches]
    total = jax.tree.map(lambda *xs: sum(xs), *parts)
    assert total["loss"].weight == 10
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5), total, want)


def test_evaluation_reports_the_numbers_of_a_plain_loop(
    model, score, objective, params, reference_params, pairs, rows, hyper
):
    metrics = evaluation(score, objective)(params, rows, hyper)
    policy = np.asarray(separate_sums(model, params, pairs))
    ratio = policy - np.asarray(separate_sums(model, reference_params, pairs))
    mean = lambda name: float(metrics[name].total / metrics[name].weight)
    np.testing.assert_allclose(mean("rewards/chosen"), 0.5 * ratio[:, 0].mean(), atol=1e-5)
    np.testing.assert_allclose(mean("rewards/rejected"), 0.5 * ratio[:, 1].mean(), atol=1e-5)
    assert mean("rewards/accuracies") == pytest.approx((ratio[:, 0] > ratio[:, 1]).mean())
    assert mean("displacement") == pytest.approx((ratio[:, 0] < 0).mean())
    np.testing.assert_allclose(mean("logps/chosen"), policy[:, 0].mean(), atol=1e-5)
    assert metrics["entropy"].weight == (rows.response >= 0).sum()


def test_sft_is_the_token_mean_over_the_whole_batch(model, score, params, pairs):
    single = [e._replace(responses=e.responses[:1]) for e in pairs]
    rows = collate(single, range(10), plan(single, [range(10)], length=32))
    metrics = evaluation(score, sft.objective())(params, rows, {})
    nll = -float(separate_sums(model, params, single).sum())
    tokens = sum(len(e.responses[0]) for e in single)
    assert metrics["loss"].weight == tokens
    np.testing.assert_allclose(metrics["loss"].total / tokens, nll / tokens, atol=1e-5)


def test_sft_on_prompts_too_scores_every_token_but_the_first(model, score, params, pairs):
    single = [e._replace(responses=e.responses[:1]) for e in pairs]
    shape = plan(single, [range(10)], length=32, score_prompt=True)
    rows = collate(single, range(10), shape, score_prompt=True)
    metrics = evaluation(score, sft.objective())(params, rows, {})
    logprobs, mask = separate_logprobs(model, params, single, score_from=1)
    assert metrics["loss"].weight == mask.sum()
    np.testing.assert_allclose(metrics["loss"].total, -logprobs[mask].sum(), rtol=1e-5)


def test_divergence_is_zero_from_itself_and_the_exact_kl_otherwise(
    model, params, reference_params, rows
):
    divergence, hidden = jax.jit(build_divergence(model)), jax.jit(build_hidden(model))
    policy, reference = (
        Distributions(hidden(p, rows), *model.head(p)[:2]) for p in (params, reference_params)
    )
    assert float(divergence(policy, policy, rows).total) == 0
    got = divergence(policy, reference, rows)
    row = jax.tree.map(lambda x: x[0], rows)
    log_p, log_q = (
        np.take_along_axis(
            np.asarray(jax.nn.log_softmax(decoder.logits(model, p, row))), row.source[..., None], 1
        )
        for p in (params, reference_params)
    )
    kl = (np.exp(log_p) * (log_p - log_q)).sum(-1)[row.response >= 0]
    assert got.weight == kl.size
    np.testing.assert_allclose(got.total, kl.sum(), rtol=1e-4)


def test_clipping_is_by_the_norm_of_the_mean_gradient(
    model, objective, params, stepped, rows, hyper
):
    gradient = gradient_of(stepped, params, hyper)
    most = 0.5 * float(optax.tree.norm(gradient))
    mesh = sharding.make_mesh(devices=jax.devices()[:1])
    clip = clip_by_norm(most)
    abstract = abstract_state(params, clip, mesh, RULES)
    state = new_state(jax.tree.map(jnp.copy, params), clip, abstract, seed=0)
    clipped = jax.jit(build_step(language_model(model), objective, clip, one))(state, rows, hyper)
    want, _ = optax.clip_by_global_norm(most).update(gradient, optax.EmptyState())
    assert_close(gradient_of(clipped, params, hyper), want)


DECAYING = optax.chain(optax.scale_by_adam(), optax.add_decayed_weights(0.1))


@pytest.mark.parametrize("optimizer", [sgd(), DECAYING], ids=["plain", "adam with decay"])
def test_updates_that_rounding_swallows_are_counted(
    model, objective, params, rows, hyper, optimizer
):
    lost, step = {}, jax.jit(build_step(language_model(model), objective, optimizer, one))
    for rate in (1e-1, 1e-12):
        state = initial_state(params, optimizer, 0)
        _, report = step(state, rows, hyper | {"learning_rate": jnp.float32(rate)})
        lost[rate] = report.metrics["updates/lost"].value
    assert lost[1e-1] < 0.01
    assert lost[1e-12] > 0.9


def test_off_cpus_a_state_is_selected_and_not_copied_out_of_a_branch():
    def choose(finite, state):
        return updated_if(finite, lambda x: 2 * x, state)

    traced = jax.jit(choose).trace(True, np.ones(3, np.float32))
    for platform, branches in (("cpu", True), ("tpu", False), ("cuda", False)):
        text = traced.lower(lowering_platforms=(platform,)).as_text()
        # A branch reads its predicate as an index. (The platform itself is a constant index.)
        assert ("stablehlo.convert %arg0" in text) == branches
        assert ("stablehlo.select %arg0" in text) != branches


@pytest.mark.parametrize("finite", [True, False])
def test_a_selected_state_is_the_updated_one_or_the_old_one(finite, monkeypatch):
    """Also where the updated one is not finite."""

    def default_platform(*arguments, default, **platforms):
        del platforms
        return default(*arguments)

    monkeypatch.setattr(jax.lax, "platform_dependent", default_platform)
    state = {"a": np.arange(3.0), "b": np.int32(7)}

    def update(state):
        scale = 1.0 if finite else np.nan
        return {"a": jnp.asarray(state["a"]) + scale, "b": state["b"] + 1}

    new = updated_if(jnp.array(finite), update, state)
    np.testing.assert_array_equal(new["a"], [1, 2, 3] if finite else [0, 1, 2])
    assert new["b"] == (8 if finite else 7)
