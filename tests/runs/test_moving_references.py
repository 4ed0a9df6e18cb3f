"""Runs whose loss changes with the policy: a synchronised reference, a beta that moves."""

import shutil

import pytest

from dpojax import storage
from dpojax.runs.run import run
from dpojax.sweeps.members import member_names, member_run, same_program
from dpojax.sweeps.sweep import run_sweep
from tests import further

from .conftest import lines, tiny_config

HUMANLINE = {"humanline_low": -1.0, "humanline_high": 1.5, "sync_every": 2}
ADAPTERS = "a synchronised reference of adapters"
MOVING = {
    "a synchronised reference": HUMANLINE,
    ADAPTERS: HUMANLINE | {"lora.rank": 2},
    "epsilon_dpo": {"loss": "epsilon_dpo", "reference.kind": "live", "epsilon": 0.1},
}


@pytest.mark.slow
@pytest.mark.parametrize("name", ["a synchronised reference", *further(ADAPTERS, "epsilon_dpo")])
def test_a_run_that_goes_on_between_two_changes_has_the_losses_of_an_undisturbed_one(
    name, tmp_path
):
    changes = {f"preference.{key}": value for key, value in MOVING[name].items()}
    config = tiny_config(**changes, stages=("preference",), checkpoint_every=3, max_checkpoints=9)
    config.preference.learning_rate = 0.03
    whole, again = tmp_path / "whole", tmp_path / "again"
    run(config, str(whole))
    losses = lambda folder: [(line["step"], line["loss"]) for line in lines(folder, "preference")]
    shutil.copytree(whole, again)
    last = again / "preference" / "checkpoints" / "6"
    shutil.rmtree(last)
    (again / "finished.json").unlink()
    run(config, str(again))
    assert last.exists()
    assert len({loss for _, loss in losses(whole)}) > 6  # the losses of all steps differ
    assert losses(again) == losses(whole)


@pytest.mark.slow
def test_the_reference_of_each_member_of_a_sweep_follows_its_own_policy(tmp_path):
    changes = {f"preference.{key}": value for key, value in HUMANLINE.items()}
    config = tiny_config(**changes, stages=("preference",))
    members = [{"preference.learning_rate": 0.03}, {"preference.learning_rate": 0.001}]
    runs = [member_run(config, changes, storage.as_path("nowhere")) for changes in members]
    assert same_program(runs) == [[0, 1]]
    assert run_sweep(config, members, str(tmp_path / "sweep")) == {}
    losses = lambda folder: [line["loss"] for line in lines(folder, "preference")]
    together = [losses(tmp_path / "sweep" / name) for name in member_names(members, "preference")]
    config.update_from_flattened_dict(members[1])  # the one that would be led astray
    run(config, str(tmp_path / "alone"))
    assert together[1] == pytest.approx(losses(tmp_path / "alone"), abs=1e-5)
    assert together[0] != pytest.approx(together[1], abs=1e-3)
