"""What members of a sweep are compared by: no loss where it means another thing in each of them."""

import csv
import itertools
import json

import pytest

from dpojax import storage
from dpojax.sweeps import table
from dpojax.sweeps.best import measure_keys

BETAS = [{"preference.beta": 0.1}, {"preference.beta": 1.0}]
RATES = [{"preference.learning_rate": 1e-3, "seed": 0}, {"preference.learning_rate": 1e-4}]
LINE = {"step": 5, "loss": 0.5, "rewards/accuracies": 0.7, "rewards/margins": 1.0}
LINE |= {"kl/per_token": 0.25}


@pytest.mark.parametrize(
    ("members", "keys"),
    [(BETAS, ["preference.beta"]), (RATES, []), ([BETAS[0]] * 2, []), ([*BETAS, *RATES], BETAS[0])],
)
def test_losses_of_another_beta_are_another_measure_and_those_of_another_rate_are_not(
    members, keys
):
    assert measure_keys(members, "preference") == [*keys]


def test_the_table_has_no_loss_where_it_cannot_be_compared():
    headings = [column.heading for column in table._columns({"a": LINE}, True)]
    assert headings == ["held-out loss", "accuracy, %", "margin", "KL, nats/token"]
    shown = [column.heading for column in table._columns({"a": LINE}, False)]
    assert shown == headings[1:]


def make_members(folder, accuracies, failed=(), units=()):
    """Workdirs of members as runs leave them; returns what writes the table of a sweep of them."""
    for name, unit in itertools.zip_longest(accuracies, units):
        accuracy = accuracies[name]
        (folder / name / "preference").mkdir(parents=True)
        summary = {"reward": {"unit": unit}} if unit else {}
        (folder / name / "preference" / "summary.json").write_text(json.dumps(summary))
        line = LINE | {"split": "eval", "time": 1.0, "rewards/accuracies": accuracy}
        (folder / name / "preference" / "metrics.jsonl").write_text(json.dumps(line) + "\n")
        (folder / name / "finished.json").write_text("{}")
    for name in failed:
        (folder / name).mkdir(parents=True)
        (folder / name / "failed.txt").write_text("loss is not finite at step 0")
    config = {"stages": ["preference"], "seed": 0, "trackers": []}
    return lambda members, best="eval/loss": table.write_table(
        storage.as_path(folder), {"config": config, "members": members}, best
    )


def test_a_best_member_that_cannot_be_named_takes_away_no_table(tmp_path):
    """A sweep of learning rates in a workdir that holds members of another beta."""
    write = make_members(tmp_path, {"a": 0.7, "b": 0.8})
    text = write(dict(zip("ab", BETAS)))
    assert "70.0" in text
    assert "members differ in preference.beta" in text
    assert not (tmp_path / "best.json").exists()


def test_a_sweep_that_grew_has_no_best_member_of_before(tmp_path):
    members = dict(zip("abc", [*RATES, {"preference.learning_rate": 1e-2}]))
    best = lambda: json.loads((tmp_path / "best.json").read_text())["setting"]
    write = make_members(tmp_path, {"a": 0.7, "b": 0.8})
    write({name: members[name] for name in "ab"}, "eval/rewards/accuracies")
    assert best() == "learning_rate-0.0001"
    write = make_members(tmp_path, {"c": 0.9})
    assert "best by eval/rewards/accuracies" in write(members, "")
    assert best() == "learning_rate-0.01"
    write(members | {"d": BETAS[1]}, "eval/loss")  # refused: another beta is another loss
    assert not (tmp_path / "best.json").exists()


@pytest.mark.parametrize(
    ("units", "heading"),
    [
        (("nats per token", "nats per token"), "margin, nats per token"),
        (("no unit", "no unit"), "margin, no unit"),
        (("nats", "nats per token"), "margin  "),  # of DPO and SimPO
        ((), "margin  "),
    ],
)
def test_the_margin_has_the_unit_of_the_reward_where_all_members_have_one(tmp_path, units, heading):
    text = make_members(tmp_path, {"a": 0.7, "b": 0.8}, units=units)(dict(zip("ab", RATES)), "")
    assert heading in text.splitlines()[0]


def test_a_sweep_of_which_all_members_failed_or_none_has_begun_has_a_table(tmp_path):
    write = make_members(tmp_path, {}, failed=("a",))
    text = write({"a": RATES[0]})
    assert "a (failed)" in text
    assert "no setting has a finite eval/loss for each of its seeds" in text
    (row,) = csv.DictReader((tmp_path / "sweep.csv").read_text().splitlines())
    assert row["failed"] == "loss is not finite at step 0"
    best = json.loads((tmp_path / "best.json").read_text())
    assert best == {"criterion": "eval/loss", "metric": "loss", "setting": None}
    write({"b": RATES[1]})
    assert (tmp_path / "sweep.csv").read_text().splitlines() == [
        "member,preference.learning_rate,step,failed"
    ]
