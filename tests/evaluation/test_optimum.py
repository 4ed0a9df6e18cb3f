"""Estimates of the optimum: against enumeration, closed forms, and themselves drawn many times."""

import doctest
import json
import math

import numpy as np
import pytest
import scipy.optimize
import scipy.special
from hypothesis import given
from hypothesis import strategies as st

from dpojax.evaluation import optimum
from dpojax.evaluation.frontier import Estimate

PROMPTS, RESPONSES, SAMPLES, SEEDS = 40, 12, 128, 100
BETAS = np.array([np.inf, 2.0, 1.0, 0.6])


class Task:
    """Prompts with finitely many responses, so that every expectation is a sum."""

    def __init__(self, prompts):
        draw = np.random.default_rng(5)
        self.reference = draw.dirichlet(np.ones(RESPONSES), prompts)
        self.reward = draw.normal(0, 1, (prompts, RESPONSES)) + draw.normal(0, 1, (prompts, 1))
        self.edges = self.reference.cumsum(1)[:, None, :-1]

    def sample(self, seed, samples, prompts=slice(None)):
        """Rewards of samples of the reference, [prompts, samples]."""
        edges, reward = self.edges[prompts], self.reward[prompts]
        uniform = np.random.default_rng(seed).random((len(reward), samples, 1))
        return np.take_along_axis(reward, (uniform > edges).sum(-1), axis=1)

    def optimum(self, beta):
        """Mean reward and mean KL of the optimal policy."""
        policy = self.reference * np.exp(self.reward / beta)
        policy /= policy.sum(1, keepdims=True)
        kl = (policy * np.log(policy / self.reference)).sum(1)
        return (policy * self.reward).sum(1).mean(), kl.mean()

    def best_reward_at(self, kl):
        """By duality, the least beta (KL + mean log Z) over all betas."""

        def bound(log_beta):
            beta = math.exp(log_beta)
            log_z = scipy.special.logsumexp(self.reward / beta, axis=1, b=self.reference)
            return beta * (kl + log_z.mean())

        return scipy.optimize.minimize_scalar(bound, bounds=(-4, 6), method="bounded").fun


@pytest.fixture(scope="module")
def task():
    return Task(PROMPTS)


@pytest.fixture(scope="module")
def curves(task):
    return [optimum.optimum(task.sample(seed, SAMPLES), BETAS) for seed in range(SEEDS)]


def covered(values, errors, truth):
    """In how many of the seeds the 95 % interval holds the truth."""
    return (np.abs(np.array(values) - truth) <= 1.96 * np.array(errors)).sum(0)


def test_the_optimum_is_covered_by_its_sampling_error(task, curves):
    """For these prompts: [betas] of reward, and of KL where that is not 0 by definition."""
    reward, kl = np.transpose([task.optimum(beta) for beta in BETAS])
    hits = covered([c.reward for c in curves], [c.reward_sampling_error for c in curves], reward)
    assert (hits >= 90).all()
    assert (hits < SEEDS).any()  # nor are they too wide
    hits = covered([c.kl for c in curves], [c.kl_sampling_error for c in curves], kl)
    assert (hits[1:] >= 90).all()
    for curve in curves:
        assert curve.kl[0] == curve.kl_sampling_error[0] == 0


def test_the_optimum_of_a_population_of_prompts_is_covered_by_its_error(task):
    """Prompts drawn from the task; also for the best reward at given KLs, between the betas."""
    betas = np.concatenate([[np.inf], np.geomspace(8, 0.6, 12)])
    curves = []
    for seed in range(SEEDS):
        prompts = np.random.default_rng(1000 + seed).integers(PROMPTS, size=60)
        curves.append(optimum.optimum(task.sample(seed, SAMPLES, prompts), betas))
    reward, kl = np.transpose([task.optimum(beta) for beta in betas])
    for name, truth in (("reward", reward), ("kl", kl)):
        values = [getattr(c, name) for c in curves]
        errors = [getattr(c, f"{name}_error") for c in curves]
        assert (covered(values, errors, truth)[1:] >= 90).all(), name
    grid = np.array([0.05, 0.2, 0.4])
    best = [optimum.optimal_reward_at(grid, curve) for curve in curves]
    truth = [task.best_reward_at(k) for k in grid]
    hits = covered([b.value for b in best], [b.error for b in best], truth)
    assert (hits >= 90).all()
    assert (hits < SEEDS).any()


def test_the_jackknife_removes_most_of_the_bias_of_few_samples(task):
    curves = [optimum.optimum(task.sample(seed, 16), [1.0]) for seed in range(400)]
    for name, truth in zip(("reward", "kl"), task.optimum(1.0)):
        plain = np.mean([getattr(c, f"plain_{name}") for c in curves]) - truth
        corrected = np.mean([getattr(c, name) for c in curves]) - truth
        assert plain < -0.01, name
        assert abs(corrected) < abs(plain) / 3, name


def test_the_jackknife_is_what_leaving_samples_out_one_by_one_gives(task):
    rewards = task.sample(0, 8)[:3]
    got = optimum.optimum(rewards, [0.7])
    rest = [np.delete(rewards, i, axis=1) for i in range(8)]

    def plain(r):
        weight = scipy.special.softmax(r / 0.7, axis=1)
        return (weight * r).sum(1), (weight * np.log(r.shape[1] * weight)).sum(1)

    for name, whole, parts in zip(("reward", "kl"), plain(rewards), zip(*map(plain, rest))):
        corrected = 8 * whole - 7 * np.mean(parts, axis=0)
        variance = 7 / 8 * ((parts - np.mean(parts, axis=0)) ** 2).sum(0)
        np.testing.assert_allclose(getattr(got, f"plain_{name}"), whole.mean(), rtol=1e-10)
        np.testing.assert_allclose(getattr(got, name), corrected.mean(), rtol=1e-10)
        expected = corrected.std(ddof=1) / math.sqrt(3)
        np.testing.assert_allclose(getattr(got, f"{name}_error"), expected, rtol=1e-10)
        expected = math.sqrt(variance.sum()) / 3
        np.testing.assert_allclose(getattr(got, f"{name}_sampling_error"), expected, rtol=1e-10)

    soft_value = lambda r: 0.7 * np.log(np.exp(r / 0.7).mean(1))
    corrected = 8 * soft_value(rewards) - 7 * np.mean([soft_value(r) for r in rest], axis=0)
    expected = corrected.std(ddof=1) / math.sqrt(3)
    np.testing.assert_allclose(got.frontier_error, expected, rtol=1e-10)


def test_a_normal_reward_has_the_optimum_sqrt_2_kl():
    """Reward s^2 / beta, KL s^2 / (2 beta^2) for a standard deviation s."""
    rewards = np.random.default_rng(0).normal(3, 2, (200, 1000))
    betas = np.concatenate([[np.inf], np.geomspace(40, 1.5, 12)])
    curve = optimum.optimum(rewards, betas)
    assert curve.trusted.all()
    np.testing.assert_allclose(curve.reward[1:], 3 + 4 / betas[1:], rtol=0.01)
    np.testing.assert_allclose(curve.kl[1:], 2 / betas[1:] ** 2, rtol=0.05)
    grid = np.linspace(0.01, 0.8, 30)
    best = optimum.optimal_reward_at(grid, curve).value
    np.testing.assert_allclose(best, 3 + 2 * np.sqrt(2 * grid), rtol=0.01)


@given(st.integers(0, 50), st.floats(1e-9, 1e9))
def test_no_beta_gives_a_number_that_is_not_finite_or_a_kl_over_log_m(seed, beta):
    rewards = np.random.default_rng(seed).normal(size=(4, 6))
    curve = optimum.optimum(rewards, [beta])
    assert all(np.isfinite(column).all() for column in curve)
    assert -1e-9 <= curve.plain_kl[0] <= math.log(6) + 1e-9
    assert rewards.mean() - 1e-9 <= curve.plain_reward[0] <= rewards.max(1).mean() + 1e-9
    assert 1 - 1e-9 <= curve.effective[0] <= 6 + 1e-9


def test_betas_whose_weight_lies_on_few_samples_are_not_trusted():
    rewards = np.random.default_rng(0).normal(size=(50, 100))
    curve = optimum.optimum(rewards, [1e-3, np.inf, 1.0], min_effective=10)
    assert curve.beta.tolist() == [np.inf, 1.0, 1e-3]
    assert curve.trusted.tolist() == [True, True, False]
    np.testing.assert_allclose(curve.effective[[0, 2]], [100, 1], rtol=1e-3)
    np.testing.assert_allclose(curve.plain_kl[2], math.log(100), rtol=1e-3)
    best = optimum.optimal_reward_at([-0.1, 0.0, 0.2, 3.0], curve)
    assert np.isnan(best.value).tolist() == [True, False, False, True]
    assert np.isnan(best.error).tolist() == [True, False, False, True]
    np.testing.assert_allclose(best.value[1], rewards.mean(), rtol=1e-9)
    strict = optimum.optimum(rewards, [np.inf, 1.0], min_effective=99)
    assert np.isnan(optimum.optimal_reward_at(0.0, strict).value)


def test_the_optimum_itself_has_the_share_one_and_the_reference_none(task, curves):
    curve = curves[0]
    base = Estimate(curve.reward[0], curve.reward_error[0])
    got = optimum.share_of_optimal_gain(curve.reward, curve.kl, curve, base=base)
    np.testing.assert_allclose(got.value[1:], 1, rtol=1e-9)
    assert np.isnan(got.value[0])
    none = optimum.share_of_optimal_gain(base.value, 0.2, curve, base=base)
    assert none.value == 0
    assert np.isnan(optimum.share_of_optimal_gain(1.0, 50.0, curve, base=base).value)


def test_the_error_of_a_share_is_the_spread_of_shares_of_noisy_measurements():
    """The curve is exact here: every prompt has the same samples."""
    rewards = np.tile(np.random.default_rng(0).normal(size=500), (2, 1))
    curve = optimum.optimum(rewards, np.concatenate([[np.inf], np.geomspace(9, 0.7, 12)]))
    base, reward, kl, draw = rewards.mean(), 0.5, 0.3, np.random.default_rng(1)
    errors = dict(reward_error=0.02, kl_error=0.03)
    got = optimum.share_of_optimal_gain(reward, kl, curve, base=Estimate(base, 0.02), **errors)
    noise = draw.normal(size=(3, 20000))
    measured = optimum.share_of_optimal_gain(
        reward + 0.02 * noise[0],
        kl + 0.03 * noise[1],
        curve,
        base=Estimate(base + 0.02 * noise[2], 0.0),
    )
    np.testing.assert_allclose(got.error, measured.value.std(), rtol=0.03)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: optimum.optimum([[1.0, 2.0, np.nan]], [1.0]), r"\[0, 2\] is not finite"),
        (lambda: optimum.optimum([[1.0, 2.0]], [1.0]), "3 samples"),
        (lambda: optimum.optimum([[1.0, 2.0, 3.0]], [0.0]), "positive"),
    ],
)
def test_bad_input_is_named(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_examples_in_the_docstrings_run():
    result = doctest.testmod(optimum)
    assert result.attempted > 8
    assert result.failed == 0


EXACT = np.array([0.0, 1.0, 4.0, 9.0, 16.0])


def exact(trusted=(True, True, True, True, False)):
    """Best reward 0.5 + 0.2 sqrt(KL), which the interpolation in sqrt(KL) meets exactly."""
    columns = dict.fromkeys(optimum.Optimum._fields, np.zeros(5))
    columns |= dict(kl=EXACT, reward=0.5 + 0.2 * np.sqrt(EXACT), frontier_error=np.full(5, 0.03))
    return optimum.Optimum(**columns)._replace(trusted=np.array(trusted))


def test_a_point_above_the_limit_has_the_error_of_all_that_was_measured():
    curve = exact()
    got = optimum.above_limit([0.9, 0.9], [2.25, 16.0], curve, reward_error=0.04, kl_error=0.3)
    slope = 0.2 / (2 * 1.5)
    np.testing.assert_allclose(got.value, [0.9 - 0.8, np.nan], rtol=1e-12)
    expected = math.sqrt(0.04**2 + (slope * 0.3) ** 2 + 0.03**2)
    np.testing.assert_allclose(got.error, [expected, np.nan], rtol=1e-12)


def test_the_limit_is_trusted_up_to_the_last_kl_before_the_first_doubt():
    assert optimum.trusted_up_to(exact()) == 9
    assert optimum.trusted_up_to(exact([True, True, False, True, True])) == 1
    assert math.isnan(optimum.trusted_up_to(exact([False] * 5)))


def test_a_curve_reads_back_as_it_was_written(tmp_path, task):
    curve = optimum.optimum(task.sample(0, 16), [np.inf, 1.0, 1e-3])
    curve = curve._replace(kl_error=np.array([np.nan, 0.1, 1 / 3]))
    optimum.write_optimum(tmp_path / "optimum.json", curve)
    got = optimum.read_optimum(tmp_path / "optimum.json")
    for name, column in curve._asdict().items():
        assert getattr(got, name).dtype == column.dtype, name
        np.testing.assert_array_equal(getattr(got, name), column, err_msg=name)
    text = (tmp_path / "optimum.json").read_text()
    json.loads(text, parse_constant=lambda name: pytest.fail(f"{name} is no JSON"))
    assert [file.name for file in tmp_path.iterdir()] == ["optimum.json"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda columns: columns.pop("kl"), "fields must be beta, reward"),
        (lambda columns: columns.update(kl=["far"] * 5), "kl must be numbers"),
        (lambda columns: columns["kl"].pop(), "kl has not as many values as beta"),
        (lambda columns: columns.update(trusted=["no"] * 5), "trusted must be true or false"),
    ],
)
def test_a_file_that_is_wrong_is_refused_with_its_field(tmp_path, change, message):
    path = tmp_path / "optimum.json"
    optimum.write_optimum(path, exact())
    columns = json.loads(path.read_text())
    change(columns)
    path.write_text(json.dumps(columns))
    with pytest.raises(ValueError, match=rf"optimum\.json: {message}"):
        optimum.read_optimum(path)
    path.write_text("{")
    with pytest.raises(ValueError, match="not JSON"):
        optimum.read_optimum(path)
