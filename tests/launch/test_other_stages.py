"""Stages besides SFT and DPO on pairs: a reward model, labelled responses, no reference."""

import json

import pytest

from dpojax.launch.config import ConfigError, check
from dpojax.launch.export import export
from dpojax.launch.run import run
from dpojax.models import huggingface

from .conftest import lines, tiny_config


def train_losses(workdir, stage):
    return [line["loss"] for line in lines(workdir, stage) if line["split"] == "train"]


def test_a_reward_model_learns_its_pairs_and_exports_as_a_classifier(tmp_path):
    pairs = tmp_path / "pairs.jsonl"
    rows = (
        {"prompt": f"the film {i}", "chosen": " was good", "rejected": " was bad"}
        for i in range(40)
    )
    pairs.write_text("\n".join(map(json.dumps, rows)))
    config = tiny_config(
        **{
            "reward.data.source": str(pairs),
            "reward.batch_size": 8,
            "reward.steps": 12,
            "reward.learning_rate": 0.03,
            "reward.warmup_steps": 0,
        }
    )
    config.stages = ("sft", "reward")
    run(config, str(tmp_path / "run"))
    losses = train_losses(tmp_path / "run", "reward")
    assert losses[0] == pytest.approx(0.693, abs=0.02)  # two almost equal scores: log 2
    assert losses[-1] < 0.5
    summary = json.loads((tmp_path / "run" / "reward" / "summary.json").read_text())
    assert summary["values"]["after"]["rewards/accuracies"] == 1.0
    exported = export(str(tmp_path / "run"), str(tmp_path / "exported"))
    assert huggingface.read_config(str(exported))[0].scalar_head


@pytest.mark.parametrize("loss", ["kto", "simpo"])
def test_a_run_of_labelled_responses_or_without_a_reference_ends_with_its_summary(loss, tmp_path):
    config = tiny_config(**{"dpo.loss": loss, "dpo.steps": 4})
    config.stages = ("dpo",)
    run(config, str(tmp_path))
    text = (tmp_path / "dpo" / "summary.txt").read_text()
    found = json.loads((tmp_path / "config.json").read_text())["dpo"]
    cached = list(tmp_path.glob("dpo/reference_logprobs/*.npy"))
    if loss == "kto":
        assert "desirable became less likely" in text
        assert "20 held-out labelled responses" in text
        assert cached
        assert found["desirable_weight"] == 1.0
    else:
        assert "policy finds the chosen response likelier" in text
        assert not cached
        assert (found["beta"], found["gamma"]) == (2.0, 1.0)
    assert len(train_losses(tmp_path, "dpo")) == 4


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"dpo.loss": "tdpo"}, "config.dpo.reference.kind: tdpo needs .* set it to live"),
        ({"dpo.loss": "simpo", "dpo.tau": 1.0}, "config.dpo.tau: simpo has no such option"),
        ({"dpo.loss": "dpop"}, "config.dpo.penalty: dpop needs it and has no default"),
        ({"dpo.preset": "trl"}, "config.dpo.preset: there is no 'trl'"),
    ],
)
def test_a_loss_that_cannot_run_as_configured_is_refused_by_key(changes, message):
    with pytest.raises(ConfigError, match=message):
        check(tiny_config(**changes))
