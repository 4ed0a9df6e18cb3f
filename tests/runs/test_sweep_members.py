"""Members of a sweep: which train as one program, what they are called, which are refused."""

import json
from functools import partial

import pytest

from dpojax import storage
from dpojax.config.errors import ConfigError
from dpojax.runs.workdirs import FINISHED, short_hash
from dpojax.sweeps import layout, sweep
from dpojax.sweeps.members import member_names, member_run, read_sweep, same_program
from dpojax.sweeps.plan import group_members
from dpojax.sweeps.sweep import run_sweep

from .conftest import tiny_config


def grouped(*members, **changes):
    config = tiny_config(**changes)
    nowhere = storage.as_path("nowhere")
    return same_program([member_run(config, changes, nowhere) for changes in members])


def test_one_program_trains_what_differs_in_traced_numbers_alone():
    beta, other = (
        {"preference.beta": 0.3},
        {"preference.learning_rate": 1e-4, "preference.epochs": 3},
    )
    assert grouped({}, beta, other) == [[0, 1, 2]]
    assert grouped(beta, {"preference.loss": "ipo", "preference.length_norm": "sum"}, other) == [
        [0, 2],
        [1],
    ]
    assert grouped({}, {"sft.learning_rate": 1e-4}) == [[0], [1]]
    assert grouped({}, {"preference.batch_size": 4}) == [[0], [1]]
    moving = {"preference.loss": "epsilon_dpo", "preference.reference.kind": "live"}
    assert grouped({}, {"preference.epsilon": 0.1}, **moving) == [[0, 1]]
    # The seed draws the weights of a new model, the embedded task's records, and adapters.
    assert grouped({}, {"seed": 1}) == [[0], [1]]
    dpo = {
        "stages": ("preference",),
        "model.path": "policy",
        "preference.data.source": "pairs.jsonl",
    }
    assert grouped({}, {"seed": 1}, **dpo) == [[0, 1]]
    assert grouped({}, {"seed": 1}, **dpo, **{"preference.lora.rank": 2}) == [[0], [1]]
    assert grouped({}, {"seed": 1}, **dpo, **{"preference.data.eval_source": "reviews"}) == [
        [0],
        [1],
    ]
    scoring = {"stages": ("reward",), "model.path": "policy", "reward.keep_best": ""}
    scoring["reward.data.source"] = "pairs.jsonl"
    assert grouped({}, {"reward.centring": 0.1}, {"seed": 1}, **scoring) == [[0, 1], [2]]
    assert grouped({}, {"reward.learning_rate": 1e-4}, stages=("reward",)) == [[0], [1]]


def test_members_that_are_added_leave_the_others_as_they_were_begun(tmp_path):
    folder = storage.as_path(tmp_path)
    runs = {name: run_of_beta(beta) for name, beta in (("a", 0.1), ("b", 0.2), ("c", 0.3))}
    assert group_members(runs, [["b", "a"]], folder) == [["a", "b", "c"]]  # nothing has begun
    begun = folder / sweep.GROUPS / short_hash(["b", "a"])
    (begun / "members" / "20").mkdir(parents=True)
    on_devices = layout.Layout(axis=2, vmapped=1, at_once=2)
    (begun / layout.LAYOUT).write_text(json.dumps(on_devices._asdict()))
    assert group_members(runs, [["b", "a"]], folder) == [["b", "a"], ["c"]]
    without = {name: runs[name] for name in ("b", "c")}
    with pytest.raises(ConfigError, match=r"is training b, a together: put a back"):
        group_members(without, [["b", "a"]], folder)
    (begun / "members" / "20").rename(begun / "members" / "20.orbax-checkpoint-tmp")
    assert group_members(without, [["b", "a"]], folder) == [["b", "c"]]
    (folder / "b").mkdir()
    (folder / "b" / FINISHED).touch()
    assert group_members(without, [["b", "a"]], folder) == [["b"], ["c"]]


def run_of_beta(beta: float):
    return member_run(tiny_config(), {"preference.beta": beta}, storage.as_path("nowhere"))


def test_a_member_has_the_same_name_whatever_others_change():
    rate = {"preference.learning_rate": 1e-4}
    assert member_names([rate], "preference") == ["learning_rate-0.0001"]
    both = [rate, {"sft.learning_rate": 1e-4}]
    assert member_names(both, "preference") == ["learning_rate-0.0001", "sft.learning_rate-0.0001"]


def test_texts_that_a_new_tokenizer_is_trained_on_may_differ_between_members():
    changes = {"tokenizer": "train:300", "preference.data.source": "reviews"}
    config = tiny_config(stages=("preference",), **changes)
    member = partial(member_run, config, workdir=storage.as_path("nowhere"))
    assert member({"sft.data.limit": 7}).config.sft.data.limit == 7
    with pytest.raises(ConfigError, match=r"sft\.steps is read by none of the stages preference"):
        member({"sft.steps": 7})


def test_a_sweep_that_cannot_run_is_refused_before_anything_is_made(tmp_path):
    wrong = {
        r"preference\.no_such_key": {"preference.no_such_key": 1},
        r"config\.preference\.beta": {"preference.beta": -1.0},
        "is there 2 times": {"preference.beta": 0.1},
        r"ppo\.steps is read by none of the stages sft, preference": {"ppo.steps": 3},
        r"frontier\.count is read by none": {"frontier.count": 3},
    }
    for message, changes in wrong.items():
        with pytest.raises(ConfigError, match=message):
            run_sweep(tiny_config(), [{"preference.beta": 0.1}, changes], str(tmp_path / "sweep"))
    assert not (tmp_path / "sweep").exists()
    (tmp_path / "config.py").write_text("def sweep():\n    return []\n")
    with pytest.raises(ConfigError, match="no function sweep"):
        read_sweep(str(tmp_path / "config.py"))
