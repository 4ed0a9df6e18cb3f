"""A classifier trained on labelled texts: its run, its folder, and the reward that opens it."""

import json
import re
import weakref

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from dpojax.config.errors import ConfigError
from dpojax.data import reviews
from dpojax.data.parsing import parse_rows
from dpojax.data.records import DataError
from dpojax.evaluation.rewards import RewardError, open_reward
from dpojax.runs.export import export, main
from dpojax.runs.run import run
from dpojax.stages import classifier_data
from dpojax.stages import data as stage_data
from dpojax.stages.registry import resolve

from .. import metrics_page
from .conftest import lines, tiny_config

NAMES = ["neg", "pos"]


def texts(count):
    """Texts that a word tells apart, sorted by their class as IMDb's are."""
    prompts = reviews.prompts("train", count // 2, 0)
    tails = " was bad , bad , bad .", " was good , good , good ."
    return [
        {"text": prompt + tail, "label": label}
        for label, tail in enumerate(tails)
        for prompt in prompts
    ]


def write_parquet(path, rows):
    """As `datasets` writes a ClassLabel: whole numbers, with their names in the metadata."""
    kind = {"label": {"names": NAMES, "_type": "ClassLabel"}}
    features = {"text": {"dtype": "string", "_type": "Value"}} | kind
    metadata = {"huggingface": json.dumps({"info": {"features": features}})}
    schema = pa.schema({"text": pa.string(), "label": pa.int64()}, metadata)
    pq.write_table(pa.Table.from_pylist(rows, schema), path)


def config(source, **changes):
    settings = {
        "stages": ("classifier",),
        "classifier.data.source": str(source),
        "classifier.data.eval_limit": 40,
        "classifier.data.eval_share": 0.3,
        "classifier.max_tokens": 24,
        "classifier.first_token": 4,
        "classifier.batch_size": 16,
        "classifier.steps": 12,
        "classifier.learning_rate": 0.02,
        "classifier.warmup_steps": 0,
        "evaluate_every": 0,
    }
    return tiny_config(**settings | changes)


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """The workdir of a run on a Parquet file, and its export."""
    folder = tmp_path_factory.mktemp("classifier")
    write_parquet(folder / "texts.parquet", texts(200))
    run(config(folder / "texts.parquet"), str(folder / "run"))
    return folder / "run", export(str(folder / "run"), str(folder / "exported"))


@pytest.mark.slow
def test_it_learns_the_labels_and_says_how_often_it_is_right(trained):
    workdir, _ = trained
    losses = [line["loss"] for line in lines(workdir, "classifier") if line["split"] == "train"]
    assert losses[0] == pytest.approx(np.log(2), abs=0.02)
    assert losses[-1] < 0.6
    summary = json.loads((workdir / "classifier" / "summary.json").read_text())
    low, high = summary["accuracy_interval"]
    assert summary["labels"] == NAMES
    assert summary["texts"] == 40
    assert summary["values"]["after"]["accuracy"] == 1.0
    assert (low, high) == pytest.approx((40 / (40 + 1.959964**2), 1.0))  # Wilson's
    table = (workdir / "classifier" / "summary.txt").read_text()
    assert "cross-entropy (nats)" in table
    before = next(line for line in lines(workdir, "classifier") if line["split"] == "eval")
    assert before["cross_entropy"] == pytest.approx(np.log(2), abs=0.02)
    assert metrics_page.undefined(lines(workdir, "classifier")) == set()


@pytest.mark.slow
def test_the_command_names_what_loads_the_folder(trained, tmp_path, capsys):
    main([f"--workdir={trained[0]}", f"--out={tmp_path / 'out'}"])
    loader = "transformers.AutoModelForSequenceClassification.from_pretrained"
    assert capsys.readouterr().out.endswith(f"{tmp_path / 'out'}: load it with {loader}\n")


@pytest.mark.slow
def test_transformers_gives_the_exported_folder_the_probability_that_the_reward_gives(trained):
    torch = pytest.importorskip("torch", reason="the expected values come from torch")
    import transformers

    _, folder = trained
    model = transformers.AutoModelForSequenceClassification.from_pretrained(folder).eval()
    assert model.config.id2label == {0: "neg", 1: "pos"}
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    halves = [row["text"].split(" was ") for row in texts(12)]
    halves = [(prompt, f" was {tail}") for prompt, tail in halves]
    batch = tokenizer([a + b for a, b in halves], padding=True, return_tensors="pt")
    with torch.no_grad():
        logits = model(batch["input_ids"], attention_mask=batch["attention_mask"]).logits
    want = torch.softmax(logits.double(), -1)[:, 1].numpy()
    positive = open_reward(f"classifier:{folder}")(*zip(*halves))
    np.testing.assert_allclose(positive, want, atol=1e-5)
    assert np.ptp(want) > 0.1
    negative = open_reward(f"classifier:{folder}:Negative")(*zip(*halves))
    np.testing.assert_allclose(negative, 1 - want, atol=1e-5)
    with pytest.raises(RewardError, match=r"no label 'JOY' .*\['neg', 'pos'\]"):
        open_reward(f"classifier:{folder}:JOY")


@pytest.mark.parametrize(
    ("second", "message"),
    [
        ({"text": "b"}, r"a\.jsonl:1: field 'label' is missing .*data\.columns=label=NAME"),
        ({"text": "b", "label": None}, r"a\.jsonl:1: field 'label' should be the class"),
        ({"text": "b", "label": 0.5}, r"a\.jsonl:1: field 'label' should be .*got float 0\.5"),
        ({"label": 1}, r"a\.jsonl:1: field 'text' is missing"),
    ],
)
def test_records_that_say_no_class_are_dropped_by_file_record_and_field(second, message, tmp_path):
    path, other = tmp_path / "a.jsonl", tmp_path / "b.jsonl"
    rows = [second, {"text": "a", "label": "good"}, {"text": "d", "label": "bad"}]
    path.write_text("\n".join(map(json.dumps, rows)))
    other.write_text(json.dumps({"text": "c", "label": "good"}))
    data = config(path, **{"classifier.data.eval_source": str(other)}).classifier.data
    loaded = classifier_data.load(data, reviews.tokenizer(), max_tokens=24, seed=0)
    assert [example.id for example in loaded.examples] == ["a.jsonl:2", "a.jsonl:3", "b.jsonl:1"]
    assert loaded.reports["train"].dropped == 1
    assert re.search(message, str(loaded.reports["train"]))


def test_texts_of_one_class_alone_are_refused(tmp_path):
    path, other = tmp_path / "a.jsonl", tmp_path / "b.jsonl"
    path.write_text("\n".join(json.dumps({"text": text, "label": "good"}) for text in "ab"))
    other.write_text(json.dumps({"text": "c", "label": "good"}))
    data = config(path, **{"classifier.data.eval_source": str(other)}).classifier.data
    with pytest.raises(DataError, match=r"all 2 texts .* are labelled 'good'"):
        classifier_data.load(data, reviews.tokenizer(), max_tokens=24, seed=0)


def test_a_limit_takes_both_classes_of_a_sorted_file_and_texts_are_cut_at_their_end(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text("\n".join(json.dumps(row) for row in texts(200)))
    data = config(path, **{"classifier.data.limit": 40}).classifier.data
    tokenizer = reviews.tokenizer()
    loaded = classifier_data.load(data, tokenizer, max_tokens=9, seed=0)
    assert loaded.labels == ("LABEL_0", "LABEL_1")
    assert len(loaded.examples) == 40
    assert 10 < sum(example.category for example in loaded.examples) < 30
    rows = texts(200)
    for example in loaded.examples:
        row = rows[int(example.id.rpartition(":")[2]) - 1]
        ids = [*example.prompt, *example.responses[0]]
        assert ids == tokenizer(row["text"])["input_ids"][:9]
        assert example.category == row["label"]


def test_no_more_than_a_few_chunks_of_texts_are_held(tmp_path, monkeypatch):
    path = tmp_path / "a.jsonl"
    path.write_text("\n".join(json.dumps(row) for row in texts(200)))
    monkeypatch.setattr(stage_data, "CHUNK", 8)
    references, held = [], []

    def watched(*arguments):
        for record in parse_rows(*arguments):
            references.append(weakref.ref(record))
            held.append(sum(reference() is not None for reference in references))
            yield record
            del record

    monkeypatch.setattr(classifier_data, "parse_rows", watched)
    data = config(path, **{"classifier.data.eval_limit": 0}).classifier.data
    loaded = classifier_data.load(data, reviews.tokenizer(), max_tokens=24, seed=0)
    assert (len(loaded.examples), len(references)) == (200, 2 * 200)
    assert max(held) <= 5 * 8  # two sides are collected, and chunks are tokenised ahead


def test_a_classifier_that_could_not_train_is_refused_with_its_key(tmp_path):
    for key, value, message in [
        ("classifier.max_tokens", 1, r"config\.classifier\.max_tokens = 1: 2 or more"),
        ("classifier.data.source", "", r"config\.classifier\.data\.source = ''"),
        ("classifier.data.form", "pair", r"config\.classifier\.data\.form = 'pair'"),
    ]:
        with pytest.raises(ConfigError, match=message):
            resolve(config("a.jsonl", **{key: value}), tmp_path)
    long = config("a.jsonl", **{"classifier.max_tokens": 500})
    with pytest.raises(ConfigError, match=r"config\.classifier\.max_tokens = 500, but the model"):
        run(long, str(tmp_path))
