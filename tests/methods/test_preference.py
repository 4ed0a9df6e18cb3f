"""What the methods make of rows: pairs of ranked responses, masks, and values at the reference."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dpojax.data.rows import collate, plan
from dpojax.data.tokenise import Example
from dpojax.methods import dpo

HYPER = {"beta": jnp.float32(0.2), "label_smoothing": jnp.float32(0.0)}


def example(*lengths):
    ids = lambda n: np.arange(1, n + 1, dtype=np.int32)
    return Example("file:1", ids(2), tuple(map(ids, lengths)), (False,) * len(lengths), None)


def micro_batch(examples):
    indices = range(len(examples))
    rows = collate(examples, indices, plan(examples, [indices], length=64))
    return jax.tree.map(lambda x: x[0], rows)


def with_reference(rows, seed=0):
    rng = np.random.default_rng(seed)
    draw = lambda: jnp.asarray(rng.normal(-2, 1, rows.target.shape), jnp.float32)
    return draw(), rows._replace(reference=draw())


def by_response(values, rows):
    """{(example, rank): sum} by a plain loop."""
    sums = {}
    for place in zip(*np.nonzero(rows.response >= 0)):
        slot, rank = divmod(int(rows.response[place]), rows.present.shape[-1])
        key = int(rows.example[place[0], slot]), rank
        sums[key] = sums.get(key, 0.0) + float(values[place])
    return sums


def test_three_ranked_responses_are_three_pairs_and_ragged_ones_fewer():
    rows = micro_batch([example(3, 4, 2), example(1, 5)])
    policy, rows = with_reference(rows)
    terms = dpo.objective("dpo").terms(policy, rows, HYPER)
    p, r = by_response(policy, rows), by_response(rows.reference, rows)
    margin = lambda i, a, b: 0.2 * ((p[i, a] - r[i, a]) - (p[i, b] - r[i, b]))
    pairs = [(0, 0, 1), (0, 0, 2), (0, 1, 2), (1, 0, 1)]
    assert float(terms.weight.sum()) == 4
    want = sum(np.log1p(np.exp(-margin(*pair))) for pair in pairs)
    np.testing.assert_allclose(terms.loss.sum(), want, rtol=1e-5)
    accuracy = terms.metrics["rewards/accuracies"]
    assert float(jnp.sum(accuracy.total)) == sum(margin(*pair) > 0 for pair in pairs)


BETA, SMOOTHING = 0.2, 0.1
AT_REFERENCE = {
    "dpo": np.log(2),
    "dpo_norm": np.log(2),
    "robust": np.log(2),
    "exo": 0.5 * np.log(0.5 / (1 - SMOOTHING)) + 0.5 * np.log(0.5 / SMOOTHING),
    "ipo": (1 / (2 * BETA)) ** 2,
    "hinge": 1.0,
    "nca": 2 * np.log(2),
    "sppo": 2 * (1 / (2 * BETA)) ** 2,
    "apo_zero": 1.0,
    "apo_down": 1.0,
}


def make(loss):
    return dpo.objective(loss, length_norm="sum" if loss == "ipo" else None)


@pytest.mark.parametrize("loss", dpo.LOSSES)
def test_at_the_reference_the_loss_has_its_closed_form(loss):
    hyper = HYPER | {"label_smoothing": jnp.float32(SMOOTHING)}
    _, rows = with_reference(micro_batch([example(3, 4), example(2, 2)]))
    terms = make(loss).terms(rows.reference, rows, hyper)
    want = AT_REFERENCE[loss]
    np.testing.assert_allclose(make(loss).at_reference(hyper), want, rtol=1e-6)
    np.testing.assert_allclose(terms.loss.sum() / terms.weight.sum(), want, rtol=1e-6)
    assert float(jnp.sum(terms.metrics["kl/per_token"].total)) == 0


@pytest.mark.parametrize("loss", dpo.LOSSES)
def test_every_loss_falls_along_its_own_gradient_and_leaves_padding_alone(loss):
    hyper = HYPER | {"label_smoothing": jnp.float32(SMOOTHING)}
    policy, rows = with_reference(micro_batch([example(3, 4, 2), example(1, 5)]))
    total = jax.jit(lambda policy: make(loss).terms(policy, rows, hyper).loss.sum())
    gradient = jax.grad(total)(policy)
    assert np.isfinite(gradient).all()
    assert not np.any(np.asarray(gradient)[rows.response < 0])
    assert total(policy - 1e-2 * gradient) < total(policy)


def test_the_kl_estimate_is_the_mean_log_ratio_of_reference_to_policy():
    policy, rows = with_reference(micro_batch([example(3, 4), example(2, 2)]))
    kl = dpo.objective("dpo").terms(policy, rows, HYPER).metrics["kl/per_token"]
    scored = rows.response >= 0
    want = (np.asarray(rows.reference) - np.asarray(policy))[scored].mean()
    np.testing.assert_allclose(jnp.sum(kl.total) / jnp.sum(kl.weight), want, rtol=1e-5)


def test_ipo_by_mean_divides_each_response_by_its_own_length():
    policy, rows = with_reference(micro_batch([example(3, 6)]))
    p, r = by_response(policy, rows), by_response(rows.reference, rows)
    h = (p[0, 0] - r[0, 0]) / 3 - (p[0, 1] - r[0, 1]) / 6
    terms = dpo.objective("ipo", length_norm="mean").terms(policy, rows, HYPER)
    np.testing.assert_allclose(terms.loss.sum(), (h - 1 / 0.4) ** 2, rtol=1e-5)


def test_padding_counts_for_nothing_even_when_it_is_nan():
    policy, rows = with_reference(micro_batch([example(3, 4), example(2, 2)]))
    padding = rows.response < 0
    assert padding.any()
    clean = dpo.objective("dpo").terms(policy, rows, HYPER)
    dirty = dpo.objective("dpo").terms(jnp.where(padding, jnp.nan, policy), rows, HYPER)
    jax.tree.map(np.testing.assert_array_equal, clean, dirty)


def test_unknown_losses_and_a_missing_length_norm_are_refused():
    with pytest.raises(ValueError, match=r"dpo, .*; got 'dppo'"):
        dpo.objective("dppo")
    with pytest.raises(ValueError, match="'sum' or 'mean'"):
        dpo.objective("ipo")
