"""configs/imdb.py: what its variants say, and that every program of theirs can be built."""

import importlib.util
import json
import pathlib

import pytest

from dpojax import storage
from dpojax.config.errors import ConfigError
from dpojax.frontier.configs import RunConfigs
from dpojax.frontier.dry_run import dry_run
from dpojax.planning.outline import Outline
from dpojax.stages.registry import resolve
from dpojax.stages.setup import prepare_setup
from dpojax.stages.tokenizers import vocabulary_hash

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
    resolve(config, "folder")
    for run in runs:
        run_config = RunConfigs(config, storage.as_path("folder")).resolve(run).config
        longest = 1 + 8 + run_config.samples.max_new_tokens
        assert longest <= run_config.tokens.max_length


@pytest.mark.long
def test_the_papers_programs_are_built_from_shapes_alone(imdb, tmp_path):
    config = imdb.get_config("paper")
    config.model.path, judge = str(tmp_path / "gpt2"), tmp_path / "roberta"
    for folder, raw in (tmp_path / "gpt2", GPT2_LARGE), (judge, ROBERTA_LARGE):
        folder.mkdir()
        (folder / "config.json").write_text(json.dumps(raw))
    config.frontier.reward = f"classifier:{judge}"
    runs = [run for run in imdb.frontier(config) if run.method in ("dpo", "ppo")]
    config.plan.examples = 0  # each program by itself, without a plan of the data
    lines = [*dry_run(config, runs, Outline())]
    assert lines[1] == "  dpo-beta-0.05, dpo-beta-0.1, dpo-beta-1, dpo-beta-5"
    programs = {line.split(":")[0]: line for line in lines[lines.index("Programs:") + 1 : -1]}
    names = {"sft", "classifier", "sampler", "reward", "ppo", "preference, loss dpo"}
    assert set(programs) == names
    assert "774,030,080 parameters" in programs["sft"]  # what transformers counts
    assert "355,361,794 parameters" in programs["classifier"]
    config.model.path = str(tmp_path / "none")
    with pytest.raises(ConfigError, match=r"config\.model\.path"):
        list(dry_run(config, [], Outline()))


def test_a_tokenizer_is_made_once_from_the_texts_of_sft(tmp_path):
    texts = tmp_path / "texts.jsonl"
    texts.write_text("\n".join(json.dumps({"text": f"a film of {i} parts"}) for i in range(50)))
    config = tiny_config(tokenizer="train:300")
    config.sft.data.source = str(texts)
    config.stages = ("sft",)
    made = prepare_setup(resolve(config, tmp_path / "run"))
    assert len(made.tokenizer) == made.model.config.vocab_size <= 300
    texts.unlink()
    again = prepare_setup(resolve(config, tmp_path / "run"))
    assert vocabulary_hash(again.tokenizer) == vocabulary_hash(made.tokenizer)
    for value in ("train:many", "train:8"):
        config.tokenizer = value
        texts.write_text(json.dumps({"text": "a"}))
        with pytest.raises(ConfigError, match=r"config\.tokenizer"):
            prepare_setup(resolve(config, tmp_path / value))
