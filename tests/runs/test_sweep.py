"""A sweep's members are what separate runs would be, and no member disturbs another."""

import csv
import json
import pathlib
from functools import partial
from unittest.mock import Mock

import jax
import numpy as np
import pytest
from ml_collections import ConfigDict

from dpojax import sharding
from dpojax.sweeps import layout
from dpojax.sweeps import sweep
from dpojax.sweeps import group as together
from dpojax.runs import run as runs
from dpojax.stages import setup as run_setup
from dpojax.config.checks import ConfigError
from dpojax.runs.export import export, read_config
from dpojax.runs.workdirs import digest
from dpojax.training import memory
from dpojax.training.loop import Preempted, StopSignal

from .conftest import lines, tiny_config

MEMBERS = (
    {
        "preference.beta": 2.0,
        "preference.label_smoothing": 0.1,
        "preference.learning_rate": 3e-3,
        "preference.warmup_steps": 1,
        "preference.steps": 4,
    },
    {},
    {"preference.learning_rate": 1e30},
    {"preference.label_smoothing": 0.2},
)  # the first, which all share their data with, is shorter than the others
NAMES = tuple(sweep.names_of(MEMBERS, "preference"))
SHORT, PLAIN, BROKEN, LAST = NAMES


def base_config(**changes) -> ConfigDict:
    return tiny_config(**{"preference.schedule": "cosine"} | changes)


def params_of(workdir: pathlib.Path) -> dict:
    setup = run_setup.prepare(read_config(workdir), workdir)
    return run_setup.trained_params(setup, "preference")


ADAM = 1e-5  # weights after whole runs whose programs hold other numbers of members


def assert_same(got: pathlib.Path, want: pathlib.Path, atol: float) -> None:
    pairs = (params_of(got), params_of(want))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=atol), *pairs)


@pytest.fixture(scope="module")
def swept(tmp_path_factory):
    """The folder of a finished sweep, why members of it failed, and how often was made what they
    share."""
    folder = tmp_path_factory.mktemp("swept") / "sweep"
    shared = {"reference_of": together, "first_scores": together, "summariser": runs}
    with pytest.MonkeyPatch.context() as patch:
        counted = {name: Mock(wraps=getattr(where, name)) for name, where in shared.items()}
        for name, where in shared.items():
            patch.setattr(where, name, counted[name])
        failed = sweep.make(base_config(), MEMBERS, str(folder))
    return folder, failed, {name: mock.call_count for name, mock in counted.items()}


def test_a_member_is_what_a_separate_run_would_be(swept, tmp_path):
    """The first, which differs in all numbers and ends before the others."""
    config, index = base_config(), 0
    config.update_from_flattened_dict(MEMBERS[index])
    runs.run(config, str(tmp_path / "alone"))
    member = swept[0] / NAMES[index]
    # Adam, on another mesh: what a rounding is divided by may be as small.
    assert_same(member, tmp_path / "alone", atol=ADAM)
    evaluated = lambda run: [line for line in lines(run, "preference") if line["split"] == "eval"]
    for mine, other in zip(evaluated(member), evaluated(tmp_path / "alone"), strict=True):
        assert mine["step"] == other["step"]
        assert mine["loss"] == pytest.approx(other["loss"], abs=1e-5)
    want = json.loads((tmp_path / "alone" / "finished.json").read_text())
    got = json.loads((member / "finished.json").read_text())
    assert got["preference"]["pairs"] == want["preference"]["pairs"]
    assert got["preference"]["values"]["after"] == pytest.approx(want["preference"]["values"]["after"], abs=1e-4)
    made = lambda folder: {str(path.relative_to(folder)) for path in folder.glob("[!t]*/*")}
    assert made(member) == made(tmp_path / "alone")
    kept = lambda folder: {path.name for path in folder.glob("tokens/*")}
    assert kept(swept[0]) == kept(tmp_path / "alone")  # those of the sweep are all members'
    assert len(kept(swept[0])) == 2


def test_the_reference_is_scored_once_for_all_members(swept):
    """Before training, at step 0, and on the held-out pairs in the end."""
    assert swept[2] == {"reference_of": 1, "first_scores": 1, "summariser": 1}


def test_adapters_against_a_live_reference_are_what_separate_runs_would_train(swept, tmp_path):
    """TDPO, whose gradient reads the reference's whole distributions: the base, frozen."""
    policy = tmp_path / "policy"
    export(str(swept[0] / SHORT), str(policy), stage="sft")
    changes = {"model.path": str(policy), "preference.loss": "tdpo", "preference.steps": 3, "preference.lora.rank": 2}
    config = base_config(stages=("preference",), **changes, **{"preference.reference.kind": "live"})
    assert sweep.make(config, [{"preference.beta": 0.1}, {"preference.beta": 2.0}], str(tmp_path / "sweep")) == {}
    config.preference.beta = 2.0
    runs.run(config, str(tmp_path / "alone"))
    assert_same(tmp_path / "sweep" / "beta-2", tmp_path / "alone", atol=ADAM)
    with pytest.raises(AssertionError):
        assert_same(tmp_path / "sweep" / "beta-0.1", tmp_path / "alone", atol=ADAM)


def test_every_step_of_a_member_is_logged_once(swept):
    for name, steps in ((SHORT, 4), (PLAIN, 6), (LAST, 6)):
        logged = [x["step"] for x in lines(swept[0] / name, "preference") if x["split"] == "train"]
        assert logged == list(range(1, steps + 1))


def test_a_member_fails_alone_and_says_why(swept):
    folder, failed, _ = swept
    assert set(failed) == {BROKEN}
    assert "not finite at step" in failed[BROKEN]
    assert "reviews/train:" in failed[BROKEN]
    assert not (folder / BROKEN / runs.FINISHED).exists()
    assert [path.name for path in folder.glob(f"{sweep.GROUPS}/*")] == []


def test_table_and_figure_show_the_finished_members(swept):
    with open(swept[0] / sweep.TABLE) as file:
        rows = {row["member"]: row for row in csv.DictReader(file)}
    assert set(rows) == {*NAMES} - {BROKEN}
    assert rows[SHORT]["preference.beta"] == "2.0"
    last = lines(swept[0] / SHORT, "preference")[-1]
    assert float(rows[SHORT]["loss"]) == pytest.approx(last["loss"])
    assert (swept[0] / sweep.FIGURE).stat().st_size > 10_000


def test_a_finished_sweep_does_nothing_again(swept, monkeypatch):
    before = {path: path.stat().st_mtime_ns for path in swept[0].glob("*/*/checkpoints/*")}
    monkeypatch.setattr(together._Group, "train", None)  # nobody calls it
    assert sweep.make(base_config(), MEMBERS, str(swept[0])) == swept[1]
    assert before == {path: path.stat().st_mtime_ns for path in before}


@pytest.mark.parametrize(("at_once", "stops"), [(0, 1), (2, 2)], ids=["all", "last two"])
def test_a_sweep_that_was_stopped_goes_on_as_if_it_had_not(
    swept, tmp_path, monkeypatch, at_once, stops
):
    config, asked = base_config(**{"sweep.at_once": at_once}), []

    def agreed(self, step=0):  # the short member has ended by then
        asked.append(step)
        return asked.count(5) == stops and step == 5

    folder = tmp_path / "sweep"
    with monkeypatch.context() as patch:
        patch.setattr(StopSignal, "agreed", agreed)
        with pytest.raises(Preempted, match="preference: stopped at step 5 of 6"):
            sweep.make(config, MEMBERS, str(folder))
    assert len(list(folder.glob(f"*/{runs.FINISHED}"))) == (2 if stops == 2 else 0)
    with monkeypatch.context() as patch:
        patch.setattr(sharding, "make_mesh", partial(sharding.make_mesh, devices=jax.devices()[:1]))
        with pytest.raises(ConfigError, match=r"sweep axis of 2.* data axis of 1: go on with"):
            sweep.make(config, MEMBERS, str(folder))
    config.sweep.update(axis=1, vmapped=2, at_once=1)  # for members that have no checkpoint yet
    assert set(sweep.make(config, MEMBERS, str(folder))) == {BROKEN}
    for name in {*NAMES} - {BROKEN}:
        assert_same(folder / name, swept[0] / name, atol=ADAM if at_once else 0)
        steps = lambda of: sorted((x["step"], x["split"]) for x in lines(of, "preference"))
        assert steps(folder / name) == steps(swept[0] / name)


def test_a_sweep_killed_while_its_members_are_judged_trains_none_again(
    swept, tmp_path, monkeypatch
):
    folder, finish, judged = tmp_path / "sweep", runs.finish, []

    def killed(stage, *given):
        if judged:
            raise KeyboardInterrupt
        judged.append(stage)
        finish(stage, *given)

    with monkeypatch.context() as patch:
        patch.setattr(runs, "finish", killed)
        with pytest.raises(KeyboardInterrupt):
            sweep.make(base_config(), MEMBERS[:2], str(folder))
    assert len(list(folder.glob(f"*/{runs.FINISHED}"))) == 1
    monkeypatch.setattr(together, "VectorisedLoop", None)
    assert sweep.make(base_config(), MEMBERS[:2], str(folder)) == {}
    for name in NAMES[:2]:
        assert_same(folder / name, swept[0] / name, atol=ADAM)
    assert not list(folder.glob(f"{sweep.GROUPS}/*"))


def test_members_that_fail_by_themselves_or_in_a_stage_they_share_leave_the_others(tmp_path):
    shared = {"sft.learning_rate": 1e30}
    members = [{"preference.loss": "hinge", "preference.learning_rate": 1e30}, shared, shared | {"preference.beta": 0.2}]
    members.append({"preference.loss": "dpo"})
    failed = sweep.make(base_config(), members, str(tmp_path / "sweep"))
    assert [why.split(":")[0] for why in failed.values()] == ["preference", "sft", "sft"]
    assert "loss-dpo" not in failed
    assert (tmp_path / "sweep" / "loss-dpo" / runs.FINISHED).exists()
    assert not list((tmp_path / "sweep" / sweep.GROUPS).glob("*"))
    assert sweep.make(base_config(), members, str(tmp_path / "sweep")) == failed


def test_as_many_members_go_at_once_as_memory_holds(tmp_path, monkeypatch):
    """Two of five have a device each in a call; their states stay there between calls."""
    measured, stages_trained, compile_ = [], [], together._Lanes._compile

    class Chosen(Exception):
        pass

    def train(group, start, stop):
        raise Chosen(group.at_once)

    def compiled(lanes):
        measured.append(compile_(lanes))
        return measured[-1]

    monkeypatch.setattr(together._Lanes, "_compile", compiled)
    monkeypatch.setattr(together._Group, "train", train)
    monkeypatch.setattr(runs, "train", lambda before, *_: stages_trained.append(before))
    members = [{"preference.beta": beta} for beta in (0.1, 0.2, 0.3, 0.4, 0.5)]

    def chosen(limit: float) -> int:
        monkeypatch.setattr(memory, "limit_bytes", lambda: limit)
        with pytest.raises(Chosen) as found:
            sweep.make(base_config(), members, str(tmp_path / "sweep"))
        return found.value.args[0]

    assert chosen(2**40) == 6  # in three calls, a lane of the last one idle
    states, beside, _ = measured[-1]
    own = read_config(tmp_path / "sweep" / "beta-0.1")
    weights = sum(x.size for x in jax.tree.leaves(run_setup.prepare(own, tmp_path).abstract_params))
    assert states == pytest.approx(3 * 4 * weights, rel=0.01)  # with Adam's two moments
    assert beside > states
    assert chosen(beside + 2.5 * states) == 4
    assert chosen(beside + 1.5 * states) == 2
    begun = len(stages_trained)
    monkeypatch.setattr(memory, "limit_bytes", lambda: beside + 0.5 * states)
    with pytest.raises(ConfigError, match=r"2 members at once, 2 in .* more than there is"):
        sweep.make(base_config(), members, str(tmp_path / "sweep"))
    assert len(stages_trained) == begun  # refused before the SFT stage


def test_seeds_see_batches_of_their_own_and_lost_updates_are_warned_of(swept, tmp_path, capsys):
    policy, pairs = tmp_path / "policy", tmp_path / "pairs.jsonl"
    export(str(swept[0] / NAMES[0]), str(policy), stage="sft")
    words = ("good", "bad", "a film", "the plot")
    made = [
        {"prompt": f"review {i}", "chosen": words[i % 4], "rejected": words[(i + 1) % 4]}
        for i in range(40)
    ]
    pairs.write_text("\n".join(map(json.dumps, made)))
    changes = {"model.path": str(policy), "preference.data.source": str(pairs), "preference.steps": 3}
    config = base_config(stages=("preference",), **changes)
    members = [{"seed": 0, "preference.steps": 2}, {"seed": 7}, {"preference.learning_rate": 1e-20}]
    assert sweep.make(config, members, str(tmp_path / "sweep")) == {}
    said = capsys.readouterr().out.splitlines()
    lost = [line for line in said if "of the updates are smaller than the weights" in line]
    assert [line.split(":")[0] for line in lost] == ["preference learning_rate-1e-20  step 1"]
    assert not (tmp_path / "sweep" / "seed-0-steps-2" / "sft").exists()
    config.seed = 7
    runs.run(config, str(tmp_path / "alone"))
    assert_same(tmp_path / "sweep" / "seed-7", tmp_path / "alone", atol=ADAM)
    with pytest.raises(AssertionError):
        assert_same(tmp_path / "sweep" / "seed-0-steps-2", tmp_path / "alone", atol=ADAM)


def grouped(*members, **changes):
    config = base_config(**changes)
    return together.same_program([sweep.member_of(config, own) for own in members])


def test_one_program_trains_what_differs_in_traced_numbers_alone():
    beta, other = {"preference.beta": 0.3}, {"preference.learning_rate": 1e-4, "preference.epochs": 3}
    assert grouped({}, beta, other) == [[0, 1, 2]]
    assert grouped(beta, {"preference.loss": "ipo", "preference.length_norm": "sum"}, other) == [[0, 2], [1]]
    assert grouped({}, {"sft.learning_rate": 1e-4}) == [[0], [1]]
    assert grouped({}, {"preference.batch_size": 4}) == [[0], [1]]
    # The seed draws the weights of a new model, the embedded task's records, and adapters.
    assert grouped({}, {"seed": 1}) == [[0], [1]]
    dpo = {"stages": ("preference",), "model.path": "policy", "preference.data.source": "pairs.jsonl"}
    assert grouped({}, {"seed": 1}, **dpo) == [[0, 1]]
    assert grouped({}, {"seed": 1}, **dpo, **{"preference.lora.rank": 2}) == [[0], [1]]
    assert grouped({}, {"seed": 1}, **dpo, **{"preference.data.eval_source": "reviews"}) == [[0], [1]]
    scoring = {"stages": ("reward",), "model.path": "policy", "reward.keep_best": False}
    scoring["reward.data.source"] = "pairs.jsonl"
    assert grouped({}, {"reward.centring": 0.1}, {"seed": 1}, **scoring) == [[0, 1], [2]]
    assert grouped({}, {"reward.learning_rate": 1e-4}, stages=("reward",)) == [[0], [1]]


def test_members_that_are_added_leave_the_others_as_they_were_begun(tmp_path):
    made = {name: member_config(own) for name, own in (("a", 0.1), ("b", 0.2), ("c", 0.3))}
    assert sweep._groups(made, [["b", "a"]], tmp_path) == [["a", "b", "c"]]  # nothing has begun
    kept = tmp_path / sweep.GROUPS / digest(["b", "a"])
    (kept / "members" / "20").mkdir(parents=True)
    lanes = layout.Layout(axis=2, vmapped=1, at_once=2)
    (kept / layout.LANES).write_text(json.dumps(lanes._asdict()))
    assert sweep._groups(made, [["b", "a"]], tmp_path) == [["b", "a"], ["c"]]
    without = {name: made[name] for name in ("b", "c")}
    with pytest.raises(ConfigError, match=r"is training b, a together: put a back"):
        sweep._groups(without, [["b", "a"]], tmp_path)
    (kept / "members" / "20").rename(kept / "members" / "20.orbax-checkpoint-tmp")
    assert sweep._groups(without, [["b", "a"]], tmp_path) == [["b", "c"]]
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / runs.FINISHED).touch()
    assert sweep._groups(without, [["b", "a"]], tmp_path) == [["b"], ["c"]]


def member_config(beta: float) -> ConfigDict:
    return sweep.member_of(base_config(), {"preference.beta": beta})


def test_a_member_has_the_same_name_whatever_others_change():
    rate = {"preference.learning_rate": 1e-4}
    assert sweep.names_of([rate], "preference") == ["learning_rate-0.0001"]
    both = [rate, {"sft.learning_rate": 1e-4}]
    assert sweep.names_of(both, "preference") == ["learning_rate-0.0001", "sft.learning_rate-0.0001"]


def test_texts_that_a_new_tokenizer_is_trained_on_may_differ_between_members():
    given = {"tokenizer": "train:300", "preference.data.source": "reviews"}
    config = base_config(stages=("preference",), **given)
    assert sweep.member_of(config, {"sft.data.limit": 7}).sft.data.limit == 7
    with pytest.raises(ConfigError, match=r"sft\.steps is read by none of the stages preference"):
        sweep.member_of(config, {"sft.steps": 7})


def test_a_sweep_that_cannot_run_is_refused_before_anything_is_made(tmp_path):
    wrong = {
        r"preference\.no_such_key": {"preference.no_such_key": 1},
        r"config\.preference\.beta": {"preference.beta": -1.0},
        "is there 2 times": {"preference.beta": 0.1},
        r"ppo\.steps is read by none of the stages sft, preference": {"ppo.steps": 3},
        r"frontier\.count is read by none": {"frontier.count": 3},
    }
    for message, own in wrong.items():
        with pytest.raises(ConfigError, match=message):
            sweep.make(base_config(), [{"preference.beta": 0.1}, own], str(tmp_path / "sweep"))
    assert not (tmp_path / "sweep").exists()
    (tmp_path / "config.py").write_text("def sweep():\n    return []\n")
    with pytest.raises(ConfigError, match="no function sweep"):
        sweep.read_sweep(str(tmp_path / "config.py"))


def test_the_folder_of_another_sweep_is_refused(swept):
    before = (swept[0] / sweep.PLAN).read_bytes()
    with pytest.raises(ConfigError, match=r"preference\.batch_size: 8 -> 4"):
        sweep.make(base_config(**{"preference.batch_size": 4}), MEMBERS, str(swept[0]))
    with pytest.raises(ConfigError, match=r"unchanged with \{\}, which is now"):
        sweep._plan(base_config(), {"unchanged": {"preference.beta": 0.1}}, swept[0])
    assert (swept[0] / sweep.PLAN).read_bytes() == before
