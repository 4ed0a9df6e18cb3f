"""dpojax compare shows what runs differ in, whatever state they are in."""

import csv
import json

import pytest

from dpojax.config.command_line import UsageError
from dpojax.config.defaults import default_config
from dpojax.config.errors import ConfigError
from dpojax.config.resolved import as_json
from dpojax.sweeps.compare import describe, differences, read_runs, short_labels, write_comparison


def make_run(folder, accuracies, *, finished=True, failed="", files=None, **changes):
    """A workdir as a run leaves it: its config, and an evaluation every 10 steps."""
    config = default_config()
    config.update_from_flattened_dict(changes)
    stage = folder / config.stages[-1]
    stage.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(as_json(config)))
    contents = {"version": {"dpojax": "1", "code": "abc"}, "files": files or {}}
    (folder / "contents.json").write_text(json.dumps(contents))
    lines = [
        {"step": 10 * k, "split": "eval", "rewards/accuracies": x, "rewards/margins": float(k)}
        | {"loss": 0.7 - x / 2, "rewards/chosen": 0.1}
        for k, x in enumerate(accuracies)
    ]
    (stage / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    if finished:
        (folder / "finished.json").write_text("{}")
    if failed:
        (folder / "failed.txt").write_text(failed)
    return str(folder)


@pytest.fixture
def workdirs(tmp_path):
    file = ["pairs.jsonl", "1" * 64, {}]
    return [
        make_run(
            tmp_path / "runs" / "a",
            [0.0, 0.6, 0.7],
            files={"preference.data.source": file},
            **{"preference.beta": 0.1, "max_checkpoints": 3},
        ),
        make_run(
            tmp_path / "runs" / "b",
            [0.0, 0.5],
            finished=False,
            files={"preference.data.source": ["pairs.jsonl", "2" * 64, {}]},
            **{"preference.beta": 1.0, "preference.learning_rate": 1e-5},
        ),
        make_run(
            tmp_path / "runs" / "c",
            [0.0],
            finished=False,
            failed="loss is not finite at step 3",
            **{"preference.beta": 1.0},
        ),
    ]


def test_keys_that_change_no_result_are_no_difference(workdirs):
    runs, stage = read_runs(workdirs)
    assert stage == "preference"
    assert [run.label for run in runs] == ["a", "b", "c"]
    rows = differences(runs)
    assert rows["preference.beta"] == ["0.1", "1.0", "1.0"]
    assert rows["preference.learning_rate"] == ["0.0003", "1e-05", "0.0003"]
    assert rows["files of preference.data.source"] == ["1" * 12, "2" * 12, ""]
    assert set(rows) == {
        "preference.beta",
        "preference.learning_rate",
        "files of preference.data.source",
    }


@pytest.mark.parametrize("width", [100, 60])
def test_what_is_printed_fits_and_says_how_far_each_run_is(workdirs, width):
    runs, stage = read_runs(workdirs)
    text = describe(runs, stage, "", width)
    assert max(map(len, text.splitlines())) <= width
    a, b, c = (line.split() for line in text.splitlines()[3:6])
    assert (a[:3], b[:4], c[:2]) == (
        ["a", "finished", "20"],  # the step that it kept
        ["b", "step", "10", "10"],
        ["c", "failed"],
    )
    assert "c failed: loss is not finite at step 3" in text
    assert "held-out loss" not in text
    assert "margin, nats" not in text
    on_one_line = text.replace("\n", " ")
    assert "Losses and margins are not compared" in on_one_line
    assert "preference.beta differs" in on_one_line
    curve = text[text.index("eval/rewards/accuracies") :].splitlines()
    # At step 0 the policy is the reference, and no accuracy means anything.
    assert curve[1].split() == ["step", "10", "0.6000", "0.5000"]
    assert curve[2].split() == ["step", "20", "0.7000"]


def test_a_metric_may_be_named_and_an_unknown_one_is_told(workdirs):
    runs, stage = read_runs(workdirs[:2])
    assert "eval/loss" in describe(runs, stage, "loss", 100)
    with pytest.raises(UsageError, match="they have loss, rewards/accuracies"):
        describe(runs, stage, "los", 100)


def test_tables_and_figure_are_written_with_runs_that_failed(workdirs, tmp_path):
    runs, _ = read_runs(workdirs)
    assert write_comparison(runs, "preference", tmp_path / "out") == [
        "runs.csv",
        "curves.csv",
        "curves.png",
    ]
    rows = list(csv.DictReader((tmp_path / "out" / "runs.csv").read_text().splitlines()))
    assert [row["status"] for row in rows] == [
        "finished",
        "step 10",
        "failed: loss is not finite at step 3",
    ]
    assert [row["rewards/accuracies"] for row in rows] == ["0.7", "0.5", ""]
    assert [row["preference.beta"] for row in rows] == ["0.1", "1.0", "1.0"]
    curves = list(csv.DictReader((tmp_path / "out" / "curves.csv").read_text().splitlines()))
    assert [(row["run"], row["step"]) for row in curves] == [
        ("a", "0"),
        ("a", "10"),
        ("a", "20"),
        ("b", "0"),
        ("b", "10"),
        ("c", "0"),
    ]


def test_a_sweep_stands_for_its_members(tmp_path):
    folder = tmp_path / "sweep"
    for name, beta in {"beta-0.1": 0.1, "beta-1": 1.0}.items():
        make_run(folder / name, [0.0, 0.6], **{"preference.beta": beta})
    plan = {"config": {}, "members": {"beta-0.1": {}, "beta-1": {}, "beta-5": {}}}
    (folder / "sweep.json").write_text(json.dumps(plan | {"groups": [], "contents": {}}))
    runs, _ = read_runs([str(folder)])  # the third has not begun
    assert [run.label for run in runs] == ["beta-0.1", "beta-1"]


def test_what_is_no_run_is_refused(workdirs, tmp_path):
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text('{"model_type": "llama"}')
    for name in ("nothing", str(tmp_path / "model")):
        with pytest.raises(UsageError, match="not the workdir of a run or a sweep"):
            read_runs([*workdirs, name])
    other = make_run(tmp_path / "ppo", [0.1], stages=("ppo",))
    for stage in ("", "preference"):
        with pytest.raises(ConfigError, match="no stage in common"):
            read_runs([*workdirs, other], stage)
    with pytest.raises(
        ConfigError, match="--stage=ppo: not all runs have it; they share sft, pref"
    ):
        read_runs(workdirs, "ppo")


def test_labels_are_what_tells_the_paths_apart():
    assert short_labels(["/x/runs/s/a", "/x/runs/s/b"]) == ["a", "b"]
    assert short_labels(["/x/runs/s/a", "/x/runs/t/a"]) == ["s/a", "t/a"]
    assert short_labels(["/x/runs/s/a"]) == ["a"]
