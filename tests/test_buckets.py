"""Data, models and results on a bucket are what they are on a disk. For checkpoints and metrics
see tests/training."""

import json

import datasets
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dpojax import storage
from dpojax.data import examples, sources
from dpojax.data.examples import Example
from dpojax.data.records import DataError
from dpojax.evaluation import frontier_points, optimum, plots
from dpojax.models import decoder, huggingface, lora
from dpojax.models.config import LLAMA, DecoderConfig
from dpojax.models.lora import LoraConfig
from dpojax.models.lora_peft import load_peft, save_peft
from dpojax.training import profile
from dpojax.training.reference import Store, cached
from tests import stored_examples
from tests.gcs import bucket, gcs_emulator  # noqa: F401 (fixtures)

ROWS = [{"prompt": f"p{i}", "chosen": f"c{i}", "rejected": f"r{i}"} for i in range(3)]
LINES = "".join(json.dumps(row) + "\n" for row in ROWS)
TINY = DecoderConfig(
    **LLAMA,
    vocab_size=51,
    width=24,
    layers=2,
    heads=4,
    mlp_width=40,
    max_positions=64,
    kv_heads=1,
    head_dim=8,
)


@pytest.fixture
def folder(bucket, tmp_path, monkeypatch):  # noqa: F811
    monkeypatch.setenv("DPOJAX_MIRROR", str(tmp_path / "mirror"))
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    return storage.as_path(bucket) / "folder"


def rows(path):
    return [row for row, _ in sources.read(path)]


def equal(a, b):
    assert jax.tree.structure(a) == jax.tree.structure(b)
    jax.tree.map(np.testing.assert_array_equal, a, b)


def test_json_and_parquet_are_read_with_the_same_ids_and_fingerprint(folder, tmp_path):
    with storage.replacing(folder / "a.parquet") as unfinished:
        datasets.Dataset.from_list(ROWS).to_parquet(unfinished)
    for place in (folder, storage.as_path(tmp_path)):
        storage.write_text(place / "b.jsonl", LINES)
        storage.write_text(place / "c.jsonl", LINES)
    assert rows(folder / "a.parquet") == rows(str(folder / "b.jsonl")) == ROWS
    pattern, local = f"{folder}/*.jsonl", f"{tmp_path}/*.jsonl"
    assert list(sources.read(pattern)) == list(sources.read(local))
    assert sources.fingerprint(pattern) == sources.fingerprint(local)


def test_a_folder_of_a_data_set_is_read_and_has_the_fingerprint_of_a_local_one(folder, tmp_path):
    with storage.replacing_folder(tmp_path / "saved") as unfinished:
        datasets.Dataset.from_list(ROWS).save_to_disk(unfinished)
    storage.share_folder(tmp_path / "saved", folder / "saved")
    assert rows(folder / "saved") == ROWS
    assert sources.fingerprint(folder / "saved") == sources.fingerprint(tmp_path / "saved")


def test_bad_data_is_named_by_its_place_on_the_bucket(folder):
    storage.write_text(folder / "train.jsonl", LINES + "no json\n")
    with pytest.raises(DataError, match=rf"{folder}/train\.jsonl:4: not valid JSON"):
        rows(folder / "train.jsonl")
    with pytest.raises(DataError, match=r"tain\.jsonl: no such file .*did you mean train\.jsonl"):
        rows(folder / "tain.jsonl")


def test_tokenised_examples_come_back(folder):
    token_ids = np.arange(3, dtype=np.int32)
    one = Example("a:1", token_ids, (token_ids, token_ids[:2]), (False, True), None)
    stored_examples.save(folder / "key.arrow", examples.Examples.of([one]), {"about": 1})
    ((again,), _), about = examples.load(folder / "key.arrow")
    assert (again.id, again.cut, about) == ("a:1", (False, True), {"about": 1})
    equal(again.responses, one.responses)


def test_reference_log_probs_are_computed_once_and_again_where_their_file_is_damaged(
    folder, caplog
):
    token_ids = np.arange(3, dtype=np.int32)
    pairs = [Example("a:1", token_ids, (token_ids, token_ids), (False, False), None)]
    store = Store(pairs)
    store.values[:] = np.arange(len(store.values))
    assert [cached(folder, "key", pairs, lambda: store)[1] for _ in range(2)] == [False, True]
    equal(cached(folder, "key", pairs, None)[0].values, store.values)
    storage.write_bytes(folder / "key.npy", (folder / "key.npy").read_bytes()[:-4])
    assert [cached(folder, "key", pairs, lambda: store)[1] for _ in range(2)] == [False, True]
    assert caplog.text.count(f"{folder}/key.npy is damaged") == 1


def test_a_model_is_saved_whole_with_its_config_last_and_loaded(folder):
    params = decoder.build(TINY).init(jax.random.key(0))
    huggingface.save(folder / "model", TINY, params, max_shard_bytes=20_000, centre=0.5)
    config, again, _ = huggingface.load(folder / "model")
    assert config == TINY
    equal(again, params)
    assert huggingface.read_centre(folder / "model") == 0.5
    objects = {path.name: path for path in (folder / "model").iterdir()}
    assert len(objects) > 3
    written = storage.paths.objects_below(folder / "model")
    assert max(written, key=lambda name: storage.paths.modified(written[name])) == "config.json"
    names = [
        path.name for path in storage.Path(huggingface.pretrained_name(folder / "model")).iterdir()
    ]
    assert "config.json" in names
    assert not any(name.endswith(".safetensors") for name in names)
    with pytest.raises(FileExistsError, match="not empty"):
        huggingface.save(folder / "model", TINY, params)


def test_adapters_are_saved_and_loaded(folder):
    params = decoder.build(TINY).init(jax.random.key(0))
    config = LoraConfig(rank=2, alpha=4)
    adapters = jax.tree.map(jnp.ones_like, lora.init(jax.random.key(0), params, config))
    save_peft(folder / "adapters", adapters, config, TINY)
    again, _ = load_peft(folder / "adapters", TINY)
    equal(again, adapters)


def test_points_and_the_optimum_come_back_and_figures_are_drawn(folder):
    points = [frontier_points.Point("dpo", "beta=\r0.1", 0, 1, *[0.5] * 9)]
    frontier_points.write_points(folder / "points.csv", points)
    assert str(frontier_points.read_points(folder / "points.csv")) == str(points)
    values = np.linspace(0.0, 1.0, 3)
    fields = dict.fromkeys(optimum.Optimum._fields, values) | {"trusted": values > 0}
    optimum.write_optimum(folder / "optimum.json", optimum.Optimum(**fields))
    equal(optimum.read_optimum(folder / "optimum.json"), optimum.Optimum(**fields))
    plots.training_curves({}, folder / "training.png")
    assert (folder / "training.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.slow
def test_a_trace_and_the_profile_are_uploaded(folder):
    spans = profile.Spans(folder)
    for _ in range(profile.TRACED.stop):
        with spans(profile.STEP):
            spans.stepped(jnp.ones(3) + 1)
    spans.end()
    assert any(name.endswith(".xplane.pb") for name in storage.paths.objects_below(folder))
    profile.write(folder, spans, {"forward": 1.0}, 0.5)
    assert storage.read_json(folder / "profile.json")["utilisation"] == 0.5
