"""A stage keeps its best evaluation by the metric that its config names, and stops early."""

import json
import re

import numpy as np
import pytest

from dpojax.config.errors import ConfigError
from dpojax.models import huggingface
from dpojax.runs.export import export
from dpojax.runs.policy import load_policy
from dpojax.runs.run import run
from dpojax.stages import train
from dpojax.stages.registry import open_stage, resolve
from dpojax.stages.setup import prepare_setup
from dpojax.sweeps.members import same_program
from dpojax.sweeps.table import kept_evaluation
from dpojax.training import checkpoints

from .conftest import tiny_config

# What the evaluations after steps 0, 2, 4, 6 find; 0.04 -> 1.9 is what a user's DPO run found.
LOSSES = {0: 0.693, 2: 0.04, 4: 1.9, 6: 1.9}


def kept_config():
    return tiny_config(
        **{
            "stages": ("preference",),
            "evaluate_every": 2,
            "checkpoint_every": 5,
            "preference.steps": 20,
            "preference.keep_best": "eval/loss",
            "preference.patience": 2,
        }
    )


@pytest.fixture(scope="module")
def kept_run(tmp_path_factory):
    """A finished DPO run whose held-out loss was lowest at step 2, and which stopped at step 6."""
    workdir = tmp_path_factory.mktemp("kept") / "run"
    evaluate = train.Evaluator.__call__

    def with_loss(self, stage, state):
        return evaluate(self, stage, state) | {"loss": LOSSES[int(state.step)]}

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(train.Evaluator, "__call__", with_loss)
        run(kept_config(), str(workdir))
    return workdir


@pytest.mark.long
def test_a_run_whose_held_out_loss_rises_stops_and_keeps_the_step_where_it_was_lowest(kept_run):
    folder = kept_run / "preference" / "checkpoints"
    assert {int(path.name) for path in folder.iterdir()} == {2, 5, 6}
    assert checkpoints.best(folder) == (-0.04, 2)
    text = (kept_run / "preference" / "summary.txt").read_text()
    assert (
        "kept: step 2 of 20, where eval/loss was lowest: 0.04; stopped at step 6 after 2 "
        "evaluation(s) without a better one" in text
    )
    kept = json.loads((kept_run / "preference" / "summary.json").read_text())["kept"]
    assert (kept["step"], kept["stopped_at"], kept["metric"]) == (2, 6, "loss")


@pytest.mark.long
def test_export_and_policies_by_name_are_of_the_kept_step(kept_run, tmp_path):
    _, best, _ = huggingface.load(export(kept_run, tmp_path / "best"))
    _, second, _ = huggingface.load(export(kept_run, tmp_path / "second", step=2))
    _, last, _ = huggingface.load(export(kept_run, tmp_path / "last", step=6))
    table = lambda params: np.asarray(params["embed"]["tokens"])
    np.testing.assert_array_equal(table(best), table(second))
    assert not np.array_equal(table(best), table(last))
    np.testing.assert_array_equal(table(load_policy(str(kept_run)).params), table(best))


@pytest.mark.long
def test_the_table_of_a_sweep_shows_the_kept_step(kept_run):
    lines = [{"step": step, "loss": loss} for step, loss in LOSSES.items()]
    assert kept_evaluation(kept_run / "preference", lines) == {"step": 2, "loss": 0.04}
    assert kept_evaluation(kept_run / "sft", lines)["step"] == 6  # keeps none


@pytest.mark.long
def test_a_finished_run_that_stopped_early_trains_no_more(kept_run, capsys):
    (kept_run / "finished.json").unlink()
    before = (kept_run / "preference" / "metrics.jsonl").read_text()
    config = kept_config()
    config.evaluate_every = 3
    with pytest.raises(ConfigError, match=r"evaluate_every: 2 -> 3"):
        run(config, str(kept_run))
    config.evaluate_every = 2
    run(config, str(kept_run))
    assert (kept_run / "preference" / "metrics.jsonl").read_text() == before
    assert "kept: step 2 of 20" in capsys.readouterr().out


LIVE = {"preference.loss": "tdpo", "preference.reference.kind": "live"}
REWARDS = "eval/rewards/accuracies, eval/rewards/chosen"


@pytest.mark.parametrize(
    ("stage", "known", "changes"),
    [
        ("sft", "eval/logps/chosen, eval/loss", {}),
        ("preference", REWARDS, {}),
        ("preference", REWARDS, {"preference.loss": "kto"}),
        ("preference", REWARDS, {"preference.loss": "simpo"}),
        ("preference", REWARDS, LIVE),
        ("preference", REWARDS, LIVE | {"preference.lora.rank": 2}),
        ("reward", REWARDS, {}),
        ("classifier", "eval/accuracy, eval/cross_entropy, eval/loss", {}),
    ],
)
def test_a_metric_that_no_evaluation_has_is_refused_before_data_are_read(
    stage, known, changes, tmp_path
):
    changes |= {"classifier.data.source": "no/such.jsonl", f"{stage}.keep_best": "+nothing"}
    run = resolve(tiny_config(**changes, stages=(stage,)), tmp_path)
    opened = open_stage(prepare_setup(run), stage)
    said = rf"config\.{stage}\.keep_best: .* no eval/nothing; they have .*{re.escape(known)}"
    with pytest.raises(ConfigError, match=said):
        opened.prepare()


@pytest.mark.long
def test_members_of_a_sweep_that_keep_their_best_train_one_after_another(tmp_path):
    runs = [
        resolve(tiny_config(**{"preference.beta": beta, "preference.keep_best": best}), tmp_path)
        for best in ("", "eval/loss")
        for beta in (0.1, 0.5)
    ]
    assert same_program(runs) == [[0, 1], [2], [3]]


def test_a_warm_up_that_is_longer_than_the_run_is_told(tmp_path):
    config = tiny_config(**{"stages": ("sft",), "sft.steps": 4, "sft.warmup_steps": 7})
    stage = open_stage(prepare_setup(resolve(config, tmp_path)), "sft").prepare()
    assert "the warm-up takes 7 steps and the stage has 4" in stage.describe()
    assert "ends at 50% of it" in stage.describe()  # (4 - 1 + 1) / (7 + 1)
    config.sft.warmup_steps = 3
    stage = open_stage(prepare_setup(resolve(config, tmp_path)), "sft").prepare()
    assert "WARNING" not in stage.describe()
