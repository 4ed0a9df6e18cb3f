"""Humanline around losses in the step: every token's log-ratio is clamped, and nothing else."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dpojax.methods import preference

from .conftest import GIVEN, by_response, example, micro_batch, with_reference

BETA, LOW, HIGH = 0.3, -0.8, 0.6
PAIRS = [example(3, 4), example(1, 5), example(4, 2)]
SINGLES = [example(3, 2, label=True), example(5, 3, label=False), example(1, 5, label=True)]


def terms_of(loss, policy, rows, **given):
    """The objective's terms; the bounds are open where none are given."""
    options = preference.resolve(loss, GIVEN.get(loss, {}) | given)
    terms = jax.jit(preference.objective(loss, options).terms)
    return terms(policy, rows, preference.hyper(options))


def clamped_ratios(policy, rows):
    """{(example, index of the response): sum of its tokens' clamped log-ratios}."""
    ratios = by_response(policy.logprob - rows.reference, rows)
    return {key: np.clip(tokens, LOW, HIGH).sum() for key, tokens in ratios.items()}


def test_a_pair_loss_sees_the_sum_of_clamped_log_ratios():
    policy, rows = with_reference(micro_batch(PAIRS))
    d = clamped_ratios(policy, rows)
    want = sum(np.logaddexp(0, -BETA * (d[i, 0] - d[i, 1])) for i in range(3))
    terms = terms_of("dpo", policy, rows, beta=BETA, humanline_low=LOW, humanline_high=HIGH)
    np.testing.assert_allclose(terms.loss.sum(), want, rtol=1e-5)


def test_kto_and_its_baseline_see_the_sum_of_clamped_log_ratios():
    policy, rows = with_reference(micro_batch(SINGLES))
    policy = policy._replace(logprob=policy.logprob + 1.0)
    d = clamped_ratios(policy, rows)
    kl = np.mean([d[i, 1] for i in range(3)])
    assert kl > 0
    gains = [BETA * (d[i, 0] - kl) * (1 if label else -1) for i, label in enumerate((1, 0, 1))]
    want = sum(1 / (1 + np.exp(gain)) for gain in gains)
    terms = terms_of("kto", policy, rows, beta=BETA, humanline_low=LOW, humanline_high=HIGH)
    np.testing.assert_allclose(terms.loss.sum(), want, rtol=1e-5)


@pytest.mark.parametrize("loss", ["dpo", "kto", "plackett_luce"])
def test_bounds_that_no_token_reaches_change_nothing(loss):
    labelled = preference.loss_requirements(loss).form == "labelled"
    policy, rows = with_reference(micro_batch(SINGLES if labelled else PAIRS))
    wide = terms_of(loss, policy, rows, humanline_low=-100.0, humanline_high=100.0)
    plain = terms_of(loss, policy, rows)
    np.testing.assert_allclose(wide.loss, plain.loss, rtol=1e-4, atol=1e-6)
    for name, metric in plain.metrics.items():
        np.testing.assert_allclose(wide.metrics[name].total, metric.total, rtol=1e-4, atol=1e-4)


def test_a_token_beyond_its_bound_gets_no_gradient_and_metrics_are_the_policys_own():
    policy, rows = with_reference(micro_batch(PAIRS))
    given = dict(beta=BETA, humanline_low=LOW, humanline_high=HIGH)

    def total(logprob):
        return terms_of("dpo", policy._replace(logprob=logprob), rows, **given).loss.sum()

    slope = np.asarray(jax.jit(jax.grad(total))(policy.logprob))
    ratio, scored = np.asarray(policy.logprob - rows.reference), np.asarray(rows.response >= 0)
    beyond = (ratio < LOW) | (ratio > HIGH)
    assert (slope[scored & beyond] == 0).all()
    assert (slope[scored & ~beyond] != 0).all()
    clamped = terms_of("dpo", policy, rows, **given).metrics["rewards/margins"].total
    plain = terms_of("dpo", policy, rows, beta=BETA).metrics["rewards/margins"].total
    np.testing.assert_allclose(jnp.sum(clamped), jnp.sum(plain), rtol=1e-5)


@pytest.mark.parametrize(
    ("loss", "given", "message"),
    [
        ("simper", {"humanline_low": -1.0, "humanline_high": 1.5}, "simper has no reference"),
        ("dpo", {"humanline_low": -1.0}, "humanline_high: dpo needs it"),
        ("kto", {"humanline_high": 1.5}, "humanline_high: means nothing without humanline_low"),
        ("dpo", {"humanline_low": 1.0, "humanline_high": 1.5}, "humanline_low: must be less"),
        ("simpo", {"sync_every": 1}, "sync_every: simpo has no reference"),
        ("dpo", {"sync_every": 0}, "sync_every: must be 1 or more"),
        ("tdpo", {"sync_every": 1}, "sync_every: tdpo reads all of a reference that stays"),
        ("kto", {"ld_alpha": 0.5}, "ld_alpha: kto has no such option"),
    ],
)
def test_bounds_that_mean_nothing_are_refused(loss, given, message):
    with pytest.raises(ValueError, match=message):
        preference.resolve(loss, given)
