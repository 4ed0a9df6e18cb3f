"""Stages besides SFT and DPO on pairs: a reward model, labelled responses, no reference."""

import json

import numpy as np
import pytest

from dpojax.config.errors import ConfigError
from dpojax.config.saved import read_run_config
from dpojax.data.packing import Shape
from dpojax.data.rows import empty
from dpojax.evaluation.rewards import open_reward
from dpojax.models import huggingface
from dpojax.runs.export import export
from dpojax.runs.run import run
from dpojax.stages import train
from dpojax.stages.example_stage import make_programs
from dpojax.stages.registry import open_stage, resolve
from dpojax.stages.setup import prepare_setup

from .. import metrics_page
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
    config = tiny_config(
        **{
            "stages": ("reward",),
            "max_checkpoints": 1,
            "reward.data.source": str(pairs),
            "reward.batch_size": 8,
            "reward.steps": 12,
            "reward.learning_rate": 0.03,
            "reward.warmup_steps": 0,
        }
    )
    evaluate = train.evaluate_batches

    def with_accuracy(*args, **kwargs):
        return evaluate(*args, **kwargs) | {"rewards/accuracies": next(accuracies)}

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(train, "evaluate_batches", with_accuracy)
        run(config, str(workdir / "run"))
    return workdir / "run"


@pytest.mark.long
def test_a_reward_model_learns_its_pairs(reward_run):
    assert metrics_page.undefined(lines(reward_run, "reward")) == set()
    losses = train_losses(reward_run, "reward")
    assert losses[0] == pytest.approx(0.693, abs=0.02)  # two almost equal scores: log 2
    assert losses[-1] < 0.5


@pytest.mark.long
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
    assert "step 6 of 12, where eval/rewards/accuracies was highest: 0.9 (before training" in text


@pytest.mark.long
def test_the_exported_reward_is_centred_on_the_held_out_responses(reward_run, tmp_path):
    out = export(str(reward_run), str(tmp_path / "exported"))
    held_out = json.loads((reward_run / "reward" / "summary.json").read_text())["values"]["after"]
    assert abs(held_out["rewards/mean"]) > 1e-3
    setup = prepare_setup(resolve(read_run_config(reward_run), reward_run))
    data = open_stage(setup, "reward").prepare().batches.data
    lines = [int(data.examples[i].id.rsplit(":", 1)[1]) for i in data.held_out]
    prompts = [f"the film {line - 1}" for line in lines for _ in range(2)]
    scores = open_reward(f"reward_model:{out}")(prompts, [" was good", " was bad"] * len(lines))
    assert scores.mean() == pytest.approx(0, abs=1e-5)
    assert (scores.reshape(-1, 2) @ [1, -1] > 0).all()


@pytest.mark.long
@pytest.mark.parametrize("loss", ["kto", "simpo"])
def test_a_run_of_labelled_responses_or_without_a_reference_ends_with_its_summary(loss, tmp_path):
    config = tiny_config(**{"preference.loss": loss, "preference.steps": 4})
    config.stages = ("preference",)
    run(config, str(tmp_path))
    text = (tmp_path / "preference" / "summary.txt").read_text()
    saved = json.loads((tmp_path / "config.json").read_text())["preference"]
    cached = list(tmp_path.glob("preference/reference_logprobs/*.npy"))
    if loss == "kto":
        assert "desirable became less likely" in text
        assert "20 held-out labelled responses" in text
        assert cached
        assert saved["desirable_weight"] == 1.0
    else:
        assert "policy finds the chosen response likelier" in text
        assert not cached
        assert (saved["beta"], saved["gamma"]) == (2.0, 1.0)
    assert len(train_losses(tmp_path, "preference")) == 4
    # The summary has the rewards and the KL of the last evaluation.
    last = [x for x in lines(tmp_path, "preference") if x["split"] == "eval"][-1]
    summary = json.loads((tmp_path / "preference" / "summary.json").read_text())
    after = summary["values"]["after"]
    for name in ("rewards/accuracies", "rewards/chosen", "rewards/rejected"):
        assert after[name] == pytest.approx(last[name], abs=1e-5)
    assert summary["kl_per_token_exact"]["after"] == pytest.approx(last["kl/per_token"], abs=1e-7)
    assert last["kl/per_token"] > 0
    formula = {"kto": "beta (log p - log q)", "simpo": "beta log p / length"}[loss]
    assert f"reward: {formula}, with p of the policy" in text


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"loss": "tdpo"}, r"config\.preference\.reference\.kind: tdpo needs .* set it to live"),
        (
            {"loss": "epsilon_dpo"},
            r"config\.preference\.reference\.kind: epsilon_dpo needs .* live",
        ),
        (
            {"sync_every": 1, "reference.kind": "live"},
            r"config\.preference\.sync_every: .* at cached",
        ),
        (
            {"sync_every": 1, "reference.path": "x"},
            r"config\.preference\.sync_every: .*reference\.path empty",
        ),
        ({"loss": "simpo", "tau": 1.0}, r"config\.preference\.tau: simpo has no such option"),
        ({"loss": "dpop"}, r"config\.preference\.penalty: dpop needs it and has no default"),
        ({"preset": "trl"}, r"config\.preference\.preset: there is no 'trl'"),
    ],
)
def test_a_loss_that_cannot_run_as_configured_is_refused_by_key(changes, message):
    with pytest.raises(ConfigError, match=message):
        resolve(tiny_config(**{f"preference.{key}": x for key, x in changes.items()}), "unused")


def test_rows_with_and_without_the_references_log_probs_are_scored_by_one_program():
    traced = []

    def score(params, rows, *, reference=None):
        del reference
        traced.append(rows)
        return params + rows.target

    scored = make_programs(None, None, score).score
    rows = empty(Shape(1, 2, 8, 4, 1, 2))
    attached = rows._replace(reference=np.zeros(rows.target.shape, np.float32))
    for batch in (rows, attached):
        np.testing.assert_array_equal(scored(np.int32(3), batch), rows.target + 3)
    assert len(traced) == 1
