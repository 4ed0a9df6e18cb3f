"""Preference generation: what it writes, that it resumes to the same bytes, what it refuses."""

import dataclasses
import functools
import json
import shutil
import subprocess
import sys

import jax
import numpy as np
import pyarrow.parquet as pq
import pytest

from dpojax import storage
from dpojax.config.errors import ConfigError
from dpojax.data import reviews, sources
from dpojax.data.prompts import read_prompts
from dpojax.data.records import DataError
from dpojax.evaluation.policies import NothingStopped
from dpojax.jobs.job import execute
from dpojax.models import decoder, huggingface
from dpojax.models.config import LLAMA, DecoderConfig
from dpojax.plans.job_maker import JobMaker
from dpojax.runs import preferences
from dpojax.runs.policy import load_policy
from dpojax.runs.preferences import Settings, generate_preferences
from dpojax.stages import data as stage_data
from dpojax.stages.data import DataRequirements
from dpojax.stages.registry import resolve
from dpojax.stages.setup import prepare_setup
from dpojax.training import reference
from dpojax.training.checkpoints import CheckpointError, Checkpoints

from .conftest import ROOT, environment, tiny_config

PARTS = [f"part-{i:05d}-of-00003.parquet" for i in range(3)]


def save_model(folder, seed: int = 0):
    """A random one-layer policy on the words of the embedded task, which ends about half the time:
    its hidden states have a part in common, along which lies the head's EOS."""
    tokenizer = reviews.tokenizer()
    sizes = {"width": 16, "layers": 1, "heads": 2, "mlp_width": 16, "max_positions": 32}
    config = DecoderConfig(**LLAMA, **sizes, vocab_size=len(tokenizer))
    shapes = jax.eval_shape(decoder.build(config).init, jax.random.key(0))
    rng = np.random.default_rng(seed)
    params = jax.tree.map(lambda x: np.float32(0.2 * rng.normal(size=x.shape)), shapes)
    params["final_norm"]["scale"] = np.ones(16, np.float32)
    params["embed"]["tokens"][:, 0] += 2
    params["head"]["kernel"][tokenizer.eos_token_id, 0] += 1.1
    huggingface.save(folder, config, jax.device_put(params), tokenizer=tokenizer)
    return str(folder)


@pytest.fixture(scope="module", autouse=True)
def one_policy():
    """A policy is loaded once and known by its place, so that its sampler is compiled once."""
    known = {}

    def fingerprint(params):
        if id(params) not in known:
            known[id(params)] = params, reference.fingerprint(params)
        return known[id(params)][1]

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(preferences, "load_policy", functools.cache(load_policy))
        patched.setattr(preferences, "fingerprint", fingerprint)
        yield


@pytest.fixture(scope="module")
def policy(tmp_path_factory):
    return save_model(tmp_path_factory.mktemp("policy") / "model")


def settings(policy, out, **changes):
    """Ten prompts in three shards, three completions each."""
    values = {"prompts": "reviews", "reward": "reviews", "limit": 10, "completions": 3}
    values |= {"max_new_tokens": 9, "batch_size": 4, "shard_size": 4}
    return Settings(policy=policy, out=str(out), **values | changes)


@pytest.fixture(scope="module")
def made(policy, tmp_path_factory):
    """A finished folder and what `generate_preferences` returned."""
    out = tmp_path_factory.mktemp("made") / "pairs"
    return out, generate_preferences(settings(policy, out))


def table(folder, names=PARTS):
    return [row for name in names for row in pq.read_table(folder / name).to_pylist()]


def all_bytes(folder):
    return {name: (folder / name).read_bytes() for name in PARTS}


def test_every_pair_is_one_of_the_prompts_with_exact_scores_and_the_better_one_chosen(made):
    out, _ = made
    assert sorted(path.name for path in out.iterdir()) == [*PARTS, "provenance.json"]
    rows, prompts = table(out), reviews.prompts("train", 10, 0)
    assert {row["prompt_index"] for row in rows} <= set(range(10))
    for name in ("chosen", "rejected"):
        want = reviews.reward([row["prompt"] + row[name] for row in rows])
        np.testing.assert_allclose([row[f"score_{name}"] for row in rows], want, rtol=1e-9)
    for row in rows:
        assert row["prompt"] == prompts[row["prompt_index"]]
        assert row["score_chosen"] > row["score_rejected"]
        assert all(row[name].startswith(" ") for name in ("chosen", "rejected"))
    assert len({row["prompt_index"] for row in rows}) > 5


def test_provenance_counts_everything_and_names_what_made_it(made):
    out, record = made
    assert json.loads((out / "provenance.json").read_text()) == record
    counts = record["counts"]
    assert counts["prompts"] == 10
    assert counts["completions"] == 30
    assert counts["records"] == len(table(out))
    # Of 3 completions there are 3 pairs, less 2 or 3 for the first and the second blank one.
    pairs_of_blank = 30 - counts["records"] - counts["ties"] - counts["identical"]
    assert 2 * counts["empty"] >= pairs_of_blank >= counts["empty"]
    assert 0 < counts["truncated"] < 30
    assert record["versions"][0]["jax"] == jax.__version__
    assert record["settings"]["seed"] == 0
    assert len(record["inputs"]["policy"]) == 64


def test_a_lost_shard_is_made_again_to_the_same_bytes_and_the_others_are_left(made, policy):
    out, record = made
    before = all_bytes(out)
    times = [(out / name).stat().st_mtime_ns for name in (PARTS[0], PARTS[2])]
    (out / PARTS[1]).unlink()
    lines = []
    assert (
        generate_preferences(settings(policy, out), log=lines.append)["counts"] == record["counts"]
    )
    assert all_bytes(out) == before
    assert [(out / name).stat().st_mtime_ns for name in (PARTS[0], PARTS[2])] == times
    assert ["is there already" in line for line in lines] == [True, False, True]


def test_two_processes_make_what_one_makes(made, policy, tmp_path):
    out, record = made
    first = generate_preferences(settings(policy, tmp_path / "two"), process=(0, 2))
    assert first["counts"] is None
    assert sorted(p.name for p in (tmp_path / "two").glob("*.parquet")) == [PARTS[0], PARTS[2]]
    second = generate_preferences(settings(policy, tmp_path / "two"), process=(1, 2))
    assert second["counts"] == record["counts"]
    assert all_bytes(tmp_path / "two") == all_bytes(out)
    with pytest.raises(ConfigError, match="process 2 of 2: they are counted from 0"):
        generate_preferences(settings(policy, tmp_path / "two"), process=(2, 2))


def test_jobs_in_another_number_of_parts_leave_the_data_as_they_were(made, policy, tmp_path):
    """A frontier that goes on with other --workers does not change what its runs began with."""
    maker = JobMaker(storage.as_path(tmp_path))
    hashes = []
    for count in (2, 1):
        for index in range(count):
            job = maker.preferences(
                "preferences",
                settings(policy, tmp_path / "preferences"),
                needs=(),
                kind="preferences",
                part=(index, count),
            )
            for path, content in maker.files.items():
                storage.write_json(storage.as_path(path), content)
            assert not job.is_done
            execute(job)
            assert job.is_done
        hashes.append(sources.fingerprint(tmp_path / "preferences"))
    assert hashes[0] == hashes[1]
    assert all_bytes(tmp_path / "preferences") == all_bytes(made[0])


def test_a_process_that_dies_while_it_writes_leaves_no_shard(made, policy, tmp_path, monkeypatch):
    out, _ = made

    def die(self, table):
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(pq.ParquetWriter, "write_table", die)
        with pytest.raises(KeyboardInterrupt):
            generate_preferences(settings(policy, tmp_path))
    assert not list(tmp_path.glob("part-*"))
    generate_preferences(settings(policy, tmp_path))
    assert all_bytes(tmp_path) == all_bytes(out)
    assert not list(tmp_path.glob(".*"))


def test_a_rerun_with_other_settings_is_refused_and_says_which(made, policy, tmp_path):
    out, _ = made
    before = all_bytes(out)
    refused = lambda **changes: pytest.raises(ConfigError, match=changes.pop("match"))
    with refused(match=r"made otherwise(.|\n)*temperature: 1.0, now 0.7\Z"):
        generate_preferences(settings(policy, out, temperature=0.7))
    with refused(match=r"limit: 10, now 9\n  what is in prompts: "):
        generate_preferences(settings(policy, out, limit=9))
    with refused(match="what is in reward: 'reviews:probability', now 'reviews:log_odds'"):
        generate_preferences(settings(policy, out, reward="reviews:log_odds"))
    other = save_model(tmp_path / "other", seed=1)
    with refused(match=r"these changes:\n  what is in policy: "):
        generate_preferences(settings(other, out))
    assert all_bytes(out) == before
    shutil.copy(out / PARTS[0], tmp_path)
    with refused(match=r"provenance.json: does not say what made the shards beside it"):
        generate_preferences(settings(policy, tmp_path))


@pytest.mark.parametrize("pairs", ["all", "ranked"])
def test_the_folder_is_a_data_source_of_training(made, policy, tmp_path, pairs):
    out, record = made
    if pairs == "ranked":
        out = tmp_path / "ranked"
        record = generate_preferences(settings(policy, out, pairs="ranked", shard_size=20))
        for row in pq.read_table(next(out.glob("*.parquet"))).to_pylist():
            texts = [row["prompt"] + text for text in row["responses"]]
            np.testing.assert_allclose(row["scores"], reviews.reward(texts), rtol=1e-9)
            assert row["scores"] == sorted(row["scores"], reverse=True)
            assert row["ranks"][0] == 1
    records, _ = sources.load_records(out)
    assert len(records) == record["counts"]["records"]
    assert all(one.scores[0] > one.scores[-1] for one in records)
    config = tiny_config(**{"preference.data.source": str(out), "preference.data.limit": 0})
    config.preference.data.update(eval_share=0.3, eval_limit=0)
    loaded = stage_data.load(
        config.preference.data,
        config.tokens,
        reviews.tokenizer(),
        requirements=DataRequirements("ranked", scores=True),
        seed=0,
    )
    assert loaded.train + len(loaded.held_out) == len(records)


def test_sampled_labels_sometimes_prefer_the_lower_score(made, policy, tmp_path):
    how = {"labels": "bradley_terry", "label_temperature": 0.1}
    generate_preferences(settings(policy, tmp_path / "noisy", **how))
    rows, sure = table(tmp_path / "noisy"), table(made[0])
    pairs = lambda rows: {frozenset((r["prompt"], r["chosen"], r["rejected"])) for r in rows}
    assert pairs(sure) <= pairs(rows)
    lower = [row["score_chosen"] < row["score_rejected"] for row in rows]
    assert 0 < np.mean(lower) < 0.5


def test_completions_that_were_cut_can_be_dropped(made, policy, tmp_path):
    record = generate_preferences(settings(policy, tmp_path / "whole", truncated="drop"))
    assert record["counts"]["truncated"] == made[1]["counts"]["truncated"]
    rows = table(tmp_path / "whole")
    assert 0 < len(rows) < len(table(made[0]))
    assert max(len(row["chosen"].split()) for row in rows) < 9


def test_a_policy_that_never_ends_is_refused_unless_a_fixed_length_is_meant(
    policy, tmp_path, monkeypatch
):
    loaded = preferences.load_policy(policy)
    kernel = loaded.params["head"]["kernel"].at[loaded.tokenizer.eos_token_id, 0].add(-50)
    endless = loaded._replace(params=loaded.params | {"head": {"kernel": kernel}})
    monkeypatch.setattr(preferences, "load_policy", lambda name: endless)
    with pytest.raises(NothingStopped, match="all 12 responses were cut at max_new_tokens = 9"):
        generate_preferences(settings(policy, tmp_path))
    assert not list(tmp_path.glob("*.parquet"))
    # What was refused left no shard, so other settings may have its folder.
    record = generate_preferences(settings(policy, tmp_path, fixed_length=True, truncated="drop"))
    assert record["counts"]["truncated"] == 30
    assert record["counts"]["records"] == 0
    with pytest.raises(DataError, match="the data set is empty"):
        sources.load_records(tmp_path)


def test_prompts_come_from_lines_or_from_records(tmp_path):
    (tmp_path / "a.txt").write_text("i think\n\nthe plot\n", encoding="utf-8")
    rows = [{"prompt": "i think", "more": 1}, {"prompt": "the plot", "more": 2}, {"prompt": 3}]
    (tmp_path / "a.jsonl").write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    read = lambda name, limit: read_prompts(
        str(tmp_path / name), split="train", limit=limit, seed=0
    )
    assert read("a.txt", 0) == read("a.jsonl", 2) == ["i think", "the plot"]
    assert read("a.txt", 1) == ["i think"]
    with pytest.raises(DataError, match=r"a.jsonl:3: field 'prompt' should be text"):
        read("a.jsonl", 0)
    (tmp_path / "b.txt").write_text("\n")
    with pytest.raises(DataError, match=r"b.txt: holds no prompt"):
        read("b.txt", 0)
    with pytest.raises(DataError, match=r"c.txt: no such file"):
        read("c.txt", 0)


def test_a_policy_may_be_the_stage_of_a_run(tmp_path):
    config = tiny_config()
    (tmp_path / "config.json").write_text(config.to_json())
    abstract = prepare_setup(resolve(config, tmp_path)).abstract_params
    rng = np.random.default_rng(0)
    params = jax.tree.map(lambda x: rng.normal(size=x.shape).astype(x.dtype), abstract)
    with Checkpoints(tmp_path / "sft" / "checkpoints") as saved:
        saved.save(4, {"params": jax.device_put(params)}, metadata={})
    loaded = load_policy(f"{tmp_path}:sft")
    jax.tree.map(np.testing.assert_array_equal, loaded.params, params)
    assert loaded.stop == (reviews.tokenizer().eos_token_id,)
    with pytest.raises(CheckpointError, match="preference/checkpoints: no complete checkpoint"):
        load_policy(str(tmp_path))
    with pytest.raises(ConfigError, match="a run of sft, preference, without a stage 'ppo'"):
        load_policy(f"{tmp_path}:ppo")
    with pytest.raises(FileNotFoundError, match="no such folder"):
        load_policy(str(tmp_path / "nothing"))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"pairs": "some"}, "pairs = 'some': one of all, best_worst, ranked"),
        ({"labels": "soft"}, "labels = 'soft': one of deterministic, bradley_terry"),
        ({"completions": 1}, "completions = 1: must be 2 or more"),
        ({"tie": float("nan")}, "tie = nan: must be 0 or more"),
        ({"label_temperature": 0.0}, "label_temperature = 0.0: must be positive"),
        ({"top_p": 7.0}, "top_p = 7.0: must be above 0 and at most 1"),
        ({"temperature": float("nan")}, "temperature = nan: must be finite"),
        ({"seed": 2**63}, "seed = 9223372036854775808: must be below"),
        ({"limit": 0}, "limit = 0: the prompts of reviews never end"),
    ],
)
def test_a_setting_that_cannot_be_is_named(change, message):
    with pytest.raises(ConfigError, match=message):
        settings("", "", **change)


@pytest.mark.long
def test_the_script_has_a_flag_for_every_setting_and_says_what_is_wrong():
    flags = dataclasses.asdict(settings("p", "o")) | {"labels": "soft", "process": "0/2"}
    done = subprocess.run(
        [
            sys.executable,
            str(ROOT / "scripts" / "prefer.py"),
            *(f"--{k}={v}" for k, v in flags.items()),
        ],
        env=environment(),
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 1
    last = done.stderr.splitlines()[-1]  # without torch, transformers warns first
    assert last == "ConfigError: labels = 'soft': one of deterministic, bradley_terry"
