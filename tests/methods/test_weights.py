"""An example of weight 2 counts as two equal examples, and one of weight 0 as none."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dpojax.logprobs import TokenStatistics
from dpojax.losses import RunningMean
from dpojax.methods import classifier, preference, reward, sft
from dpojax.training.objective import summed_metrics
from dpojax.training.responses import response_sums

from .conftest import GIVEN, example, micro_batch

LOSSES = [*preference.LOSSES, "dpo+bco+sft"]
WEIGHED = [loss for loss in LOSSES if preference.loss_requirements(loss).weights]
# Names of examples with their weights, and as copies: both count the same.
SAME = [({"a": 0, "b": 2, "c": 1}, ["b", "b", "c"])]
# One of each kind of view and argument; the others are as long to compile and say no more.
KINDS = ("dpo", "dpo_ties", "kto", "bco_unpaired", "plackett_luce", "sft", "dpo+bco+sft")


def pairs(name):
    return {"a": example(3, 4), "b": example(2, 5, 1, rank=(0, 1, 1)), "c": example(4, 2)}[name]


def labelled(name):
    good = name != "b"
    return {"a": example(3, 4), "b": example(2, 2), "c": example(1, 5)}[name]._replace(label=good)


def batch_of(names, example_of):
    """Rows of the named examples, and statistics that depend on the example and place alone."""
    weights = names.items() if isinstance(names, dict) else [(name, 1) for name in names]
    examples = [example_of(name)._replace(weight=weight) for name, weight in weights]
    rows = micro_batch(examples)
    drawn = np.zeros((4, *rows.target.shape), np.float32)
    sources = {}
    for place in zip(*np.nonzero(rows.response >= 0)):
        slot, response = divmod(int(rows.response[place]), rows.present.shape[-1])
        index = int(rows.example[place[0], slot])
        name = list(weights)[index][0]
        key = (index, response)
        sources.setdefault(key, np.random.default_rng([ord(name), response]))
        drawn[(slice(None), *place)] = sources[key].normal(-2, 1, 4)
    policy, reference, collision, kl = drawn
    tokens = TokenStatistics(policy, log_collision=collision, kl=np.abs(kl))
    return jax.tree.map(jnp.asarray, tokens), rows._replace(reference=jnp.asarray(reference))


def totals(terms):
    return summed_metrics(terms.metrics) | {
        "loss": terms.loss.sum(),
        "weight": terms.weight.sum(),
    }


def require_equal(terms, other):
    one, two = totals(terms), totals(other)
    assert one.keys() == two.keys()
    for name in one:
        np.testing.assert_allclose(one[name], two[name], rtol=2e-5, atol=2e-5, err_msg=name)


@pytest.mark.parametrize(
    "loss",
    [pytest.param(x, marks=() if x in KINDS else pytest.mark.long) for x in WEIGHED],
)
def test_a_preference_of_weight_two_is_two_equal_preferences(loss):
    options = preference.resolve(loss, GIVEN.get(loss, {}))
    objective, hyper = preference.objective(loss, options), preference.hyper(options)
    form = preference.loss_requirements(loss).form
    for weighted, repeated in SAME:
        example_of = labelled if form == "labelled" else pairs
        batches = [batch_of(names, example_of) for names in (weighted, repeated)]
        terms = []
        for tokens, rows in batches:
            own = hyper
            if objective.baseline is not None:
                start = RunningMean(jnp.float32(0.5), jnp.float32(4))
                mean = objective.baseline(start, tokens, rows, hyper)
                own = hyper | {"delta": mean.mean}
            terms.append(objective.terms(tokens, rows, own))
        require_equal(*terms)
        assert float(jnp.abs(terms[0].loss).sum()) > 0


def test_losses_that_sort_the_batch_cannot_weigh_an_example():
    assert set(LOSSES) - set(WEIGHED) == {"aot", "aot_unpaired"}


def test_a_text_of_weight_two_is_two_equal_texts():
    for weighted, repeated in SAME:
        batches = [batch_of(names, pairs) for names in (weighted, repeated)]
        require_equal(*(sft.objective().terms(*batch, {}) for batch in batches))


@pytest.mark.parametrize("loss", reward.LOSSES)
def test_a_reward_model_counts_weights_as_copies(loss):
    hyper = {"margin_scale": jnp.float32(0.5), "centring": jnp.float32(0.01)}
    for weighted, repeated in SAME:
        terms = []
        for names in (weighted, repeated):
            tokens, rows = batch_of(names, pairs)
            scores = response_sums(tokens.logprob, rows)
            terms.append(reward.objective(loss).terms(scores, rows, hyper))
        require_equal(*terms)


def test_a_classifier_counts_weights_as_copies():
    category = {"a": 0, "b": 1, "c": 1}

    def text(name):
        return pairs(name)._replace(
            responses=pairs(name).responses[:1], cut=(False,), rank=None, category=category[name]
        )

    for weighted, repeated in SAME:
        terms = []
        for names in (weighted, repeated):
            _, rows = batch_of(names, text)
            label = (
                rows.positions[..., None] * jnp.array([[[0.1, -0.2]]]) + rows.tokens[..., None] / 7
            )
            terms.append(classifier.objective().terms(label, rows, {}))
        require_equal(*terms)
