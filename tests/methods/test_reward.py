"""Reward models' losses on rows, against plain loops."""

import jax.numpy as jnp
import numpy as np
import pytest

from dpojax.methods import reward

from .conftest import example, micro_batch


def softplus(x):
    return np.logaddexp(0, x)


def batch():
    """Three examples, ragged and with a tie; their random scores; what stands where."""
    examples = [
        example(3, 4, scores=(2.0, 0.5)),
        example(2, 1, 5, scores=(3.0, 1.0, 1.0), rank=(0, 1, 1)),
        example(1, 2, scores=(0.3, 0.1)),
    ]
    rows = micro_batch(examples)
    scores = np.random.default_rng(0).normal(size=rows.present.shape).astype(np.float32)
    place = {
        int(rows.example[at]): (at, examples[int(rows.example[at])])
        for at in np.ndindex(rows.example.shape)
        if rows.example[at] >= 0
    }
    return rows, jnp.asarray(scores), place


def test_bradley_terry_sees_every_untied_pair_with_margin_and_centring():
    rows, scores, place = batch()
    hyper = {"margin_scale": jnp.float32(0.5), "centring": jnp.float32(0.01)}
    terms = reward.objective("bradley_terry").terms(scores, rows, hyper)
    want, right = 0.0, 0
    pairs = [(0, 0, 1), (1, 0, 1), (1, 0, 2), (2, 0, 1)]
    for i, a, b in pairs:
        at, found = place[i]
        s = scores[at]
        margin = 0.5 * (found.scores[a] - found.scores[b])
        want += softplus(-(s[a] - s[b] - margin)) + 0.01 * (s[a] + s[b]) ** 2
        right += int(s[a] > s[b])
    assert float(terms.weight.sum()) == len(pairs)
    np.testing.assert_allclose(terms.loss.sum(), want, rtol=1e-5)
    assert float(terms.metrics["rewards/accuracies"].total.sum()) == right
    mean = terms.metrics["rewards/mean"]
    present = np.asarray(scores)[np.asarray(rows.present)]
    np.testing.assert_allclose(mean.total.sum() / mean.weight.sum(), present.mean(), rtol=1e-5)


def test_a_ranking_of_scores_is_chosen_place_by_place():
    rows, scores, place = batch()
    hyper = {"centring": jnp.float32(0.01)}
    terms = reward.objective("plackett_luce_scores").terms(scores, rows, hyper)
    want = 0.0
    for at, found in place.values():
        s = np.asarray(scores[at])
        rank = found.rank or tuple(range(len(found.responses)))
        for k in range(len(rank)):
            rivals = [s[j] for j in range(len(rank)) if rank[j] >= rank[k]]
            want += np.log(np.sum(np.exp(rivals))) - s[k]
        want += 0.01 * s[: len(rank)].sum() ** 2
    assert float(terms.weight.sum()) == 3
    np.testing.assert_allclose(terms.loss.sum(), want, rtol=1e-5)


def test_an_unknown_loss_is_refused():
    with pytest.raises(ValueError, match=r"loss: must be .*, got 'dpo'"):
        reward.objective("dpo")
