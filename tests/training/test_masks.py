"""Responses with turns of others: what the loss, the rows and the reference make of them."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dpojax import losses
from dpojax.data.packing import plan
from dpojax.data.pipeline import fixed_batches, in_order
from dpojax.data.rows import collate
from dpojax.losses import Pair
from dpojax.methods import sft
from dpojax.models import decoder
from dpojax.models.attention import plain_rows
from dpojax.training.reference import Store, compute, key_of
from dpojax.training.step import build_evaluate

WIDTH = 32


def mask_of(response, seed):
    """At least one token is scored."""
    mask = np.random.default_rng(seed).random(len(response)) < 0.6
    mask[seed % len(response)] = True
    return mask


@pytest.fixture(scope="module")
def masked(pairs):
    return [
        e._replace(scored=tuple(mask_of(y, 7 * i + k) for k, y in enumerate(e.responses)))
        for i, e in enumerate(pairs)
    ]


@partial(jax.jit, static_argnums=0)
def full_logprobs(model, params, tokens):
    every = jax.nn.log_softmax(decoder.logits(model, params, plain_rows(tokens)))[:, :-1]
    return jnp.take_along_axis(every, tokens[:, 1:, None], axis=-1)[..., 0]


def separate_sums(model, params, examples):
    """Sum of the scored tokens' log-probs, [examples, K]: each response in a row of its own."""
    whole = np.zeros((len(examples), 2, WIDTH), np.int32)
    weight = np.zeros((len(examples), 2, WIDTH - 1), np.float32)
    for i, e in enumerate(examples):
        for k, (response, mask) in enumerate(zip(e.responses, e.scored)):
            both = np.concatenate([e.prompt, response])
            whole[i, k, : len(both)] = both
            weight[i, k, len(e.prompt) - 1 : len(both) - 1] = mask
    logprobs = full_logprobs(model, params, jnp.asarray(whole).reshape(-1, WIDTH))
    return np.asarray((logprobs.reshape(weight.shape) * weight).sum(-1)), weight


@pytest.mark.slow
def test_packed_rows_with_masks_equal_separate_sequences_with_masks(
    model, score, objective, params, reference_params, masked, hyper
):
    policy, weight = separate_sums(model, params, masked)
    reference, _ = separate_sums(model, reference_params, masked)
    pairs_of = lambda sums: Pair(jnp.asarray(sums[:, 0]), jnp.asarray(sums[:, 1]))
    want = losses.dpo(pairs_of(policy), pairs_of(reference), beta=0.5, label_smoothing=0.1)
    rows = collate(masked, range(10), plan(masked, [range(10)], length=WIDTH))
    rows = rows._replace(reference=np.asarray(score(reference_params, rows).logprob))
    evaluate = jax.jit(build_evaluate(objective))
    got = evaluate(score(params, rows), rows, hyper)
    np.testing.assert_allclose(got["loss"].total / got["loss"].weight, want.mean(), atol=1e-5)
    assert got["entropy"].weight == weight.sum()

    single = [e._replace(responses=e.responses[:1], scored=e.scored[:1]) for e in masked]
    rows = collate(single, range(10), plan(single, [range(10)], length=WIDTH))
    got = jax.jit(build_evaluate(sft.objective()))(score(params, rows), rows, {})
    assert got["loss"].weight == weight[:, 0].sum()
    np.testing.assert_allclose(got["loss"].total, -policy[:, 0].sum(), rtol=1e-5)


def test_the_log_prob_of_a_masked_token_does_not_change_the_loss(
    score, objective, params, pairs, hyper
):
    """A token that is masked, and that no scored token sees, may be any other token."""
    mask = lambda y: np.arange(len(y)) < max(1, len(y) // 2)
    early = [e._replace(scored=tuple(map(mask, e.responses))) for e in pairs]
    # The last tokens are masked, so no scored token sees them: other tokens there, the same loss.
    other = [
        e._replace(
            responses=tuple(np.where(m, y, (y + 1) % 32) for y, m in zip(e.responses, e.scored))
        )
        for e in early
    ]
    found = []
    evaluate = jax.jit(build_evaluate(objective))
    for data in (early, other):
        rows = collate(data, range(10), plan(data, [range(10)], length=WIDTH))
        rows = rows._replace(reference=np.full(rows.target.shape, -2.0, np.float32))
        found.append(evaluate(score(params, rows), rows, hyper)["loss"].total)
    np.testing.assert_allclose(found[0], found[1], rtol=1e-6)
    assert any((a.responses[0] != b.responses[0]).any() for a, b in zip(early, other))


def test_a_cached_reference_of_masked_examples_equals_the_live_one(score, params, masked):
    score_rows = lambda rows: score(params, rows).logprob
    order = in_order(range(10), 4)
    shape = plan(masked, [*order, range(10)], length=WIDTH, multiple=8)
    store = compute(score_rows, masked, fixed_batches(masked, order, shape))
    assert len(store.values) == sum(mask.sum() for e in masked for mask in e.scored)
    rows = collate(masked, range(10), shape)
    live = np.where(rows.response >= 0, np.asarray(score_rows(rows)), 0)
    np.testing.assert_allclose(store.attach(rows).reference, live, atol=1e-5)


def test_a_stores_name_depends_on_the_masks(pairs, masked):
    names = {
        key_of("weights", examples, dtype="float32", tokenizer="words", model="llama")
        for examples in (pairs, masked, masked[:5] + pairs[5:])
    }
    assert len(names) == 3
    assert Store(pairs).starts[-1] == sum(len(y) for e in pairs for y in e.responses)
