"""A stage stops at the evaluation that reaches the value of its config, and stays stopped."""

import json

import jax
import numpy as np
import pytest

from dpojax.config.errors import ConfigError
from dpojax.runs.run import run
from dpojax.runs.workdirs import FINISHED
from dpojax.stages import train
from dpojax.stages.registry import open_stage, resolve
from dpojax.stages.setup import prepare_setup
from dpojax.sweeps.sweep import run_sweep
from dpojax.training import checkpoints
from dpojax.training.preemption import Preempted, StopSignal

from .conftest import lines, tiny_config

pytestmark = pytest.mark.long  # tests/training/test_loop.py and test_vectorised_loop.py are faster

# Held-out losses after the steps of evaluations, by beta; the values that stop are 0.5 or less.
LOSSES = {
    0.1: {0: 0.69, 2: 0.6, 4: 0.45, 6: 0.4, 8: 0.3},
    0.5: {0: 0.69, 2: 0.5, 4: 0.6, 6: 0.6, 8: 0.6},
    1.0: {0: 0.4, 2: 0.6, 4: 0.6, 6: 0.55, 8: 0.52},
}
STOPS = {0.1: 4, 0.5: 2, 1.0: 8}  # where each ends
NAMES = {0.1: "beta-0.1", 0.5: "beta-0.5", 1.0: "beta-1"}


def config_of(**changes):
    keys = {
        "stages": ("preference",),
        "evaluate_every": 2,
        "checkpoint_every": 3,
        "preference.steps": 8,
        "preference.stop_at": "eval/loss<=0.5",
    }
    return tiny_config(**keys | changes)


@pytest.fixture(scope="module", autouse=True)
def known_losses():
    """Evaluations find the losses above, whatever the weights are."""
    evaluate = train.Evaluator.__call__

    def with_loss(self, stage, state):
        losses = LOSSES[stage.config.beta]
        return evaluate(self, stage, state) | {"loss": losses[int(state.step)]}

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train.Evaluator, "__call__", with_loss)
        yield


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    """The workdir of a finished run that stopped at step 4 of 8."""
    workdir = tmp_path_factory.mktemp("alone") / "run"
    run(config_of(**{"preference.beta": 0.1}), str(workdir))
    return workdir


def params_of(workdir, beta):
    resolved = resolve(config_of(**{"preference.beta": beta}), workdir)
    return open_stage(prepare_setup(resolved), "preference").trained_params()


def steps_evaluated(workdir):
    return [x["step"] for x in lines(workdir, "preference") if x["split"] == "eval"]


def test_a_run_stops_at_the_first_evaluation_that_reaches_the_value_and_says_so(alone):
    assert steps_evaluated(alone) == [0, 2, 4]
    summary = json.loads((alone / "preference" / "summary.json").read_text())["stop_at"]
    assert (summary["stopped_at"], summary["condition"]) == (4, "eval/loss <= 0.5")
    text = (alone / "preference" / "summary.txt").read_text()
    assert "ended: step 4 of 8, the first evaluation with eval/loss <= 0.5: 0.45" in text
    assert "kept:" not in text  # the result is the last step
    assert checkpoints.best(alone / "preference" / "checkpoints") is None


def test_a_run_that_stopped_stays_stopped(alone):
    (alone / FINISHED).unlink()
    before = (alone / "preference" / "metrics.jsonl").read_text()
    config = config_of(**{"preference.beta": 0.1})
    config.evaluate_every = 1
    with pytest.raises(ConfigError, match=r"evaluate_every: 2 -> 1"):
        run(config, str(alone))
    config.evaluate_every = 2
    run(config, str(alone))
    assert (alone / "preference" / "metrics.jsonl").read_text() == before
    assert (alone / FINISHED).exists()


@pytest.fixture(scope="module")
def swept(tmp_path_factory):
    """The folder of a sweep that was stopped twice: after a member had ended, and as one ended."""
    folder = tmp_path_factory.mktemp("swept") / "sweep"
    members = [{"preference.beta": beta} for beta in LOSSES]
    for at in (3, 4):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(StopSignal, "agreed", lambda self, step=None, at=at: step == at)
            with pytest.raises(Preempted, match=rf"stopped at step {at} of 8"):
                run_sweep(config_of(), members, str(folder))
    assert run_sweep(config_of(), members, str(folder)) == {}
    return folder


def test_each_member_of_a_sweep_stops_for_itself_and_all_train_as_one_program(swept):
    groups = json.loads((swept / "sweep.json").read_text())["groups"]
    assert groups == [[*NAMES.values()]]
    for beta, last in STOPS.items():
        assert steps_evaluated(swept / NAMES[beta]) == list(range(0, last + 1, 2))
    text = (swept / "beta-1" / "preference" / "summary.txt").read_text()
    assert "ended: eval/loss <= 0.5 was never reached: the lowest was 0.52, at step 8 of 8" in text
    assert "before training it was 0.4, which does not count" in text


def test_a_member_that_stops_has_the_weights_of_a_run_of_its_own(swept, alone):
    """At step 4, from where the sweep went on; the weights after another step differ by 3e-4."""
    pair = params_of(swept / "beta-0.1", 0.1), params_of(alone, 0.1)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), *pair)


def test_the_table_of_a_sweep_shows_at_which_step_each_member_ended(swept):
    header, *rows = (swept / "sweep.csv").read_text().splitlines()
    step = header.split(",").index("step")
    assert [int(row.split(",")[step]) for row in rows] == list(STOPS.values())
