"""configs/imdb.py: what its variants say, and that every program of theirs can be built."""

import importlib.util
import json
import pathlib

import pytest

from dpojax.frontier import plan as frontier
from dpojax.config.checks import ConfigError, check
from dpojax.frontier.dry_run import dry_run
from dpojax.stages.setup import prepare

from .conftest import tiny_config

PATH = pathlib.Path(__file__).resolve().parents[2] / "configs" / "imdb.py"
GPT2_LARGE = {
    "model_type": "gpt2",
    "architectures": ["GPT2LMHeadModel"],
    "vocab_size": 50257,
    "n_positions": 1024,
    "n_embd": 1280,
    "n_layer": 36,
    "n_head": 20,
}
ROBERTA_LARGE = {
    "model_type": "roberta",
    "architectures": ["RobertaForSequenceClassification"],
    "vocab_size": 50265,
    "hidden_size": 1024,
    "num_hidden_layers": 24,
    "num_attention_heads": 16,
    "intermediate_size": 4096,
    "max_position_embeddings": 514,
    "type_vocab_size": 1,
    "pad_token_id": 1,
    "id2label": {"0": "NEGATIVE", "1": "POSITIVE"},
}


@pytest.fixture(scope="module")
def imdb():
    spec = importlib.util.spec_from_file_location("imdb", PATH)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("variant", ["small", "paper"])
def test_one_key_says_where_the_reviews_are_and_every_run_of_the_plan_can_start(variant, imdb):
    config = imdb.get_config(variant)
    config.sft.data.source = "FOLDER"
    assert config.classifier.data.eval_source == config.sft.data.eval_source == "FOLDER"
    assert config.frontier.prompts == "prefixes:FOLDER@train"
    assert config.samples.prompts == "prefixes:FOLDER@test"
    runs = imdb.frontier(config)
    assert len(runs) == 22
    check(config)
    for own in frontier.configs(config, runs, pathlib.Path("folder")):
        check(own)
        longest = 1 + 8 + own.samples.max_new_tokens
        assert longest <= own.tokens.max_length


def test_the_papers_programs_are_built_from_shapes_alone(imdb, tmp_path):
    config = imdb.get_config("paper")
    config.model.path, judge = str(tmp_path / "gpt2"), tmp_path / "roberta"
    for folder, raw in (tmp_path / "gpt2", GPT2_LARGE), (judge, ROBERTA_LARGE):
        folder.mkdir()
        (folder / "config.json").write_text(json.dumps(raw))
    config.frontier.reward = f"classifier:{judge}"
    runs = [run for run in imdb.frontier(config) if run.method in ("dpo", "ppo")]
    found = {line.split(":")[0]: line for line in dry_run(config, runs)}
    assert set(found) == {"sft", "classifier", "sampler", "reward", "ppo", "dpo, loss dpo"}
    assert "774,030,080 parameters" in found["sft"]  # what transformers counts
    assert "355,361,794 parameters" in found["classifier"]
    config.model.path = str(tmp_path / "none")
    with pytest.raises(ConfigError, match=r"config\.model\.path"):
        list(dry_run(config, []))


def test_a_tokenizer_is_made_once_from_the_texts_of_sft(tmp_path):
    texts = tmp_path / "texts.jsonl"
    texts.write_text("\n".join(json.dumps({"text": f"a film of {i} parts"}) for i in range(50)))
    config = tiny_config(tokenizer="train:300")
    config.sft.data.source = str(texts)
    config.stages = ("sft",)
    made = prepare(config, tmp_path / "run")
    assert len(made.tokenizer) == made.model.config.vocab_size <= 300
    texts.unlink()
    assert prepare(config, tmp_path / "run").tokenizer_hash == made.tokenizer_hash
    for value in ("train:many", "train:8"):
        config.tokenizer = value
        texts.write_text(json.dumps({"text": "a"}))
        with pytest.raises(ConfigError, match=r"config\.tokenizer"):
            prepare(config, tmp_path / value)
