"""The reward of each loss: what its loss compares is what accuracy and margin are of."""

import jax.numpy as jnp
import numpy as np
import pytest

from dpojax.methods import preference

from .conftest import GIVEN, by_response, example, micro_batch, with_reference

softplus = lambda x: np.logaddexp(0, x)
PAIR = [example(3, 5)]  # lengths of the chosen and of the rejected response
BETA = 0.2

# Loss: its options, and the loss of a pair as a function of its reward margin alone.
OF_MARGIN = {
    "dpo": ({"beta": BETA}, lambda m: softplus(-m)),
    "dpo_norm": ({"beta": 5.0}, lambda m: softplus(-m)),
    "hinge": ({"beta": BETA}, lambda m: max(0, 1 - m)),
    "ipo": ({"beta": BETA, "length_norm": "sum"}, lambda m: (m / BETA - 1 / (2 * BETA)) ** 2),
    "chipo": ({"beta": BETA, "max_reward": 50.0}, lambda m: softplus(-m)),
    "simpo": ({"beta": 2.0, "gamma": 0.5}, lambda m: softplus(0.5 - m)),
    "alphapo": ({"beta": 2.0, "gamma": 0.5, "alpha": 0.25}, lambda m: softplus(0.5 - m)),
    "tpo_l": ({"beta": 2.0, "gamma": 0.5, "alpha": 0.0}, lambda m: softplus(0.5 - m)),
    "alpha_dpo": ({"beta": 2.0, "gamma": 0.5, "alpha": 0.0}, lambda m: softplus(0.5 - m)),
    "cpo": ({"beta": BETA, "alpha": 0.0}, lambda m: softplus(-m)),
    "slic": ({"margin": 9.0, "alpha": 0.0}, lambda m: max(0, 9 - m)),
    "simper": ({}, lambda m: -m),
    "unlikelihood": ({"alpha": 1.0}, lambda m: -m),
}
AROUND = {
    "ipo, mean": ("ipo", {"beta": BETA, "length_norm": "mean"}, OF_MARGIN["ipo"][1]),
    "forward KL": ("dpo", {"beta": BETA, "divergence": "forward_kl"}, lambda m: softplus(-m)),
    "LD-DPO": (
        "dpo",
        {"beta": BETA, "ld_alpha": 0.5, "ld_weight_reference": True},
        lambda m: softplus(-m),
    ),
    "robust": (
        "robust",
        {"beta": BETA, "label_smoothing": 0.1},
        lambda m: (0.9 * softplus(-m) - 0.1 * softplus(m)) / 0.8,
    ),
}
CASES = {name: (name, *case) for name, case in OF_MARGIN.items()} | AROUND


def terms_of(loss, options, policy, rows):
    resolved = preference.resolve(loss, GIVEN.get(loss, {}) | options)
    return preference.objective(loss, resolved).terms(policy, rows, preference.hyper(resolved))


def mean(metric):
    return float(jnp.sum(metric.total) / jnp.sum(metric.weight))


@pytest.mark.parametrize("case", CASES)
def test_the_loss_of_a_pair_is_a_function_of_the_margin_that_is_reported(case):
    loss, options, of_margin = CASES[case]
    policy, rows = with_reference(micro_batch(PAIR))
    terms = terms_of(loss, options, policy, rows)
    margin = mean(terms.metrics["rewards/margins"])
    assert abs(margin) > 1e-3
    np.testing.assert_allclose(terms.loss.sum(), of_margin(margin), rtol=1e-5, atol=1e-6)
    assert mean(terms.metrics["rewards/accuracies"]) == (margin > 0)


def test_orpos_reward_is_the_log_odds_of_the_likelihood_per_token():
    policy, rows = with_reference(micro_batch(PAIR))
    policy = policy._replace(logprob=-jnp.abs(policy.logprob))  # a likelihood is at most 1
    metrics = terms_of("orpo", {"beta": BETA}, policy, rows).metrics
    tokens = by_response(policy.logprob, rows)
    for place, name in enumerate(("chosen", "rejected")):
        likelihood = np.exp(np.mean(tokens[0, place]))
        want = np.log(likelihood / (1 - likelihood))
        np.testing.assert_allclose(mean(metrics[f"rewards/{name}"]), want, rtol=1e-4)


@pytest.mark.parametrize(
    "loss", ["simpo", "alphapo", "tpo_l", "alpha_dpo", "cpo", "orpo", "slic", "simper", "sft"]
)
def test_a_reward_without_a_reference_is_the_same_beside_one(loss):
    """The summary and the evaluations see rows with and without the reference's log-probs."""
    policy, rows = with_reference(micro_batch([example(3, 5), example(4, 2)]))
    beside = terms_of(loss, {}, policy, rows).metrics
    metrics = beside
    if loss != "alpha_dpo":  # its target margin needs the reference
        metrics = terms_of(loss, {}, policy, rows._replace(reference=None)).metrics
        compared = {"displacement", "log_ratio/chosen", "log_ratio/rejected"}
        assert beside.keys() - metrics.keys() == compared
    other = rows._replace(reference=rows.reference - 1.5)
    for rewards in (metrics, terms_of(loss, {}, policy, other).metrics):
        for name in ("chosen", "rejected", "margins", "accuracies"):
            assert mean(rewards[f"rewards/{name}"]) == mean(beside[f"rewards/{name}"])


def test_the_rewards_of_a_mixture_are_those_of_its_first_loss_but_sft():
    policy, rows = with_reference(micro_batch(PAIR))
    of = lambda loss, **options: terms_of(loss, options, policy, rows).metrics["rewards/margins"]
    mixed = of("sft+simpo", beta=2.0, gamma=0.5, nll_norm="mean", weights=(1.0, 1.0))
    assert mean(mixed) == mean(of("simpo", beta=2.0, gamma=0.5))


@pytest.mark.parametrize(
    ("loss", "has_accuracy"), [("kto", True), ("npo", True), ("simnpo", False)]
)
def test_a_labelled_reward_without_a_reference_has_no_sign_to_be_right_about(loss, has_accuracy):
    examples = [example(3, 4, label=True), example(2, 2, label=False)]
    policy, rows = with_reference(micro_batch(examples))
    metrics = terms_of(loss, {}, policy, rows).metrics
    assert ("rewards/accuracies" in metrics) == has_accuracy
    total = sum(by_response(policy.logprob, rows)[0, 0])
    if loss == "simnpo":  # beta times the log-prob per token, of 3 tokens
        np.testing.assert_allclose(mean(metrics["rewards/chosen"]), 2.5 * total / 3, rtol=1e-5)
