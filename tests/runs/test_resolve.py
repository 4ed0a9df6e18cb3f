"""A run is resolved once and frozen, and resumes only with the files that it began with."""

import dataclasses
import hashlib
import itertools
import json
import pathlib
import re
import shutil

import jax
import pytest

from dpojax.config import saved
from dpojax.config.errors import ConfigError
from dpojax.config.resolved import as_json
from dpojax.config.saved import compare_config, config_from_json, write_or_compare_config
from dpojax.data import reviews
from dpojax.methods import preference
from dpojax.models import decoder, huggingface
from dpojax.models.config import LLAMA, DecoderConfig
from dpojax.models.scores import with_scalar_head
from dpojax.runs import run as runs
from dpojax.stages.registry import STAGES, open_stage, resolve
from dpojax.stages.setup import prepare_setup

from ..methods.conftest import GIVEN
from .conftest import tiny_config

# The run that is resolved.


def test_a_resolved_run_is_frozen_and_does_not_follow_its_config(tmp_path):
    config = tiny_config()
    run = resolve(config, tmp_path)
    config.seed, config.sft.batch_size = 5, 2
    assert (run.config.seed, run.config.sft.batch_size) == (0, 8)
    with pytest.raises(AttributeError, match="immutable"):
        run.config.seed = 5
    with pytest.raises(AttributeError, match="immutable"):
        run.config.preference.reference.kind = "live"
    with pytest.raises(dataclasses.FrozenInstanceError):
        run.workdir = tmp_path / "other"
    with pytest.raises(TypeError, match="item assignment"):
        run.settings["preference"] = None


@pytest.mark.parametrize(
    ("changes", "defaults"),
    [
        # From the papers: Rafailov et al. 2023; Meng et al. 2024; Ethayarajh et al. 2024.
        ({"loss": "dpo"}, {"beta": 0.1, "label_smoothing": 0.0, "gamma": None}),
        ({"loss": "simpo"}, {"beta": 2.0, "gamma": 1.0, "tau": None}),
        ({"loss": "kto"}, {"beta": 0.1, "desirable_weight": 1.0, "undesirable_weight": 1.0}),
        # TRL's length-averaged IPO, and its SimPO.
        ({"loss": "ipo", "preset": "trl-1.16"}, {"beta": 0.1, "length_norm": "mean"}),
        ({"loss": "simpo", "preset": "trl-1.16"}, {"beta": 0.1, "gamma": 0.5}),
        ({"loss": "dpo", "beta": 0.3, "preset": "halos"}, {"beta": 0.3, "label_smoothing": 0.0}),
    ],
)
def test_options_that_are_left_open_are_filled_in_and_others_are_kept(changes, defaults):
    config = tiny_config(**{f"preference.{key}": value for key, value in changes.items()})
    run = resolve(config, "unused")
    assert {key: run.config.preference[key] for key in defaults} == defaults


@pytest.mark.parametrize("loss", preference.LOSSES)
def test_every_option_of_a_loss_is_filled_in_and_no_option_of_another(loss):
    changes = {"loss": loss} | GIVEN.get(loss, {})
    config = tiny_config(**{f"preference.{key}": value for key, value in changes.items()})
    config.preference.reference.kind = "live"
    run = resolve(config, "unused")
    bound = run.settings["preference"].options
    for key in preference.OPTIONS:
        # Some options may stay open: Plackett-Luce then orders all places.
        is_bound = bound.get(key) not in (None, "")
        assert (run.config.preference[key] not in (None, "")) == is_bound, key
        assert not is_bound or run.config.preference[key] == bound[key]


def test_evaluations_of_ppo_use_its_reward_unless_samples_names_another():
    ppo = {"stages": ("ppo",), "ppo.reward": "reviews:log_odds"}
    assert resolve(tiny_config(**ppo), "unused").settings["ppo"] == "reviews:log_odds"
    other = resolve(tiny_config(**ppo, **{"samples.reward": "reviews"}), "unused")
    assert other.settings["ppo"] == "reviews"
    both = resolve(tiny_config(**ppo | {"stages": ("preference", "ppo")}), "unused")
    assert both.config.samples.reward == ""  # the preference stage draws no samples for it


def test_a_workdir_on_s3_is_refused_before_anything_is_read():
    with pytest.raises(ConfigError, match=r"--workdir=s3://bucket/run: checkpoints cannot be"):
        resolve(tiny_config(), "s3://bucket/run")


@pytest.mark.parametrize(
    "values", [{"preference": {"betaa": 0.1}}, {"dpo": {"beta": 0.3}}, {"seed": "zero"}]
)
def test_a_config_of_json_with_an_unknown_key_or_type_is_an_error_that_names_it(values):
    with pytest.raises(
        ConfigError, match=r"job\.json: not a config of this version .*(beta|dpo|seed)"
    ):
        config_from_json(values, where="job.json")


@pytest.mark.parametrize("stages", [("sft", "preference"), ("sft", "ppo"), ("sft", "reward")])
def test_a_resolved_config_resolves_to_itself(stages, tmp_path):
    run = resolve(tiny_config(stages=stages), tmp_path)
    again = resolve(run.config, run.workdir)
    assert as_json(again.config) == as_json(run.config)
    assert again.workdir == run.workdir


# The workdir.


@pytest.mark.parametrize("name", ["", " "])
def test_an_empty_workdir_is_an_error(name):
    with pytest.raises(ConfigError, match="--workdir is empty"):
        resolve(tiny_config(), name)


def test_a_workdir_is_absolute_and_its_tilde_is_the_home_folder(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    assert str(resolve(tiny_config(), "~/runs/a").workdir) == str(tmp_path / "runs" / "a")
    assert str(resolve(tiny_config(), "runs/a").workdir) == str(tmp_path / "runs" / "a")
    with pytest.raises(ConfigError, match=r"--workdir = ftp://host/a: ftp:// is not supported"):
        resolve(tiny_config(), "ftp://host/a")


# The order of stages.


def test_any_order_resolves_in_which_each_stage_starts_from_what_the_one_before_makes():
    """All but a reward model and a classifier make a policy, which every stage starts from."""
    for count in range(1, 4):
        for stages in itertools.permutations(STAGES, count):
            if {"reward", "classifier"}.isdisjoint(stages[:-1]):
                run = resolve(orderly_config(stages), "unused")
                assert run.config.stages == stages
                assert set(run.settings) == set(stages)
            else:
                with pytest.raises(ConfigError, match=re.escape(f"config.stages = {stages!r}: ")):
                    resolve(orderly_config(stages), "unused")


def orderly_config(stages):
    return tiny_config(**{"stages": stages, "classifier.data.source": "texts.jsonl"})


@pytest.mark.parametrize(
    ("stages", "message"),
    [
        (("reward", "sft"), "reward makes a reward model, whose head .* sft starts from a policy"),
        (("classifier", "ppo"), "classifier makes a classifier, whose head .* ppo starts from"),
        (("sft", "reward", "preference"), "put reward last, or into a run of its own"),
        (("sft", "preference", "sft"), "sft is named twice"),
        (("sft", "dpo"), "there is no stage 'dpo'; there are sft, preference, reward"),
        ((), "config.stages is empty: name one or more of sft, preference"),
    ],
)
def test_an_order_that_makes_no_sense_says_why(stages, message):
    with pytest.raises(ConfigError, match=message):
        resolve(orderly_config(stages), "unused")


# The head of the model that a stage starts from.


@pytest.fixture(scope="module")
def language_model(tmp_path_factory):
    """A Hugging Face folder of a one-layer policy with the words of the embedded task."""
    folder = tmp_path_factory.mktemp("model") / "model"
    save_model(folder)
    return folder


def save_model(folder, labels=None):
    """A policy; with `labels` a classifier of these, and with () a reward model."""
    tokenizer = reviews.tokenizer()
    sizes = {"width": 16, "layers": 1, "heads": 2, "mlp_width": 16, "max_positions": 128}
    config = DecoderConfig(**LLAMA, **sizes, vocab_size=len(tokenizer))
    params = jax.jit(decoder.build(config).init)(jax.random.key(0))
    if labels is not None:
        config, params = with_scalar_head(config, params, jax.random.key(1), labels)
    huggingface.save(folder, config, params, tokenizer=tokenizer)


@pytest.mark.parametrize(
    ("labels", "kind"), [((), "a reward model"), (("neg", "pos"), "a classifier of neg, pos")]
)
def test_a_stage_of_policies_says_which_head_it_found_in_its_models_folder(tmp_path, labels, kind):
    save_model(tmp_path / "model", labels)
    architecture = json.loads((tmp_path / "model" / "config.json").read_text())["architectures"]
    assert architecture[0].endswith("ForSequenceClassification")
    changes = {"model.path": str(tmp_path / "model"), "stages": ("sft", "preference", "ppo")}
    setup = prepare_setup(resolve(tiny_config(**changes), tmp_path / "run"))
    for name in setup.config.stages:
        message = (
            rf"config\.model\.path = .*/model' holds {kind}: its head is score\.weight.*{name}"
        )
        with pytest.raises(ConfigError, match=message):
            open_stage(setup, name)


def test_a_reward_stage_may_start_from_a_reward_model(tmp_path):
    save_model(tmp_path / "model", ())
    changes = {"model.path": str(tmp_path / "model"), "stages": ("reward",)}
    setup = prepare_setup(resolve(tiny_config(**changes), tmp_path / "run"))
    assert open_stage(setup, "reward").setup.model.config.scalar_head


# The files that a run began with.

PAIRS = [{"prompt": f"the {i}", "chosen": " was good", "rejected": " was bad"} for i in range(8)]


def write(path: pathlib.Path, rows: list[dict]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


@pytest.fixture
def inputs(tmp_path, language_model):
    """A folder with one of every kind of file that decides the result of a run."""
    folder = tmp_path / "inputs"
    shutil.copytree(language_model, folder / "model")
    shutil.copytree(language_model, folder / "reference")
    write(folder / "pairs.jsonl", PAIRS)
    write(folder / "eval.jsonl", PAIRS[:3])
    write(folder / "prompts.jsonl", PAIRS)
    (folder / "template.jinja").write_text("{{ messages[0].content }}")
    return folder


def resolved(inputs, **changes):
    """A run of preference and PPO stages on such a folder; its workdir is beside it."""
    keys = {
        "stages": ("preference", "ppo"),
        "model.path": str(inputs / "model"),
        "chat_template": str(inputs / "template.jinja"),
        "preference.data.source": str(inputs / "pairs.jsonl"),
        "preference.data.eval_source": str(inputs / "eval.jsonl"),
        "preference.reference.path": str(inputs / "reference"),
        "ppo.prompts": str(inputs / "prompts.jsonl"),
        "ppo.reward": f"classifier:{inputs / 'reference'}:POSITIVE",
        "samples.prompts": str(inputs / "prompts.jsonl"),
    }
    return resolve(tiny_config(**keys | changes), inputs.parent / "run")


def permute_token_ids(folder):
    path = folder / "tokenizer.json"
    content = json.loads(path.read_text())
    words = content["model"]["vocab"]
    first, second = list(words)[10:12]
    words[first], words[second] = words[second], words[first]
    path.write_text(json.dumps(content))


def flip_a_bit(path):
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)


# Each one: what changes, the key that names it, the path in the message.
FILE_CHANGES = {
    "a record less": (
        lambda folder: write(folder / "pairs.jsonl", PAIRS[:-1]),
        "preference.data.source",
        "pairs.jsonl",
    ),
    "half the records": (
        lambda folder: write(folder / "pairs.jsonl", PAIRS[::2]),
        "preference.data.source",
        "pairs.jsonl",
    ),
    "records appended": (
        lambda folder: write(folder / "pairs.jsonl", PAIRS + PAIRS[:1]),
        "preference.data.source",
        "pairs.jsonl",
    ),
    "records in another order": (
        lambda folder: write(folder / "pairs.jsonl", PAIRS[::-1]),
        "preference.data.source",
        "pairs.jsonl",
    ),
    "held-out records": (
        lambda folder: write(folder / "eval.jsonl", PAIRS[1:4]),
        "preference.data.eval_source",
        "eval.jsonl",
    ),
    "prompts": (
        lambda folder: write(folder / "prompts.jsonl", PAIRS[1:]),
        "ppo.prompts",
        "prompts.jsonl",
    ),
    "token ids": (lambda folder: permute_token_ids(folder / "model"), "tokenizer", "model"),
    "chat template": (
        lambda folder: (folder / "template.jinja").write_text("{{ messages }}"),
        "chat_template",
        "template.jinja",
    ),
    "weights": (
        lambda folder: flip_a_bit(folder / "model" / "model.safetensors"),
        "model.path",
        "model",
    ),
    "ids that end a response": (
        lambda folder: (folder / "model" / "generation_config.json").write_text(
            json.dumps({"eos_token_id": [1, 2]})
        ),
        "model.path",
        "model",
    ),
    "the reference's weights": (
        lambda folder: flip_a_bit(folder / "reference" / "model.safetensors"),
        "preference.reference.path",
        "reference",
    ),
    "the reward's weights": (
        lambda folder: flip_a_bit(folder / "reference" / "model.safetensors"),
        "ppo.reward",
        "reference",
    ),
    "the reward's centre": (
        lambda folder: (folder / "reference" / "reward_centre.json").write_text('{"score": 1.0}'),
        "ppo.reward",
        "reference",
    ),
}


@pytest.mark.parametrize("change", FILE_CHANGES)
def test_a_file_that_changed_behind_its_path_refuses_the_resume(inputs, change):
    edit, key, name = FILE_CHANGES[change]
    write_or_compare_config(resolved(inputs))
    write_or_compare_config(resolved(inputs))  # as it was, it resumes
    before = {path.name: path.read_bytes() for path in (inputs.parent / "run").iterdir()}
    edit(inputs)
    with pytest.raises(ConfigError) as refused:
        write_or_compare_config(resolved(inputs))
    message = str(refused.value)
    hashes = re.search(
        rf"  config\.{re.escape(key)} \(.*{re.escape(str(inputs / name))}.*\): "
        r"sha256 ([0-9a-f]{16}), now ([0-9a-f]{16})\n",
        message,
    )
    assert hashes, message
    assert hashes[1] != hashes[2]
    after = {path.name: path.read_bytes() for path in (inputs.parent / "run").iterdir()}
    assert after == before


def test_the_file_that_changed_inside_a_folder_is_named(inputs):
    write_or_compare_config(resolved(inputs))
    flip_a_bit(inputs / "model" / "model.safetensors")
    (inputs / "model" / "generation_config.json").unlink(missing_ok=True)
    (inputs / "model" / "model-2.safetensors").write_bytes(b"new")
    with pytest.raises(ConfigError) as refused:
        write_or_compare_config(resolved(inputs))
    assert "    changed: model.safetensors; added: model-2.safetensors" in str(refused.value)


def test_a_file_that_is_added_to_a_folder_of_data_is_named(inputs):
    folder = inputs / "folder"
    folder.mkdir()
    for name in ("a", "b"):
        write(folder / f"{name}.jsonl", PAIRS)
    changes = {"preference.data.source": str(folder)}
    write_or_compare_config(resolved(inputs, **changes))
    write(folder / "c.jsonl", PAIRS)
    write(folder / "b.jsonl", PAIRS[1:])
    with pytest.raises(ConfigError, match=r"\n    changed: b\.jsonl; added: c\.jsonl\n"):
        write_or_compare_config(resolved(inputs, **changes))


def test_a_run_whose_data_changed_trains_nothing(inputs, monkeypatch):
    """At the old position of the new data it would see some records twice and others never."""
    changes = {"stages": ("sft",), "sft.data.source": str(inputs / "pairs.jsonl")}
    changes |= {"sft.data.eval_source": str(inputs / "eval.jsonl"), "sft.batch_size": 2}
    config, workdir = tiny_config(**changes), inputs.parent / "run"
    write_or_compare_config(resolve(config, workdir))
    write(inputs / "pairs.jsonl", PAIRS[::-1])
    monkeypatch.setattr(runs, "train_in_turn", None)
    with pytest.raises(ConfigError, match=r"config\.sft\.data\.source \(.*pairs\.jsonl\): sha256"):
        runs.run(config, workdir)
    assert sorted(path.name for path in workdir.iterdir()) == ["config.json", "contents.json"]


def test_the_hashes_of_a_changed_file_are_those_of_its_bytes(inputs):
    template = inputs / "template.jinja"

    def sha256():
        return hashlib.sha256(template.read_bytes()).hexdigest()[:16]

    write_or_compare_config(resolved(inputs))
    before = sha256()
    template.write_text("{{ messages }}")
    with pytest.raises(ConfigError, match=rf"sha256 {before}, now {sha256()}"):
        write_or_compare_config(resolved(inputs))


def test_the_same_bytes_at_another_path_resume(inputs):
    write_or_compare_config(resolved(inputs))
    moved = inputs.rename(inputs.with_name("moved"))
    write_or_compare_config(resolved(moved))
    config = json.loads((inputs.parent / "run" / "config.json").read_text())
    assert config["model"]["path"] == str(moved / "model")
    assert config["ppo"]["prompts"] == str(moved / "prompts.jsonl")


def test_other_bytes_at_another_path_are_a_change_of_the_config(inputs):
    write_or_compare_config(resolved(inputs))
    other = inputs / "other" / "pairs.jsonl"
    other.parent.mkdir()
    write(other, PAIRS[1:])
    change = rf"preference\.data\.source: '{inputs}/pairs\.jsonl' -> '{other}'"
    with pytest.raises(ConfigError, match=change):
        write_or_compare_config(resolved(inputs, **{"preference.data.source": str(other)}))


def test_a_moved_model_with_another_tokenizer_is_refused(inputs):
    """The config names the model alone, and its weights are the same."""
    write_or_compare_config(resolved(inputs))
    moved = (inputs / "model").rename(inputs / "moved")
    permute_token_ids(moved)
    with pytest.raises(ConfigError, match=rf"config\.tokenizer \({moved}\): sha256"):
        write_or_compare_config(resolved(inputs, **{"model.path": str(moved)}))


@pytest.mark.parametrize(
    ("key", "before", "after"),
    [
        ("ppo.reward", "classifier:{}/reference:POS", "classifier:{}/reference:NEG"),
        ("ppo.reward", "classifier:{}/reference", "reward_model:{}/reference"),
        ("ppo.reward", "reviews", "reviews:log_odds"),
        ("ppo.reward", "reviews", "reward_model:{}/reference"),
        ("ppo.prompts", "{}/prompts.jsonl", "prefixes:{}/prompts.jsonl"),
        ("ppo.prompts", "prefixes:{}/prompts.jsonl", "prefixes:{}/prompts.jsonl@test"),
    ],
)
def test_another_use_of_the_same_files_is_a_change_of_the_config(inputs, key, before, after):
    before, after = before.format(inputs), after.format(inputs)
    write_or_compare_config(resolved(inputs, **{key: before}))
    with pytest.raises(ConfigError, match=re.escape(f"  {key}: {before!r} -> {after!r}")):
        write_or_compare_config(resolved(inputs, **{key: after}))


def test_a_home_folder_is_meant_by_a_tilde_in_every_path(inputs, monkeypatch):
    write_or_compare_config(resolved(inputs))
    monkeypatch.setenv("HOME", str(inputs.parent))
    names = {"chat_template": "template.jinja", "model.path": "model"}
    names |= {"preference.data.source": "pairs.jsonl", "ppo.prompts": "prompts.jsonl"}
    tilde = {key: f"~/inputs/{name}" for key, name in names.items()}
    assert resolved(inputs, **tilde).contents.keys() == resolved(inputs).contents.keys()
    write_or_compare_config(resolved(inputs, **tilde))


def test_a_file_that_is_not_there_is_an_error_that_names_its_key(inputs):
    (inputs / "template.jinja").unlink()
    with pytest.raises(ConfigError, match=r"config\.chat_template: .*template\.jinja"):
        write_or_compare_config(resolved(inputs))
    assert not (inputs.parent / "run").exists()


def test_a_finished_run_is_compared_without_its_files(inputs):
    run = resolved(inputs)
    write_or_compare_config(run)
    (run.workdir / saved.FINISHED).write_text("{}")
    shutil.rmtree(inputs)
    compare_config(resolved(inputs))
    with pytest.raises(ConfigError, match=r"preference\.beta: 0\.1 -> 0\.3"):
        compare_config(resolved(inputs, **{"preference.beta": 0.3}))


def test_a_run_that_other_code_began_says_so_at_every_resume(inputs, monkeypatch):
    run = resolved(inputs)
    monkeypatch.setattr(saved, "code_version", lambda: {"dpojax": "1.0", "code": "aaaa"})
    write_or_compare_config(run)
    assert saved.code_changed(run.workdir) == ""
    monkeypatch.setattr(saved, "code_version", lambda: {"dpojax": "1.1", "code": "bbbb"})
    for _ in range(2):
        write_or_compare_config(run)
        warning = saved.code_changed(run.workdir)
        assert "was begun by dpojax 1.0 with other code (hash aaaa, now 1.1 and bbbb)" in warning
