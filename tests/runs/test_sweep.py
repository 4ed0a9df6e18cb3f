"""A sweep's members are what separate runs would be, and no member disturbs another."""

import csv
import json
import pathlib
import shlex
import subprocess
import sys
from collections import Counter
from functools import partial

import jax
import numpy as np
import pytest
from ml_collections import ConfigDict

from dpojax import sharding, storage
from dpojax.config.errors import ConfigError
from dpojax.config.saved import read_run_config
from dpojax.runs.export import export
from dpojax.runs.run import run
from dpojax.runs.workdirs import FINISHED
from dpojax.stages.preference import Preference
from dpojax.stages.registry import open_stage, resolve
from dpojax.stages.setup import prepare_setup
from dpojax.sweeps import group, plan, sweep, table
from dpojax.sweeps.members import (
    member_names,
)
from dpojax.sweeps.program import MemberProgram
from dpojax.sweeps.sweep import run_sweep
from dpojax.training import goodput, memory
from dpojax.training.preemption import Preempted, StopSignal

from .conftest import environment, lines, tiny_config

MEMBERS = (
    {
        "preference.beta": 2.0,
        "preference.label_smoothing": 0.1,
        "preference.learning_rate": 3e-3,
        "preference.warmup_ratio": 0.25,
        "preference.steps": 4,
    },
    {},
    {"preference.learning_rate": 1e30},
    {"preference.label_smoothing": 0.2},
)  # the first, which all share their data with, is shorter than the others
NAMES = tuple(member_names(MEMBERS, "preference"))
SHORT, PLAIN, BROKEN, LAST = NAMES


def base_config(**changes) -> ConfigDict:
    schedule = {"schedule": "wsd", "decay_share": 0.5, "min_learning_rate_ratio": 0.1}
    return tiny_config(**{f"preference.{key}": x for key, x in schedule.items()} | changes)


def setup_of(workdir: pathlib.Path):
    return prepare_setup(resolve(read_run_config(workdir), workdir))


def params_of(workdir: pathlib.Path) -> dict:
    return open_stage(setup_of(workdir), "preference").trained_params()


ADAM = 1e-5  # weights after whole runs whose programs hold other numbers of members


def assert_same(got: pathlib.Path, want: pathlib.Path, atol: float) -> None:
    pairs = (params_of(got), params_of(want))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=atol), *pairs)


@pytest.fixture(scope="module")
def swept(tmp_path_factory):
    """The folder of a finished sweep, why members of it failed, and how often was made what they
    share."""
    folder, calls = tmp_path_factory.mktemp("swept") / "sweep", Counter()

    def count(patch, owner, name):
        function = getattr(owner, name)

        def counted(*args):
            calls[name] += 1
            return function(*args)

        patch.setattr(owner, name, counted)

    with pytest.MonkeyPatch.context() as patch:
        count(patch, Preference, "open_reference")
        count(patch, group, "scores_at_start")
        count(patch, Preference, "open_summary")
        failed = run_sweep(base_config(), MEMBERS, str(folder))
    return folder, failed, calls


@pytest.mark.slow
def test_a_member_is_what_a_separate_run_would_be(swept, tmp_path):
    """The first, which differs in all numbers and ends before the others."""
    config, index = base_config(), 0
    config.update_from_flattened_dict(MEMBERS[index])
    run(config, str(tmp_path / "alone"))
    member = swept[0] / NAMES[index]
    # Adam, on another mesh: what a rounding is divided by may be as small.
    assert_same(member, tmp_path / "alone", atol=ADAM)
    evaluated = lambda of: [line for line in lines(of, "preference") if line["split"] == "eval"]
    for mine, other in zip(evaluated(member), evaluated(tmp_path / "alone"), strict=True):
        assert mine["step"] == other["step"]
        assert mine["loss"] == pytest.approx(other["loss"], abs=1e-5)
    want = json.loads((tmp_path / "alone" / "finished.json").read_text())
    got = json.loads((member / "finished.json").read_text())
    assert got["preference"]["pairs"] == want["preference"]["pairs"]
    assert got["preference"]["values"]["after"] == pytest.approx(
        want["preference"]["values"]["after"], abs=1e-4
    )
    made = lambda folder: {str(path.relative_to(folder)) for path in folder.glob("[!t]*/*")}
    assert made(member) == made(tmp_path / "alone")
    cached = lambda folder: {path.name for path in folder.glob("tokens/*")}
    assert cached(swept[0]) == cached(tmp_path / "alone")  # those of the sweep are all members'
    assert len(cached(swept[0])) == 2


def test_the_reference_is_scored_once_for_all_members(swept):
    """Before training, at step 0, and on the held-out pairs in the end."""
    assert swept[2] == {"open_reference": 1, "scores_at_start": 1, "open_summary": 1}


@pytest.mark.long
def test_adapters_against_a_live_reference_are_what_separate_runs_would_train(swept, tmp_path):
    """TDPO, whose gradient reads the reference's whole distributions: the base, frozen."""
    policy = tmp_path / "policy"
    export(str(swept[0] / SHORT), str(policy), stage="sft")
    changes = {
        "model.path": str(policy),
        "preference.loss": "tdpo",
        "preference.steps": 3,
        "preference.lora.rank": 2,
    }
    config = base_config(stages=("preference",), **changes, **{"preference.reference.kind": "live"})
    assert (
        run_sweep(
            config, [{"preference.beta": 0.1}, {"preference.beta": 2.0}], str(tmp_path / "sweep")
        )
        == {}
    )
    config.preference.beta = 2.0
    run(config, str(tmp_path / "alone"))
    assert_same(tmp_path / "sweep" / "beta-2", tmp_path / "alone", atol=ADAM)
    with pytest.raises(AssertionError):
        assert_same(tmp_path / "sweep" / "beta-0.1", tmp_path / "alone", atol=ADAM)


def test_every_step_of_a_member_is_logged_once(swept):
    for name, steps in ((SHORT, 4), (PLAIN, 6), (LAST, 6)):
        logged = [x["step"] for x in lines(swept[0] / name, "preference") if x["split"] == "train"]
        assert logged == list(range(1, steps + 1))


def test_members_that_train_together_have_one_record_of_their_time_in_the_first_workdir(swept):
    (file,) = swept[0].glob(f"**/{goodput.FILE}")
    assert file.parent == swept[0] / NAMES[0]
    records = goodput.read(file.parent)
    totals = goodput.split(records)
    assert sum(totals.values()) == pytest.approx(records[-1]["time"] - records[0]["time"], abs=0.1)
    assert totals[goodput.LOST] == totals[goodput.DOWN] == 0
    assert min(totals[name] for name in (goodput.STEP, goodput.EVALUATION, goodput.COMPILE)) > 0
    for name in (SHORT, PLAIN, LAST):
        last = [x for x in lines(swept[0] / name, "preference") if x["split"] == "train"][-1]
        assert 0 < last["goodput/share"] < 1
        assert last["goodput/step"] <= totals[goodput.STEP]


def test_a_member_fails_alone_and_says_why(swept):
    folder, failed, _ = swept
    assert set(failed) == {BROKEN}
    assert "not finite at step" in failed[BROKEN]
    assert "reviews/train:" in failed[BROKEN]
    assert not (folder / BROKEN / FINISHED).exists()
    assert [path.name for path in folder.glob(f"{sweep.GROUPS}/*")] == []


def test_table_and_figure_show_all_members_and_why_one_failed(swept):
    with open(swept[0] / table.TABLE) as file:
        rows = {row["member"]: row for row in csv.DictReader(file)}
    assert set(rows) == {*NAMES}
    assert rows[BROKEN]["failed"] == swept[1][BROKEN]
    assert (rows[BROKEN]["loss"], rows[SHORT]["failed"]) == ("nan", "")
    assert rows[SHORT]["preference.beta"] == "2.0"
    last = lines(swept[0] / SHORT, "preference")[-1]
    assert float(rows[SHORT]["loss"]) == pytest.approx(last["loss"])
    assert (swept[0] / table.FIGURE).stat().st_size > 10_000


def test_a_finished_sweep_does_nothing_again(swept, monkeypatch):
    before = {path: path.stat().st_mtime_ns for path in swept[0].glob("*/*/checkpoints/*")}
    monkeypatch.setattr(group.Group, "train", None)  # nobody calls it
    assert run_sweep(base_config(), MEMBERS, str(swept[0])) == swept[1]
    assert before == {path: path.stat().st_mtime_ns for path in before}


@pytest.mark.long
@pytest.mark.parametrize(
    ("at_once", "stops"),
    [pytest.param(0, 1, id="all"), pytest.param(2, 2, id="last two")],
)
def test_a_sweep_that_was_stopped_goes_on_as_if_it_had_not(
    swept, tmp_path, monkeypatch, at_once, stops
):
    config, steps_asked = base_config(**{"sweep.at_once": at_once}), []

    def agreed(self, step=0):  # the short member has ended by then
        steps_asked.append(step)
        return steps_asked.count(5) == stops and step == 5

    folder = tmp_path / "sweep"
    with monkeypatch.context() as patch:
        patch.setattr(StopSignal, "agreed", agreed)
        with pytest.raises(Preempted, match="preference: stopped at step 5 of 6"):
            run_sweep(config, MEMBERS, str(folder))
    assert len(list(folder.glob(f"*/{FINISHED}"))) == (2 if stops == 2 else 0)
    with monkeypatch.context() as patch:
        patch.setattr(sharding, "make_mesh", partial(sharding.make_mesh, devices=jax.devices()[:1]))
        with pytest.raises(ConfigError, match=r"sweep axis of 2.* data axis of 1: go on with"):
            run_sweep(config, MEMBERS, str(folder))
    config.sweep.update(axis=1, vmapped=2, at_once=1)  # for members that have no checkpoint yet
    assert set(run_sweep(config, MEMBERS, str(folder))) == {BROKEN}
    records = goodput.read(folder / NAMES[0])
    marks = [x["step"] for x in records if x["event"] == goodput.GOES_ON and x["stage"] != "sft"]
    assert marks == ([0, 5] if not at_once else [0, 0, 5])
    assert goodput.split(records)[goodput.LOST] < 0.5  # all was saved at the stop
    for name in {*NAMES} - {BROKEN}:
        assert_same(folder / name, swept[0] / name, atol=ADAM if at_once else 0)
        steps = lambda of: sorted((x["step"], x["split"]) for x in lines(of, "preference"))
        assert steps(folder / name) == steps(swept[0] / name)


@pytest.mark.long
def test_a_sweep_killed_while_its_members_are_judged_trains_none_again(
    swept, tmp_path, monkeypatch
):
    folder, finish, judged = tmp_path / "sweep", group.finish, []

    def killed(stage, summary):
        if judged:
            raise KeyboardInterrupt
        judged.append(stage)
        finish(stage, summary)

    with monkeypatch.context() as patch:
        patch.setattr(group, "finish", killed)
        with pytest.raises(KeyboardInterrupt):
            run_sweep(base_config(), MEMBERS[:2], str(folder))
    assert len(list(folder.glob(f"*/{FINISHED}"))) == 1
    monkeypatch.setattr(group, "VectorisedLoop", None)
    assert run_sweep(base_config(), MEMBERS[:2], str(folder)) == {}
    for name in NAMES[:2]:
        assert_same(folder / name, swept[0] / name, atol=ADAM)
    assert not list(folder.glob(f"{sweep.GROUPS}/*"))


@pytest.mark.long
def test_members_that_fail_by_themselves_or_in_a_stage_they_share_leave_the_others(tmp_path):
    shared = {"sft.learning_rate": 1e30}
    members = [
        {"preference.loss": "hinge", "preference.learning_rate": 1e30},
        shared,
        shared | {"preference.beta": 0.2},
    ]
    members.append({"preference.loss": "dpo"})
    failed = run_sweep(base_config(), members, str(tmp_path / "sweep"))
    assert [why.split(":")[0] for why in failed.values()] == ["preference", "sft", "sft"]
    assert "loss-dpo" not in failed
    assert (tmp_path / "sweep" / "loss-dpo" / FINISHED).exists()
    assert not list((tmp_path / "sweep" / sweep.GROUPS).glob("*"))
    assert run_sweep(base_config(), members, str(tmp_path / "sweep")) == failed


@pytest.mark.long
def test_as_many_members_go_at_once_as_memory_holds(tmp_path, monkeypatch):
    """Two of five have a device each in a call; their states stay there between calls."""
    measured, stages_trained, compile_ = [], [], MemberProgram._compile

    class Chosen(Exception):
        pass

    def train(members, start, stop):
        raise Chosen(members.at_once)

    def compiled(program):
        measured.append(compile_(program))
        return measured[-1]

    monkeypatch.setattr(MemberProgram, "_compile", compiled)
    monkeypatch.setattr(group.Group, "train", train)
    monkeypatch.setattr(group, "train_in_turn", lambda before, *_: stages_trained.append(before))
    members = [{"preference.beta": beta} for beta in (0.1, 0.2, 0.3, 0.4, 0.5)]

    def chosen(limit: float) -> int:
        monkeypatch.setattr(memory, "limit_bytes", lambda: limit)
        with pytest.raises(Chosen) as raised:
            run_sweep(base_config(), members, str(tmp_path / "sweep"))
        return raised.value.args[0]

    assert chosen(2**40) == 6  # in three calls, a place of the last one idle
    states, beside, _ = measured[-1]
    shapes = setup_of(tmp_path / "sweep" / "beta-0.1").abstract_params
    weights = sum(x.size for x in jax.tree.leaves(shapes))
    assert states == pytest.approx(3 * 4 * weights, rel=0.01)  # with Adam's two moments
    assert beside > states
    assert chosen(beside + 2.5 * states) == 4
    assert chosen(beside + 1.5 * states) == 2
    begun = len(stages_trained)
    monkeypatch.setattr(memory, "limit_bytes", lambda: beside + 0.5 * states)
    with pytest.raises(ConfigError, match=r"2 members at once, 2 in .* more than there is"):
        run_sweep(base_config(), members, str(tmp_path / "sweep"))
    assert len(stages_trained) == begun  # refused before the SFT stage


@pytest.mark.long
def test_seeds_see_batches_of_their_own_and_lost_updates_are_warned_of(swept, tmp_path, capsys):
    policy, pairs = tmp_path / "policy", tmp_path / "pairs.jsonl"
    export(str(swept[0] / NAMES[0]), str(policy), stage="sft")
    words = ("good", "bad", "a film", "the plot")
    made = [
        {"prompt": f"review {i}", "chosen": words[i % 4], "rejected": words[(i + 1) % 4]}
        for i in range(40)
    ]
    pairs.write_text("\n".join(map(json.dumps, made)))
    changes = {
        "model.path": str(policy),
        "preference.data.source": str(pairs),
        "preference.steps": 3,
    }
    config = base_config(stages=("preference",), **changes)
    members = [{"seed": 0, "preference.steps": 2}, {"seed": 7}, {"preference.learning_rate": 1e-20}]
    assert run_sweep(config, members, str(tmp_path / "sweep")) == {}
    printed = capsys.readouterr().out.splitlines()
    lost = [line for line in printed if "of the updates are smaller than the weights" in line]
    assert [line.split(":")[0] for line in lost] == ["preference learning_rate-1e-20  step 1"]
    assert not (tmp_path / "sweep" / "seed-0-steps-2" / "sft").exists()
    config.seed = 7
    run(config, str(tmp_path / "alone"))
    assert_same(tmp_path / "sweep" / "seed-7", tmp_path / "alone", atol=ADAM)
    with pytest.raises(AssertionError):
        assert_same(tmp_path / "sweep" / "seed-0-steps-2", tmp_path / "alone", atol=ADAM)


def test_the_folder_of_another_sweep_is_refused(swept):
    before = (swept[0] / sweep.PLAN).read_bytes()
    with pytest.raises(ConfigError, match=r"preference\.batch_size: 8 -> 4"):
        run_sweep(base_config(**{"preference.batch_size": 4}), MEMBERS, str(swept[0]))
    with pytest.raises(ConfigError, match=r"unchanged with \{\}, which is now"):
        plan.compared_plan(
            base_config(),
            {"unchanged": {"preference.beta": 0.1}},
            {},
            storage.as_path(swept[0]),
        )
    assert (swept[0] / sweep.PLAN).read_bytes() == before


@pytest.mark.long
def test_the_plan_holds_jobs_whose_commands_train_members_by_hand(tmp_path, monkeypatch, capsys):
    """Of two that train together, and of one alone, whose SFT stage is that of the two and whose
    name holds a comma."""
    folder = tmp_path / "sweep"
    one_step = {"sft.steps": 1, "preference.steps": 1, "preference.data.eval_limit": 4}
    mixture = {"preference.loss": "dpo+sft", "preference.loss_weights": (1.0, 0.5)}
    members = [{"preference.beta": 0.1}, {"preference.beta": 2.0}, mixture]
    with monkeypatch.context() as patch:
        patch.setattr(sweep, "run_jobs_in_terminal", lambda jobs: None)
        run_sweep(base_config(**one_step), members, str(folder))
    names = [["beta-0.1", "beta-2"], ["loss-dpo+sft-loss_weights-(1.0, 0.5)"]]
    jobs = json.loads((folder / sweep.PLAN).read_text())["jobs"]
    outputs = [[str(folder / name / FINISHED) for name in together] for together in names]
    assert [job["outputs"] for job in jobs] == outputs
    commands = [shlex.split(job["command"]) for job in jobs]
    assert [command[:3] for command in commands] == 2 * [["python", "-m", "dpojax.sweeps.sweep"]]
    finished = lambda: {path.parent.name for path in folder.glob(f"*/{FINISHED}")}
    by_hand = [sys.executable, *commands[0][1:]]
    done = subprocess.run(by_hand, env=environment(), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert finished() == {*names[0]}
    capsys.readouterr()
    sweep.main(commands[1][3:])
    assert finished() == {*names[0], *names[1]}
    sft = [params_of_sft(folder / name) for name in ("beta-0.1", *names[1])]
    jax.tree.map(np.testing.assert_array_equal, *sft)
    assert "sft  step" in done.stdout + done.stderr
    assert "sft  step" not in "".join(capsys.readouterr())  # it was given, not trained again
    monkeypatch.setattr(sweep, "train_members", None)  # nobody calls it
    assert run_sweep(base_config(**one_step), members, str(folder)) == {}


def params_of_sft(workdir: pathlib.Path) -> dict:
    return open_stage(setup_of(workdir), "sft").trained_params()


def test_members_of_no_sweep_are_refused(swept, tmp_path):
    with pytest.raises(ConfigError, match="is not the workdir of a sweep"):
        sweep.train_members(storage.as_path(tmp_path), ["beta-1"])
    with pytest.raises(ConfigError, match="a sweep without a member 'beta-7'"):
        sweep.train_members(storage.as_path(swept[0]), [PLAIN, "beta-7"])


def test_a_sweep_whose_data_have_changed_is_refused_also_for_members_that_have_not_begun(tmp_path):
    """Of two members that train alone the first is finished: it would have learned other data."""
    pairs = tmp_path / "pairs.jsonl"
    line = json.dumps({"prompt": "a", "chosen": " b", "rejected": " c"})
    pairs.write_text(line + "\n")
    config = base_config(**{"preference.data.source": str(pairs), "stages": ("preference",)})
    members = [{"model.width": 16}, {"model.width": 32}]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sweep, "run_jobs_in_terminal", lambda jobs: None)
        patch.setattr(sweep, "write_table", lambda folder, plan, best: "")
        run_sweep(config, members, tmp_path / "sweep")
        run_sweep(config, members, tmp_path / "sweep")
        pairs.write_text(line.replace("b", "d") + "\n")
        message = r"config\.preference\.data\.source \(.*pairs\.jsonl\): sha256 \w+, now \w+"
        with pytest.raises(ConfigError, match=message):
            run_sweep(config, members, tmp_path / "sweep")
