"""A run of PPO: what it leaves behind, and that nothing that stops it changes the result."""

import dataclasses
import json
import os
import shutil
import signal
from collections import Counter

import jax
import numpy as np
import pytest

from dpojax.config.errors import ConfigError
from dpojax.data import reviews
from dpojax.evaluation.policies import PolicyEvaluation
from dpojax.evaluation.rewards import Reward, RewardError
from dpojax.models import huggingface
from dpojax.runs.export import export
from dpojax.runs.run import run
from dpojax.stages.ppo import PPO
from dpojax.stages.registry import open_stage, resolve
from dpojax.stages.setup import prepare_setup
from dpojax.training.checkpoints import Checkpoints
from dpojax.training.loop import NonFiniteLoss
from dpojax.training.preemption import Preempted

from .. import metrics_page
from .conftest import lines, tiny_config

RATE, COEFFICIENT, TARGET, HORIZON, RESPONSES = 0.02, 0.05, 2.0, 64.0, 16
CHANGES = {
    "ppo.limit": 16,
    "ppo.steps": 4,
    "ppo.batch_size": 8,
    "ppo.samples": 2,
    "ppo.minibatches": 2,
    "ppo.max_new_tokens": 12,
    "ppo.learning_rate": RATE,
    "ppo.kl_coefficient": COEFFICIENT,
    "ppo.kl_target": TARGET,
    "ppo.kl_horizon": HORIZON,
    "samples.count": 4,
    "samples.per_prompt": 2,
    "samples.max_new_tokens": 12,
    "evaluate_every": 2,
}


def ppo_config(**changes):
    config = tiny_config(**(CHANGES | changes))
    config.stages = ("ppo",)
    return config


@pytest.fixture(scope="module")
def stage():
    """Of all runs in this file, so that its programs are compiled once."""
    return open_stage(prepare_setup(resolve(ppo_config(), "nowhere")), "ppo").prepare()


@pytest.fixture(scope="module")
def train(stage):
    """(workdir, reward, hyper) -> None: `run` with the stage that is there, and these in it."""

    def start(workdir, *, hyper=None, keys=None, **changes):
        def opened(setup):
            here = stage.setup._replace(run=setup.run)
            return dataclasses.replace(stage, setup=here, **changes)

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(PPO, "open", opened)
            patch.setattr(PPO, "prepare", lambda opened: opened)
            if hyper is not None:
                patch.setattr(PPO, "hyper", hyper)
            run(ppo_config(**(keys or {})), str(workdir))

    return start


@pytest.fixture(scope="module")
def finished(train, tmp_path_factory):
    """A run that nothing disturbed, and its calls of the reward."""
    workdir, calls = tmp_path_factory.mktemp("finished"), []

    def recording(prompts, responses):
        texts = [f"{prompt} {response}" for prompt, response in zip(prompts, responses)]
        calls.append((prompts, reviews.reward(texts)))
        return calls[-1][1]

    train(workdir, reward=Reward("recording", recording))
    return workdir, calls


@pytest.fixture(scope="module")
def stopped(train, tmp_path_factory):
    """A run that got a SIGTERM in its third iteration; the last whole checkpoint was the second."""
    workdir, calls = tmp_path_factory.mktemp("stopped"), []

    def stopping(prompts, responses):
        calls.append(None)
        if len(calls) == 3:
            os.kill(os.getpid(), signal.SIGTERM)
        return reviews.reward([f"{prompt} {text}" for prompt, text in zip(prompts, responses)])

    with pytest.raises(Preempted, match="stopped at iteration 3 of 4, saved"):
        train(workdir, reward=Reward("stopping", stopping))
    return workdir


def split(workdir, name):
    return [line for line in lines(workdir, "ppo") if line["split"] == name]


def saved_state(stage, workdir, step=None):
    with Checkpoints(workdir / "ppo" / "checkpoints") as saved:
        return saved.restore(stage.abstract_state(), step=step)[0]


@pytest.mark.long
def test_every_prompt_of_an_epoch_is_answered_and_its_rewards_are_those_logged(finished):
    workdir, calls = finished
    prompts = reviews.prompts("train", 16, seed=0)
    for epoch in (calls[:2], calls[2:]):
        answered = Counter(prompt for prompts_of_call, _ in epoch for prompt in prompts_of_call)
        assert answered == Counter(2 * prompts)
    assert calls[0][0] != calls[2][0]  # another order in the second epoch
    logged = [line["objective/scores"] for line in split(workdir, "train")]
    np.testing.assert_allclose(logged, [scores.mean() for _, scores in calls], rtol=1e-5)


@pytest.mark.long
def test_at_the_start_the_policy_is_the_reference_and_then_it_leaves(finished):
    first, *others = split(finished[0], "train")
    assert metrics_page.undefined(lines(finished[0], "ppo")) == set()
    assert first["objective/kl"] == pytest.approx(0, abs=1e-5)
    assert others[-1]["objective/kl"] != pytest.approx(0, abs=1e-3)
    start, _, end = split(finished[0], "eval")
    assert start["samples/kl"] == pytest.approx(0, abs=1e-5)
    assert end["samples/kl_of_tokens"] > 0.01


@pytest.mark.long
def test_the_learning_rate_falls_along_a_line_and_the_coefficient_follows_the_kl(finished):
    train = split(finished[0], "train")
    rates = [line["learning_rate"] for line in train]
    np.testing.assert_allclose(rates, RATE * np.array([1, 0.75, 0.5, 0.25]), rtol=1e-6)
    coefficient = COEFFICIENT
    for line in train:  # Ziegler et al. 2019, section 2.2
        assert line["objective/kl_coef"] == pytest.approx(coefficient, rel=1e-5)
        error = np.clip(line["objective/kl"] / TARGET - 1, -0.2, 0.2)
        coefficient *= 1 + error * RESPONSES / HORIZON


@pytest.mark.long
def test_the_summary_compares_reward_and_kl_before_and_after(finished):
    workdir = finished[0]
    summary = json.loads((workdir / "finished.json").read_text())["ppo"]["values"]
    start, _, end = split(workdir, "eval")
    for name in ("samples/reward", "samples/kl", "samples/reward_error", "samples/length"):
        assert summary["before"][name] == pytest.approx(start[name], abs=1e-6)
        assert summary["after"][name] == pytest.approx(end[name], abs=1e-6)
    text = (workdir / "ppo" / "summary.txt").read_text()
    reward = f"{end['samples/reward']:.3f} ± {end['samples/reward_error']:.3f}"
    for part in (reward, "judged by reviews: 4 held-out prompts with 2 responses", "stopped"):
        assert part in text
    assert (workdir / "training_curves.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.long
def test_a_stopped_run_goes_on_to_the_same_bits(stage, train, finished, stopped, tmp_path):
    workdir = tmp_path / "resumed"
    shutil.copytree(stopped, workdir)
    train(workdir)
    for ours, theirs in zip(
        *(jax.tree.leaves(saved_state(stage, of)) for of in (workdir, finished[0])), strict=True
    ):
        np.testing.assert_array_equal(ours, theirs)
    values = lambda of: [
        {k: v for k, v in line.items() if not k.startswith(("time", "perf/", "goodput/"))}
        for line in lines(of, "ppo")
    ]
    assert values(workdir) == values(finished[0])


@pytest.mark.long
def test_a_loss_that_is_not_finite_ends_the_run_and_keeps_its_state(
    stage, train, stopped, tmp_path
):
    workdir = tmp_path / "broken"
    shutil.copytree(stopped, workdir)
    broken = stage.hyper | {"learning_rate": np.float32(np.nan)}
    with pytest.raises(NonFiniteLoss, match=r"iteration 4. The last good checkpoint \(3\)"):
        train(workdir, hyper=broken)
    for ours, theirs in zip(
        *(jax.tree.leaves(saved_state(stage, of)) for of in (workdir, stopped)), strict=True
    ):
        np.testing.assert_array_equal(ours, theirs)


@pytest.mark.long
@pytest.mark.parametrize(
    ("scores", "message"),
    [
        (lambda n: np.full(n, np.nan), r"reward broken: 16 of 16 scores are not finite; the first"),
        (lambda n: np.zeros(n - 1), r"reward broken: gave an array of shape \(15,\) for 16 texts"),
    ],
)
def test_a_reward_that_cannot_be_used_ends_the_run_and_keeps_its_state(
    stage, train, stopped, tmp_path, scores, message
):
    workdir = tmp_path / "broken"
    shutil.copytree(stopped, workdir)
    with pytest.raises(RewardError, match=message):
        train(workdir, reward=Reward("broken", lambda prompts, texts: scores(len(texts))))
    assert not (workdir / "finished.json").exists()
    assert os.listdir(workdir / "ppo/checkpoints") == os.listdir(stopped / "ppo/checkpoints")
    states = [jax.tree.leaves(saved_state(stage, of)) for of in (workdir, stopped)]
    for ours, theirs in zip(*states, strict=True):
        np.testing.assert_array_equal(ours, theirs)


@pytest.mark.long
def test_the_export_is_the_policy(stage, finished, tmp_path):
    folder = export(str(finished[0]), str(tmp_path / "exported"), stage="ppo")
    config, params, _ = huggingface.load(str(folder))
    assert config == stage.setup.model.config
    state = saved_state(stage, finished[0])
    jax.tree.map(np.testing.assert_array_equal, params, jax.device_get(state.policy.params))
    older = export(str(finished[0]), str(tmp_path / "older"), step=2)
    assert not np.array_equal(
        huggingface.load(str(older))[1]["embed"]["tokens"], params["embed"]["tokens"]
    )


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"ppo.minibatches": 3}, r"config.ppo.minibatches = 3: does not divide the 16 responses"),
        ({"ppo.kl_horizon": 3.0}, r"config.ppo.kl_horizon = 3.0: .* above 3.2"),
        ({"ppo.limit": 0}, r"config.ppo.limit = 0: the prompts of reviews never end"),
        ({"ppo.prompts": "asked.txt"}, r"config.samples.prompts = 'reviews', but config.ppo"),
        ({"ppo.kl_coefficient": 0.0}, r"config.ppo.kl_coefficient = 0.0: above 0"),
        ({"ppo.steps": 0}, r"config.ppo.steps = 0: 1 or more"),
        ({"samples.count": 0}, r"config.samples.count = 0: 1 or more"),
    ],
)
def test_a_config_that_no_run_could_use_is_refused(changes, message):
    with pytest.raises(ConfigError, match=message):
        resolve(ppo_config(**changes), "nowhere")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"ppo.reward": "review"}, r"config.ppo.reward: reward 'review': is not one of"),
        ({"ppo.batch_size": 32}, r"config.ppo.batch_size = 32: reviews has only 16 prompts"),
        ({"ppo.max_new_tokens": 127}, r"prompt 0: \d+ tokens and max_new_tokens = 127"),
        ({"micro_rows": 3}, r"config.micro_rows = 3: does not divide the 8 responses"),
    ],
)
def test_what_does_not_fit_is_refused_before_anything_is_written(changes, message, tmp_path):
    with pytest.raises(ConfigError, match=message):
        run(ppo_config(**changes), str(tmp_path / "run"))
    assert not (tmp_path / "run").exists()


@pytest.mark.long
def test_the_iteration_of_the_best_samples_is_kept_and_training_stops_without_a_better_one(
    train, stage, tmp_path, monkeypatch
):
    rewards = iter([0.9, 0.2, 0.6, 0.5])  # of the evaluations after iterations 0, 1, 2, 3
    metrics = PolicyEvaluation.metrics

    def with_reward(self):
        return metrics(self) | {"samples/reward": next(rewards)}

    monkeypatch.setattr(PolicyEvaluation, "metrics", with_reward)
    keys = {
        "evaluate_every": 1,
        "checkpoint_every": 0,
        "max_checkpoints": 1,
        "ppo.keep_best": "eval/samples/reward",
        "ppo.patience": 1,
        "ppo.stop_at": "eval/samples/reward>=0.7",  # before training alone, which does not count
    }
    train(tmp_path, keys=keys)
    steps = {int(path.name) for path in (tmp_path / "ppo" / "checkpoints").iterdir()}
    assert steps == {2, 3}
    summary = json.loads((tmp_path / "ppo" / "summary.json").read_text())
    assert (summary["kept"]["step"], summary["kept"]["stopped_at"]) == (2, 3)
    values = summary["values"]
    assert [values[when]["samples/reward"] for when in ("before", "after")] == [0.9, 0.6]
    text = (tmp_path / "ppo" / "summary.txt").read_text()
    assert "step 2 of 4, where eval/samples/reward was highest: 0.6 (before training" in text
    assert "ended: eval/samples/reward >= 0.7 was never reached: the highest was 0.6, at" in text


@pytest.mark.long
def test_iterations_end_at_the_first_reward_that_reaches_the_value(
    train, stage, tmp_path, monkeypatch
):
    rewards = iter([0.2, 0.4, 0.6, 0.9])
    metrics = PolicyEvaluation.metrics

    def with_reward(self):
        return metrics(self) | {"samples/reward": next(rewards)}

    monkeypatch.setattr(PolicyEvaluation, "metrics", with_reward)
    train(tmp_path, keys={"evaluate_every": 1, "ppo.stop_at": "eval/samples/reward>=0.5"})
    summary = json.loads((tmp_path / "ppo" / "summary.json").read_text())
    assert summary["stop_at"]["stopped_at"] == 2
    assert len(list(rewards)) == 1
