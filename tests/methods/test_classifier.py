"""The classifier's loss on packed rows, against a plain loop over texts."""

import numpy as np
import pytest

from dpojax.methods import classifier

from .conftest import example, micro_batch


@pytest.mark.parametrize("first_token", [0, 3])
def test_a_text_costs_the_mean_over_its_beginnings_and_counts_as_its_end_says(first_token):
    examples = [example(4, category=2), example(1, category=0), example(6, category=1)]
    rows = micro_batch(examples)
    logits = np.random.default_rng(0).normal(size=(*rows.tokens.shape, 3)).astype(np.float32)
    terms = classifier.objective(first_token).terms(logits, rows, {})
    want, ends, right = 0.0, 0.0, 0
    for row, slot in np.ndindex(rows.example.shape):
        if rows.example[row, slot] < 0:
            continue
        category = examples[rows.example[row, slot]].category
        own = logits[row][rows.segment[row] == slot + 1]
        costs = np.log(np.exp(own).sum(-1)) - own[:, category]
        want += costs[first_token - 1 :].mean() if first_token else costs[-1]
        ends += costs[-1]
        right += int(own[-1].argmax() == category)
    assert float(terms.weight.sum()) == 3
    np.testing.assert_allclose(terms.loss.sum(), want, rtol=1e-5)
    accuracy, entropy = terms.metrics["accuracy"], terms.metrics["cross_entropy"]
    assert (int(accuracy.total.sum()), int(accuracy.weight.sum())) == (right, 3)
    np.testing.assert_allclose(entropy.total.sum(), ends, rtol=1e-5)
