"""Configs are locked, checked before anything is loaded, and every key is read."""

import pathlib

import pytest

from dpojax.config.defaults import default_config
from dpojax.config.errors import ConfigError
from dpojax.config.files import load_config_file
from dpojax.config.saved import write_or_compare_config
from dpojax.runs.run import run
from dpojax.runs.workdirs import workdir_lock
from dpojax.stages.registry import resolve
from dpojax.sweeps.members import member_config, read_sweep

from .conftest import tiny_config

ROOT = pathlib.Path(__file__).resolve().parents[2]


def keys(config, prefix=""):
    for key, value in config.items():
        if hasattr(value, "items"):
            yield from keys(value, f"{prefix}{key}.")
        else:
            yield prefix + key


def test_an_unknown_key_is_an_error_that_names_it():
    with pytest.raises(AttributeError, match="betta"):
        default_config().preference.betta = 0.1


def test_a_value_of_another_type_is_an_error():
    with pytest.raises(TypeError, match="beta"):
        default_config().preference.beta = "0.1"


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("preference.beta", 0.0, r"config\.preference\.beta: .*greater than 0, got 0\.0"),
        ("preference.beta", -0.1, r"config\.preference\.beta"),
        ("preference.beta", float("nan"), r"config\.preference\.beta"),
        ("preference.label_smoothing", 0.5, r"config\.preference\.label_smoothing"),
        (
            "preference.length_norm",
            "mean",
            r"preference\.length_norm: dpo has no such option",
        ),
        ("preference.reference.kind", "frozen", r"cached or live"),
        ("preference.batch_size", 0, r"config\.preference\.batch_size = 0"),
        ("sft.learning_rate", -1.0, r"config\.sft\.learning_rate"),
        ("sft.data.eval_share", 1.0, r"config\.sft\.data\.eval_share"),
        ("sft.data.columns", "question", r"config\.sft\.data\.columns = 'question': NAME=PATH"),
        ("sft.data.form", "nectar", r"config\.sft\.data\.form = 'nectar': one of auto, "),
        ("preference.data.source", "", r"config\.preference\.data\.source = ''.*is empty"),
        ("stages", ("reward", "preference"), r"config\.stages"),
        ("model.compute_dtype", "float16", r"compute_dtype"),
        ("log_every", -1, r"config\.log_every"),
        ("max_checkpoints", 0, r"config\.max_checkpoints"),
        ("exit_code_when_stopped", 0, r"config\.exit_code_when_stopped = 0: between 1 and 255"),
        ("exit_code_when_stopped", 256, r"config\.exit_code_when_stopped"),
        ("metric_names", "trl,wandb", r"config\.metric_names = 'trl,wandb': names of trl, maxtext"),
        ("seed", -1, r"config\.seed"),
        ("max_logits", 0, r"config\.max_logits"),
        ("row_length", -1, r"config\.row_length"),
        ("preference.reference.dtype", "float16", r"config\.preference\.reference\.dtype"),
        ("stages", ("preference", "dpo"), r"config\.stages"),
        ("tokens.truncation", "cut", r"config\.tokens"),
        ("sft.optimizer.name", "sgd", r"config\.sft\.optimizer\.name: .*adamw"),
        ("preference.lora.rank", -1, r"config\.preference\.lora\.rank = -1: 0 \(off"),
        ("sft.lora.base_dtype", "int8", r"config\.sft\.lora\.base_dtype"),
        ("sft.lora.adapters", "folder", r"config\.sft\.lora: adapters = 'folder', but rank = 0"),
    ],
)
def test_a_value_that_no_run_could_use_is_refused_with_its_key(key, value, message):
    config = default_config()
    config.update_from_flattened_dict({key: value})
    with pytest.raises(ConfigError, match=message):
        resolve(config, "unused")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"lora.alpha": 0.0}, r"config\.preference\.lora: rank, alpha: must be positive"),
        ({"lora.targets": ()}, r"config\.preference\.lora: targets"),
        (
            {"lora.targets": ("mlp/(",)},
            r"config\.preference\.lora: targets: 'mlp/\(' is not a pattern",
        ),
        (
            {"loss": "tdpo", "reference.kind": "live", "reference.path": "other"},
            r"config\.preference\.reference\.path = 'other': .*tdpo compares with their base",
        ),
        (
            {"reference.kind": "live", "reference.dtype": "bfloat16"},
            r"config\.preference\.reference\.dtype = 'bfloat16': .*preference\.lora\.base_dtype to",
        ),
    ],
)
def test_adapters_that_no_run_could_train_are_refused_with_their_key(changes, message):
    config = default_config()
    config.preference.update_from_flattened_dict({"lora.rank": 4} | changes)
    with pytest.raises(ConfigError, match=message):
        resolve(config, "unused")
    if not any(key.startswith("lora.") for key in changes):
        config.preference.lora.rank = 0  # without adapters the same reference will do
        resolve(config, "unused")


def test_the_shipped_configs_pass_their_own_check_and_their_sweeps_change_known_keys():
    paths = sorted((ROOT / "configs").glob("*.py"))
    assert {path.stem for path in paths} >= {"reviews", "instructions", "hh"}
    for path in paths:
        module = load_config_file(str(path))
        config = module.get_config()
        config.preference.data.source = config.preference.data.source or "given on the command line"
        config.sft.data.source = config.sft.data.source or "given on the command line"
        resolve(config, "unused")
        # The pairs of imdb are made by its frontier, which sweeps over beta itself.
        assert hasattr(module, "sweep") == (path.stem != "imdb")
        if hasattr(module, "sweep"):
            members = [member_config(config, changes) for changes in read_sweep(str(path))]
            assert len({member.to_json() for member in members}) == len(members) > 1
            for member in members:
                resolve(member, "unused")
        assert "python scripts/train.py --config=configs/" in module.__doc__


def test_the_workdir_of_another_config_is_refused_and_left_as_it_was(tmp_path):
    config = default_config()
    config.preference.beta = 0.1
    write_or_compare_config(resolve(config, tmp_path))
    before = (tmp_path / "config.json").read_bytes()
    config.preference.beta = 0.3
    with pytest.raises(ConfigError, match=r"preference\.beta: 0\.1 -> 0\.3"):
        write_or_compare_config(resolve(config, tmp_path))
    assert (tmp_path / "config.json").read_bytes() == before
    config.preference.beta = 0.1
    config.log_every = 7
    config.mesh.fsdp = 4
    config.model.remat = "full"
    write_or_compare_config(resolve(config, tmp_path))


def test_a_second_run_in_the_same_workdir_is_refused_while_the_first_lives(tmp_path):
    refused = pytest.raises(
        ConfigError, match=r"in use by process \d+ on .*; wait until it has ended"
    )
    with workdir_lock(tmp_path), refused, workdir_lock(tmp_path):
        pass
    with workdir_lock(tmp_path):
        pass


def test_a_run_that_finds_another_at_work_has_written_no_config(tmp_path):
    with workdir_lock(tmp_path), pytest.raises(ConfigError, match="in use by process"):
        run(tiny_config(), tmp_path)
    assert not (tmp_path / "config.json").exists()
    assert not (tmp_path / "contents.json").exists()
