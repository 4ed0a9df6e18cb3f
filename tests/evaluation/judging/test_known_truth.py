"""A judge with injected faults: the report recovers them, and its intervals cover the truth.

A 95 % interval covers the truth in 92 to 98 % of 200 simulations. That an interval with a true
coverage of 95 % leaves this range by chance has a probability of about 5 %: the seed is fixed.
"""

import numpy as np
import pytest
from scipy.special import expit

from dpojax.evaluation.judging.agreement import agreement
from dpojax.evaluation.judging.asking import judge_comparisons
from dpojax.evaluation.judging.length_control import length_controlled
from dpojax.evaluation.judging.statistics import difference, repeatability, win_rate
from dpojax.evaluation.judging.verdicts import Choice, Comparison, Judgement, Outcome, Reply
from tests.simulated_judge import LENGTH_SCALE, SimulatedJudge

SIMULATIONS = 200
PROMPTS = 150
LEAST, MOST = 0.92, 0.98
FAULTS = {
    "none": {},
    "bias 10 %": dict(position_bias=0.1, noise=0.1),
    "bias 20 %": dict(position_bias=0.2, noise=0.05, ties=0.1, unparsed=0.05),
    "bias 40 %": dict(position_bias=0.4, noise=0.2, ties=0.05, unparsed=0.02),
}
A_WINS = 0.7  # over prompts; of the second policy in a difference it is less
SECOND_WINS = 0.55


def contains(measured, truth):
    return measured.low <= truth <= measured.high


def simulate(judge, rng, prompts=PROMPTS):
    """Measure once everything that is not about lengths."""
    ids = range(prompts)
    quality = rng.random(prompts)  # what both policies have in common on a prompt
    first, second = quality < A_WINS, quality > 1 - SECOND_WINS
    first, second = (x ^ (rng.random(prompts) < 0.1) for x in (first, second))
    judgements = judge.judgements(first, rng)
    humans = [Choice.FIRST if better else Choice.SECOND for better in first]
    rate = win_rate(judgements, ids, resamples=1000)
    belief = agreement(judgements, humans, ids, resamples=1000)
    others = judge.judgements(second, rng)
    return {
        "win_rate": rate,
        "position_bias": rate.position_bias,
        "flip_rate": rate.flip_rate,
        "difference": difference(judgements, ids, others, ids, resamples=1000),
        "accuracy": belief.accuracy,
        "decided_accuracy": belief.decided_accuracy,
        "kappa": belief.kappa,
    }


def truth_of(judge):
    """Of `simulate`: 10 % of the labels are turned round there."""
    first, second = (0.9 * share + 0.1 * (1 - share) for share in (A_WINS, SECOND_WINS))
    expected = judge.expected(first)
    return expected | {"difference": expected["win_rate"] - judge.expected(second)["win_rate"]}


@pytest.mark.slow
@pytest.mark.parametrize("faults", FAULTS)
def test_intervals_cover_what_was_injected(faults):
    judge, rng = SimulatedJudge(None, **FAULTS[faults]), np.random.default_rng(0)
    runs = [simulate(judge, rng) for _ in range(SIMULATIONS)]
    truth = truth_of(judge)
    for name in runs[0]:
        covered = np.mean([contains(run[name], truth[name]) for run in runs])
        assert covered >= LEAST, name
        if faults != "none" or name in ("win_rate", "difference"):  # else the scale ends there
            assert covered <= MOST, name


@pytest.mark.parametrize("faults", FAULTS)
def test_shares_of_outcomes_are_those_that_were_injected(faults):
    """Within four standard errors of 20,000 comparisons."""
    judge, rng = SimulatedJudge(None, **FAULTS[faults]), np.random.default_rng(1)
    better = rng.random(20_000) < A_WINS
    judgements, truth = judge.judgements(better, rng), judge.expected(A_WINS)
    rate = win_rate(judgements, range(len(better)), resamples=100)
    for outcome in Outcome:
        error = np.sqrt(truth[outcome] * (1 - truth[outcome]) / len(better))
        assert abs(rate.share(outcome) - truth[outcome]) <= 4 * error
    assert abs(rate.value - truth["win_rate"]) < 4 * 0.5 / np.sqrt(len(better))


@pytest.mark.parametrize("a_wins", [0.03, 0.95])
def test_the_interval_of_a_win_rate_near_its_ends_covers_with_50_prompts(a_wins):
    rng = np.random.default_rng(0)
    rates = [win_rate(certain(rng.random(50) < a_wins), range(50)) for _ in range(SIMULATIONS)]
    assert LEAST <= np.mean([contains(rate, a_wins) for rate in rates]) <= MOST


@pytest.mark.parametrize("prompts", [50, pytest.param(200, marks=pytest.mark.long)])
def test_samples_of_one_prompt_are_one_cluster(prompts):
    """Eight samples of a prompt agree: the interval is that of prompts, not of samples."""
    rng, ids = np.random.default_rng(0), np.repeat(np.arange(prompts), 8)
    rates = []
    for _ in range(SIMULATIONS):
        quality = np.repeat(rng.beta(0.5, 0.5, prompts), 8)
        rates.append(win_rate(certain(rng.random(len(ids)) < quality), ids))
    assert LEAST <= np.mean([contains(rate, 0.5) for rate in rates]) <= MOST
    as_if_independent = [win_rate(certain(rng.random(8 * prompts) < 0.5), range(8 * prompts))]
    width = np.mean([rate.high - rate.low for rate in rates])
    # Var(mean) is 1/8 + 7/16 of that of one sample per prompt: sqrt(8 * 9 / 16) = 2.1 times.
    np.testing.assert_allclose(
        width, 2.12 * (as_if_independent[0].high - as_if_independent[0].low), rtol=0.1
    )


@pytest.mark.parametrize(
    ("policy", "slope"), [(0.4, 1.0), pytest.param(-0.8, 2.0, marks=pytest.mark.long)]
)
def test_the_length_controlled_win_rate_covers_that_at_equal_lengths(policy, slope):
    """Judges that prefer the longer response: the plain win rate is far off."""
    rng, prompts = np.random.default_rng(0), 100
    truth, covered, plain = expit(policy), [], []
    for _ in range(SIMULATIONS):
        judgements, a, b = length_biased(policy, slope, rng, prompts)
        controlled = length_controlled(judgements, range(prompts), a, b, resamples=500)
        covered.append(contains(controlled, truth))
        plain.append(contains(win_rate(judgements, range(prompts), resamples=500), truth))
    assert LEAST <= np.mean(covered) <= MOST
    assert np.mean(plain) < 0.8


def test_a_faulty_judge_bends_the_curve_of_lengths_only_a_little():
    """Faults make it flatter than the fitted one: the number is off by less than 2 points.

    Its plain win rate is off by more than 4.
    """
    rng, prompts = np.random.default_rng(0), 20_000
    judge = SimulatedJudge(None, **FAULTS["bias 20 %"])
    b = rng.integers(200, 400, prompts)
    a = b + rng.normal(60, LENGTH_SCALE, prompts)
    better = rng.random(prompts) < expit(0.8 + 1.5 * np.tanh((a - b) / LENGTH_SCALE))
    judgements = judge.judgements(better, rng)
    truth = judge.expected(expit(0.8))["win_rate"]
    controlled = length_controlled(judgements, range(prompts), a, b, resamples=20)
    assert abs(controlled.value - truth) < 0.02
    assert win_rate(judgements, range(prompts), resamples=20).value - truth > 0.04


def test_repeatability_is_that_of_the_noise():
    """Without other faults the same choice comes twice with 0.8^2 + 0.2^2."""
    judge, rng = SimulatedJudge(None, noise=0.2), np.random.default_rng(0)
    covered = 0
    for _ in range(SIMULATIONS):
        first, second = (judge.choices(np.ones(100, bool), rng) for _ in range(2))
        measured = repeatability(list(zip(map(Reply, first), map(Reply, second))))
        covered += contains(measured, 0.68)
    assert LEAST <= covered / SIMULATIONS <= MOST


def test_a_judge_that_is_really_asked_gives_the_injected_numbers():
    """Through `judge_comparisons`: both orders, questions in any order, some asked again."""
    rng = np.random.default_rng(0)
    better = {f"answer {i} of A": rng.random() < A_WINS for i in range(1500)}
    comparisons = [
        Comparison(str(i), f"question {i}", text, f"answer {i} of B")
        for i, text in enumerate(better)
    ]

    def first_is_better(question):
        if question.first in better:
            return better[question.first]
        return not better[question.second]

    judge = SimulatedJudge(first_is_better, **FAULTS["bias 20 %"])
    judged = judge_comparisons(judge, comparisons, repeat=0.1)
    assert len(judge.questions) == 3000 + len(judged.repeats)
    truth = judge.expected(A_WINS)
    rate = win_rate(judged.judgements, [comparison.id for comparison in comparisons])
    humans = [Choice.FIRST if wins else Choice.SECOND for wins in better.values()]
    belief = agreement(judged.judgements, humans, [x.id for x in comparisons])
    assert contains(rate, truth["win_rate"])
    assert contains(rate.position_bias, truth["position_bias"])
    assert contains(rate.flip_rate, truth["flip_rate"])
    assert contains(belief.accuracy, truth["accuracy"])
    assert contains(belief.kappa, truth["kappa"])
    assert 0.03 < rate.share(Outcome.UNPARSED) < 0.17


def certain(a_wins):
    """Judgements of a judge without faults."""
    first, second = Reply(Choice.FIRST), Reply(Choice.SECOND)
    return [Judgement(first, second) if won else Judgement(second, first) for won in a_wins]


def length_biased(policy, slope, rng, prompts):
    """Judgements, and lengths of A and of B, whose difference decides more than the policy."""
    b = rng.integers(200, 400, prompts)
    a = b + np.round(rng.normal(60, LENGTH_SCALE, prompts))
    gaps = a - b
    odds = policy + slope * np.tanh(gaps / LENGTH_SCALE)
    return certain(rng.random(prompts) < expit(odds)), a, b
