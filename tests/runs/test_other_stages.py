"""Stages besides SFT and DPO on pairs: a reward model, labelled responses, no reference."""

import json

import numpy as np
import pytest

from dpojax.data.packing import Shape
from dpojax.data.rows import empty
from dpojax.evaluation.rewards import open_reward
from dpojax.stages import stage as stages
from dpojax.config.checks import ConfigError, check
from dpojax.runs.export import export, read_config
from dpojax.runs.run import run
from dpojax.stages.setup import prepare
from dpojax.models import huggingface

from .conftest import lines, tiny_config


def train_losses(workdir, stage):
    return [line["loss"] for line in lines(workdir, stage) if line["split"] == "train"]


@pytest.fixture(scope="module")
def reward_run(tmp_path_factory):
    """A finished reward stage whose evaluations after steps 0, 3, ..., 12, and in the summary, are
    made to find these accuracies."""
    accuracies = iter([0.99, 0.6, 0.9, 0.7, 0.8, 0.9])
    workdir = tmp_path_factory.mktemp("reward")
    rows = (
        {"prompt": f"the film {i}", "chosen": " was good", "rejected": " was bad"}
        for i in range(40)
    )
    pairs = workdir / "pairs.jsonl"
    pairs.write_text("\n".join(map(json.dumps, rows)))
    given = {"source": str(pairs), "steps": 12, "learning_rate": 0.03, "warmup_steps": 0}
    given = {("data." if key == "source" else "") + key: value for key, value in given.items()}
    config = tiny_config(keep=1, **{f"reward.{key}": value for key, value in given.items()})
    config.stages, config.reward.batch_size = ("reward",), 8
    evaluate = stages.Stage.evaluate

    def said(self, *args, **kwargs):
        return evaluate(self, *args, **kwargs) | {"rewards/accuracies": next(accuracies)}

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(stages.Stage, "evaluate", said)
        run(config, str(workdir / "run"))
    return workdir / "run"


def test_a_reward_model_learns_its_pairs(reward_run):
    losses = train_losses(reward_run, "reward")
    assert losses[0] == pytest.approx(0.693, abs=0.02)  # two almost equal scores: log 2
    assert losses[-1] < 0.5


def test_the_reward_model_of_the_best_evaluation_is_kept_summarised_and_exported(
    reward_run, tmp_path
):
    steps = {int(path.name) for path in (reward_run / "reward" / "checkpoints").iterdir()}
    assert steps == {6, 12}
    weights = []
    for step in (None, 6, 12):
        out = export(str(reward_run), str(tmp_path / f"step {step}"), step=step)
        config, params, _ = huggingface.load(str(out))
        assert config.scalar_head
        weights.append(params["score"]["kernel"])
    best, sixth, last = weights
    assert np.array_equal(best, sixth)
    assert not np.array_equal(best, last)
    text = (reward_run / "reward" / "summary.txt").read_text()
    assert "step 6 of 12, the best held-out accuracy" in text


def test_the_exported_reward_is_centred_on_the_held_out_responses(reward_run, tmp_path):
    out = export(str(reward_run), str(tmp_path / "exported"))
    held_out = json.loads((reward_run / "reward" / "summary.json").read_text())["values"]["after"]
    assert abs(held_out["rewards/mean"]) > 1e-3
    data = stages.prepare("reward", prepare(read_config(reward_run), reward_run)).data
    lines = [int(data.examples[i].id.rsplit(":", 1)[1]) for i in data.held_out]
    prompts = [f"the film {line - 1}" for line in lines for _ in range(2)]
    scores = open_reward(f"reward_model:{out}")(prompts, [" was good", " was bad"] * len(lines))
    assert scores.mean() == pytest.approx(0, abs=1e-5)
    assert (scores.reshape(-1, 2) @ [1, -1] > 0).all()


@pytest.mark.parametrize("loss", ["kto", "simpo"])
def test_a_run_of_labelled_responses_or_without_a_reference_ends_with_its_summary(loss, tmp_path):
    config = tiny_config(**{"preference.loss": loss, "preference.steps": 4})
    config.stages = ("preference",)
    run(config, str(tmp_path))
    text = (tmp_path / "preference" / "summary.txt").read_text()
    found = json.loads((tmp_path / "config.json").read_text())["preference"]
    cached = list(tmp_path.glob("preference/reference_logprobs/*.npy"))
    if loss == "kto":
        assert "desirable became less likely" in text
        assert "20 held-out labelled responses" in text
        assert cached
        assert found["desirable_weight"] == 1.0
    else:
        assert "policy finds the chosen response likelier" in text
        assert not cached
        assert (found["beta"], found["gamma"]) == (2.0, 1.0)
    assert len(train_losses(tmp_path, "preference")) == 4


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"preference.loss": "tdpo"}, "config.preference.reference.kind: tdpo needs .* set it to live"),
        ({"preference.loss": "simpo", "preference.tau": 1.0}, "config.preference.tau: simpo has no such option"),
        ({"preference.loss": "dpop"}, "config.preference.penalty: dpop needs it and has no default"),
        ({"preference.preset": "trl"}, "config.preference.preset: there is no 'trl'"),
    ],
)
def test_a_loss_that_cannot_run_as_configured_is_refused_by_key(changes, message):
    with pytest.raises(ConfigError, match=message):
        check(tiny_config(**changes))


def test_rows_with_and_without_the_references_log_probs_are_scored_by_one_program():
    traced = []

    def score(params, rows, reference_params=None):
        traced.append(rows)
        return params + rows.target

    run = stages._scoring(score)
    rows = empty(Shape(1, 2, 8, 4, 1, 2))
    attached = rows._replace(reference=np.zeros(rows.target.shape, np.float32))
    for given in (rows, attached):
        np.testing.assert_array_equal(run(np.int32(3), given), rows.target + 3)
    assert len(traced) == 1
