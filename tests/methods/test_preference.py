"""What the preference losses make of rows: pairs, rankings, labels, ties, weights, baselines."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dpojax.losses import RunningMean
from dpojax.methods import preference
from dpojax.methods.preference.options import LOSS_TABLE, Loss

from .conftest import GIVEN, by_response, example, micro_batch, with_reference

BETA, SMOOTHING = 0.2, 0.1


def make(loss, **given):
    """The objective, and its traced numbers."""
    options = preference.resolve(loss, GIVEN.get(loss, {}) | given)
    return preference.objective(loss, options), preference.hyper(options)


def value(terms):
    return float(terms.loss.sum() / terms.weight.sum())


def softplus(x):
    return np.logaddexp(0, x)


def sums(values, rows):
    return {key: sum(found) for key, found in by_response(values, rows).items()}


def ratios(policy, rows):
    p, r = sums(policy.logprob, rows), sums(rows.reference, rows)
    return {key: p[key] - r[key] for key in p}


PAIRS = [example(3, 4), example(2, 6), example(5, 1)]


def pairs_of(examples=PAIRS):
    return with_reference(micro_batch(examples))


def test_three_ranked_responses_are_three_pairs_and_ragged_ones_fewer():
    policy, rows = pairs_of([example(3, 4, 2), example(1, 5)])
    objective, hyper = make("dpo", beta=BETA)
    terms = objective.terms(policy, rows, hyper)
    d = ratios(policy, rows)
    pairs = [(0, 0, 1), (0, 0, 2), (0, 1, 2), (1, 0, 1)]
    margins = [BETA * (d[i, a] - d[i, b]) for i, a, b in pairs]
    assert float(terms.weight.sum()) == 4
    np.testing.assert_allclose(terms.loss.sum(), sum(softplus(-m) for m in margins), rtol=1e-5)
    accuracy = terms.metrics["rewards/accuracies"]
    assert float(jnp.sum(accuracy.total)) == sum(m > 0 for m in margins)


def test_tied_responses_make_no_pair_but_for_the_loss_of_ties():
    policy, rows = pairs_of([example(3, 4, 2, rank=(0, 0, 2))])
    d = ratios(policy, rows)
    margin = lambda a, b: BETA * (d[0, a] - d[0, b])
    objective, hyper = make("dpo", beta=BETA)
    terms = objective.terms(policy, rows, hyper)
    assert float(terms.weight.sum()) == 2
    want = softplus(-margin(0, 2)) + softplus(-margin(1, 2))
    np.testing.assert_allclose(terms.loss.sum(), want, rtol=1e-5)
    objective, hyper = make("dpo_ties", beta=BETA, threshold=1.0)
    terms = objective.terms(policy, rows, hyper)
    assert float(terms.weight.sum()) == 3
    tie = softplus(1 - margin(0, 1)) + softplus(1 + margin(0, 1)) - np.log(np.exp(2.0) - 1)
    wins = softplus(1 - margin(0, 2)) + softplus(1 - margin(1, 2))
    np.testing.assert_allclose(terms.loss.sum(), tie + wins, rtol=1e-5)


AT_REFERENCE = {
    "dpo": np.log(2),
    "dpo_norm": np.log(2),
    "robust": np.log(2),
    "exo": 0.5 * np.log(0.5 / (1 - SMOOTHING)) + 0.5 * np.log(0.5 / SMOOTHING),
    "ipo": (1 / (2 * BETA)) ** 2,
    "hinge": 1.0,
    "discopop": 0.5 * np.log(2) + 0.5,
    "nca": 2 * np.log(2),
    "bco": 2 * np.log(2),
    "sppo": 2 * (1 / (2 * BETA)) ** 2,
    "apo_zero": 1.0,
    "apo_down": 1.0,
    "dpop": np.log(2),
    "gpo": 1.0,  # the exponential one
    "chipo": np.log(2),
    "epsilon_dpo": np.log(2),
    "aot": np.log(2),
    "aot_unpaired": np.log(2),
}


@pytest.mark.parametrize("loss", AT_REFERENCE)
def test_at_the_reference_the_loss_has_its_closed_form(loss):
    given = {"beta": BETA}
    if loss in ("dpo", "dpo_norm", "robust", "exo", "aot", "aot_unpaired"):
        given["label_smoothing"] = SMOOTHING
    objective, hyper = make(loss, **given)
    policy, rows = pairs_of()
    terms = objective.terms(policy._replace(logprob=rows.reference), rows, hyper)
    np.testing.assert_allclose(objective.at_reference(hyper), AT_REFERENCE[loss], rtol=1e-6)
    np.testing.assert_allclose(value(terms), AT_REFERENCE[loss], rtol=1e-6)
    for name in ("rewards/margins", "log_ratio/chosen", "log_ratio/rejected"):
        assert float(jnp.sum(terms.metrics[name].total)) == 0


def test_where_data_or_policy_decide_no_closed_form_is_claimed():
    closed = {x for x in preference.LOSSES if make(x)[0].at_reference is not None}
    assert closed == {*AT_REFERENCE, "tdpo"}
    assert make("dpo", wpo="plain")[0].at_reference is None
    assert make("dpo+simpo", beta=BETA, weights=(1.0, 1.0))[0].at_reference is None
    objective, hyper = make("dpo", divergence="js", beta=BETA)
    np.testing.assert_allclose(objective.at_reference(hyper), np.log(2), rtol=1e-6)


def test_beta_dpo_learns_the_mean_gap_and_is_dpo_while_it_has_no_memory():
    """Without momentum the running mean is the batch's own, so beta does not move."""
    policy, rows = pairs_of()
    objective, hyper = make("beta_dpo", beta=BETA, alpha=0.6, momentum=0.0)
    start = RunningMean(jnp.zeros(()), jnp.zeros(()))
    learnt = objective.baseline(start, policy, rows, hyper)
    forgetful = objective.terms(policy, rows, hyper | {"delta": learnt.mean})
    dpo, hyper = make("dpo", beta=BETA)
    np.testing.assert_allclose(forgetful.loss, dpo.terms(policy, rows, hyper).loss, rtol=1e-5)

    objective, hyper = make("beta_dpo", beta=BETA, alpha=0.6)
    slow = objective.baseline(start, policy, rows, hyper)
    np.testing.assert_allclose(slow.mean, 0.1 * learnt.mean, rtol=1e-5)
    used = max(BETA * (1 + 0.6 * float(learnt.mean - slow.mean)), 1e-3)
    dpo, dpo_hyper = make("dpo", beta=used)
    got = objective.terms(policy, rows, hyper | {"delta": slow.mean})
    np.testing.assert_allclose(got.loss, dpo.terms(policy, rows, dpo_hyper).loss, rtol=1e-5)


def test_epsilon_dpo_steps_by_pair_and_moves_beta_from_the_next_batch_on():
    policy, rows = pairs_of()
    d, epsilon = ratios(policy, rows), 0.25
    gap = lambda tokens: np.array(
        [sums(tokens, rows)[i, 0] - sums(tokens, rows)[i, 1] for i in range(3)]
    )
    towards, middle, away = map(
        gap, (policy.perturbed.towards, policy.logprob, policy.perturbed.away)
    )
    steps = 1 * ((towards < middle) & (middle < away)) - 1 * ((towards > middle) & (middle > away))
    assert set(steps) >= {0, 1} or set(steps) >= {0, -1}
    margins = np.array([d[i, 0] - d[i, 1] for i in range(3)])
    objective, hyper = make("epsilon_dpo", beta=BETA, epsilon=epsilon)
    baseline, beta = RunningMean(jnp.zeros(()), jnp.zeros(())), BETA
    for _ in range(3):
        baseline = objective.baseline(baseline, policy, rows, hyper)
        got = objective.terms(policy, rows, hyper | {"delta": baseline.mean})
        want = softplus(-beta / (1 + epsilon * steps) * margins).sum()
        np.testing.assert_allclose(got.loss.sum(), want, rtol=1e-5)
        beta /= 1 + epsilon * steps.mean()
    evaluated = objective.terms(
        policy._replace(perturbed=None), rows, hyper | {"delta": baseline.mean}
    )
    np.testing.assert_allclose(evaluated.loss.sum(), softplus(-beta * margins).sum(), rtol=1e-5)


def test_two_losses_with_a_mean_over_batches_do_not_mix():
    with pytest.raises(ValueError, match="only one mean over batches"):
        make("bco+beta_dpo", alpha=0.6, beta=BETA, weights=(1.0, 1.0))


ALL = [*preference.LOSSES, "dpo+bco+sft"]


@pytest.mark.parametrize("loss", ALL)
def test_padding_counts_for_nothing_even_when_it_is_nan(loss):
    objective, hyper = make(loss)
    labelled = preference.loss_requirements(loss).form == "labelled"
    examples = [example(3, 4, label=True), example(2, 2, label=False)] if labelled else PAIRS
    policy, rows = pairs_of(examples)
    padding = rows.response < 0
    assert padding.any()
    clean = objective.terms(policy, rows, hyper)
    dirty = jax.tree.map(lambda x: jnp.where(padding, jnp.nan, x), policy)
    jax.tree.map(np.testing.assert_array_equal, clean, objective.terms(dirty, rows, hyper))
    assert np.isfinite(clean.loss).all()


def test_the_log_ratio_is_what_the_policy_gives_a_response_beyond_its_reference():
    policy, rows = pairs_of()
    objective, hyper = make("dpo")
    metrics = objective.terms(policy, rows, hyper).metrics
    d = ratios(policy, rows)
    for place, name in enumerate(("chosen", "rejected")):
        metric = metrics[f"log_ratio/{name}"]
        want = np.mean([value for (_, index), value in d.items() if index == place])
        np.testing.assert_allclose(jnp.sum(metric.total) / jnp.sum(metric.weight), want, rtol=1e-5)


def test_length_norms_divide_each_response_by_its_own_tokens():
    policy, rows = pairs_of([example(3, 6)])
    d = ratios(policy, rows)
    objective, hyper = make("ipo", length_norm="mean", beta=BETA)
    h = d[0, 0] / 3 - d[0, 1] / 6
    terms = objective.terms(policy, rows, hyper)
    np.testing.assert_allclose(terms.loss.sum(), (h - 1 / (2 * BETA)) ** 2, rtol=1e-5)
    objective, hyper = make("simpo", beta=2.0, gamma=0.3)
    p = sums(policy.logprob, rows)
    want = softplus(-(2.0 * (p[0, 0] / 3 - p[0, 1] / 6) - 0.3))
    rows = rows._replace(reference=None)
    terms = objective.terms(policy, rows, hyper)
    np.testing.assert_allclose(terms.loss.sum(), want, rtol=1e-5)
    assert "displacement" not in terms.metrics


def test_only_the_best_of_several_responses_is_imitated():
    policy, rows = pairs_of([example(3, 4, 2)])
    objective, hyper = make("sft", nll_norm="sum")
    gradient = jax.grad(lambda p: objective.terms(p, rows, hyper).loss.sum())(policy).logprob
    found = by_response(gradient, rows)
    assert all(g == -1 for g in found[0, 0])
    assert not any(found[0, 1] + found[0, 2])


def test_imitation_is_the_mean_over_prompts_and_needs_no_response_but_the_best():
    policy, rows = pairs_of([example(3, 4, 2), example(2, 6, rank=(0, 0)), example(5)])
    objective, hyper = make("sft", nll_norm="mean")
    terms = objective.terms(policy, rows, hyper)
    p = sums(policy.logprob, rows)
    assert value(terms) == pytest.approx(-(p[0, 0] / 3 + p[1, 0] / 2 + p[2, 0] / 5) / 3, rel=1e-5)
    assert int(terms.weight.sum()) == 3


@pytest.mark.parametrize("norm", ["sum", "mean"])
def test_likelihood_terms_are_of_the_chosen_response(norm):
    policy, rows = pairs_of([example(3, 6)])
    p = sums(policy.logprob, rows)
    objective, hyper = make("cpo", beta=BETA, alpha=0.7, nll_norm=norm)
    nll = -p[0, 0] / (3 if norm == "mean" else 1)
    want = softplus(-BETA * (p[0, 0] - p[0, 1])) + 0.7 * nll
    np.testing.assert_allclose(objective.terms(policy, rows, hyper).loss.sum(), want, rtol=1e-5)


def test_a_mixture_is_the_weighted_sum_of_its_losses_on_every_pair():
    policy, rows = pairs_of()
    given = {"beta": BETA, "weights": (0.8, 0.2, 1.5), "baseline": "zero"}
    objective, hyper = make("dpo+bco+sft", **given)
    parts = [make("dpo", beta=BETA), make("bco", beta=BETA, baseline="zero"), make("sft")]
    values = [value(part.terms(policy, rows, numbers)) for part, numbers in parts]
    want = 0.8 * values[0] + 0.2 * values[1] + 1.5 * values[2]
    np.testing.assert_allclose(value(objective.terms(policy, rows, hyper)), want, rtol=1e-5)


def test_scores_of_the_data_become_offsets_soft_labels_and_margins():
    policy, rows = pairs_of([example(3, 4, scores=(2.5, 1.0))])
    d = ratios(policy, rows)
    margin = BETA * (d[0, 0] - d[0, 1])
    objective, hyper = make("odpo", beta=BETA, alpha=0.5)
    want = softplus(-(margin - 0.5 * np.log(1.5)))
    np.testing.assert_allclose(objective.terms(policy, rows, hyper).loss.sum(), want, rtol=1e-5)
    objective, hyper = make("dpo_soft", beta=BETA, scale=2.0)
    p = 1 / (1 + np.exp(-2.0 * 1.5))
    want = p * softplus(-margin) + (1 - p) * softplus(margin)
    np.testing.assert_allclose(objective.terms(policy, rows, hyper).loss.sum(), want, rtol=1e-5)
    objective, hyper = make("rpo", beta=BETA, scale=2.0, form="sq")
    want = (margin - 3.0) ** 2
    np.testing.assert_allclose(objective.terms(policy, rows, hyper).loss.sum(), want, rtol=1e-5)


def test_tdpo_takes_the_sums_of_token_kls_and_stops_the_chosen_one():
    policy, rows = pairs_of([example(3, 6)])
    d, kl = ratios(policy, rows), sums(policy.kl, rows)
    objective, hyper = make("tdpo", beta=BETA, alpha=0.5)
    want = softplus(-BETA * (d[0, 0] - d[0, 1] - 0.5 * (kl[0, 1] - kl[0, 0])))
    np.testing.assert_allclose(objective.terms(policy, rows, hyper).loss.sum(), want, rtol=1e-5)
    gradient = jax.grad(lambda p: objective.terms(p, rows, hyper).loss.sum())(policy).kl
    assert all(g == 0 for g in by_response(gradient, rows)[0, 0])
    assert all(g > 0 for g in by_response(gradient, rows)[0, 1])


@pytest.mark.parametrize("weight_reference", [True, False])
def test_ld_dpo_weighs_the_tokens_that_the_shorter_response_has_not(weight_reference):
    policy, rows = pairs_of([example(3, 6, 5), example(4, 2)])
    given = {"beta": BETA, "ld_alpha": 0.25, "ld_weight_reference": weight_reference}
    objective, hyper = make("dpo", **given)
    p, r = by_response(policy.logprob, rows), by_response(rows.reference, rows)

    def weighted(values, other, alpha):
        return sum(values[:other]) + alpha * sum(values[other:])

    want = 0.0
    for i, a, b in [(0, 0, 1), (0, 0, 2), (0, 1, 2), (1, 0, 1)]:
        shared = min(len(p[i, a]), len(p[i, b]))
        alpha = 0.25 if weight_reference else 1.0
        d = [weighted(p[i, k], shared, 0.25) - weighted(r[i, k], shared, alpha) for k in (a, b)]
        want += softplus(-BETA * (d[0] - d[1]))
    np.testing.assert_allclose(objective.terms(policy, rows, hyper).loss.sum(), want, rtol=1e-5)


def test_wpo_multiplies_each_pair_by_its_weight_without_gradient():
    policy, rows = pairs_of([example(3, 6), example(2, 2)])
    plain, numbers = make("dpo", beta=BETA)
    losses = plain.terms(policy, rows, numbers).loss
    p, c = by_response(policy.logprob, rows), by_response(policy.log_collision, rows)
    for kind in ("plain", "corrected"):
        objective, hyper = make("dpo", beta=BETA, wpo=kind)
        less = c if kind == "corrected" else dict.fromkeys(c, 0.0)
        mean = {key: np.mean(p[key]) - np.mean(less[key]) for key in p}
        weights = [np.exp(mean[i, 0] + mean[i, 1]) for i in range(2)]
        terms = objective.terms(policy, rows, hyper)
        order = np.asarray(rows.example[rows.example >= 0])
        want = np.asarray(losses)[rows.example >= 0] * np.array(weights)[order]
        np.testing.assert_allclose(terms.loss[rows.example >= 0], want, rtol=1e-5)
        objective, hyper = make("dpo", beta=BETA, wpo=kind, wpo_clamp=1e-3)
        want = sum(
            l * min(w, 1e-3) for l, w in zip(losses[rows.example >= 0], np.array(weights)[order])
        )
        np.testing.assert_allclose(objective.terms(policy, rows, hyper).loss.sum(), want, rtol=1e-5)
    assert objective.statistics == ("log_collision",)
    gradient = jax.grad(lambda p: objective.terms(p, rows, hyper).loss.sum())(policy)
    assert not np.any(gradient.log_collision)


def test_a_ranking_is_chosen_place_by_place_ragged_and_tied():
    policy, rows = pairs_of([example(3, 4, 2, 1), example(1, 5), example(2, 3, 1, rank=(0, 1, 1))])
    objective, hyper = make("plackett_luce", beta=BETA)
    d = ratios(policy, rows)
    places = {0: [0, 1, 2, 3], 1: [0, 1], 2: [0, 1, 1]}
    want = 0.0
    for i, rank in places.items():
        reward = [BETA * d[i, k] for k in range(len(rank))]
        for k in range(len(rank)):
            rivals = [reward[j] for j in range(len(rank)) if rank[j] >= rank[k]]
            want += np.log(np.sum(np.exp(rivals))) - reward[k]
    terms = objective.terms(policy, rows, hyper)
    assert float(terms.weight.sum()) == 3
    np.testing.assert_allclose(terms.loss.sum(), want, rtol=1e-5)


def labelled():
    """Four labelled responses, each with a mismatched one."""
    labels = [True, False, True, True]
    lengths = [(3, 2), (5, 3), (1, 5), (4, 1)]
    return pairs_of([example(*n, label=label) for n, label in zip(lengths, labels)]), labels


def test_kto_takes_its_baseline_from_the_mismatched_responses_of_the_whole_batch():
    (policy, rows), labels = labelled()
    for shift in (0.0, 2.0):  # the mean log-ratio below 0, where it is clipped, and above
        policy = policy._replace(logprob=policy.logprob + shift)
        given = {"beta": BETA, "desirable_weight": 0.7, "undesirable_weight": 1.3}
        objective, hyper = make("kto", **given)
        d = ratios(policy, rows)
        kl = max(0.0, np.mean([d[i, 1] for i in range(4)]))
        sigmoid = lambda x: 1 / (1 + np.exp(-x))
        want = sum(
            0.7 * sigmoid(-BETA * (d[i, 0] - kl)) if good else 1.3 * sigmoid(BETA * (d[i, 0] - kl))
            for i, good in enumerate(labels)
        )
        terms = objective.terms(policy, rows, hyper)
        assert float(terms.weight.sum()) == 4
        np.testing.assert_allclose(terms.loss.sum(), want, rtol=1e-5)
    assert kl > 0
    assert objective.coupled
    chosen = terms.metrics["rewards/chosen"]
    good = [BETA * d[i, 0] for i, label in enumerate(labels) if label]
    np.testing.assert_allclose(chosen.total.sum() / chosen.weight.sum(), np.mean(good), rtol=1e-5)


@pytest.mark.parametrize("loss", ["bco", "bco_unpaired"])
def test_bco_keeps_the_mean_of_all_rewards_seen(loss):
    (policy, rows), _ = labelled()
    objective, _ = make(loss, beta=BETA)
    hyper = {"beta": jnp.float32(BETA)}
    d = ratios(policy, rows)
    rewards = [BETA * d[i, k] for i in range(4) for k in ((0, 1) if loss == "bco" else (0,))]
    state = objective.baseline(RunningMean(jnp.zeros(()), jnp.zeros(())), policy, rows, hyper)
    np.testing.assert_allclose(state.mean, np.mean(rewards), rtol=1e-5)
    assert float(state.count) == len(rewards)
    more = jax.tree.map(lambda x: x + 1, policy)
    state = objective.baseline(state, more, rows, hyper)
    tokens = {key: len(found) for key, found in by_response(policy.logprob, rows).items()}
    kinds = (0, 1) if loss == "bco" else (0,)
    rewards += [BETA * (d[i, k] + tokens[i, k]) for i in range(4) for k in kinds]
    np.testing.assert_allclose(state.mean, np.mean(rewards), rtol=1e-5)
    assert make(loss, baseline="zero")[0].baseline is None


def test_a_loss_is_added_by_its_function_and_one_entry(monkeypatch):
    def squared(policy, reference, *, beta):
        margin = policy.chosen - reference.chosen - policy.rejected + reference.rejected
        return (beta * margin - 1) ** 2

    monkeypatch.setitem(LOSS_TABLE, "squared", Loss(squared, margin_only=True))
    policy, rows = pairs_of()
    objective, hyper = make("squared", beta=BETA)
    d = ratios(policy, rows)
    want = sum((BETA * (d[i, 0] - d[i, 1]) - 1) ** 2 for i in range(len(PAIRS)))
    np.testing.assert_allclose(objective.terms(policy, rows, hyper).loss.sum(), want, rtol=1e-5)
    assert objective.needs_reference
    assert float(objective.at_reference(hyper)) == 1
