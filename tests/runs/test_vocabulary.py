"""Tokenizers with more ids, fewer ids and holes: the ids that the data use decide."""

import json

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from dpojax.data.records import DataError
from dpojax.models import decoder, huggingface
from dpojax.models.config import LLAMA, DecoderConfig
from dpojax.runs.run import run
from dpojax.stages import registry
from dpojax.stages.registry import open_stage
from dpojax.stages.setup import initial_params, prepare_setup

from .conftest import lines

WORDS = ("<unk>", "</s>", "the", "film", "was", "good", "bad")
IMAGE = 7  # the id after all words, as Gemma 3 1B's <image_soft_token>


def make_tokenizer(folder, *, apart=1, image=False):
    """Words with the ids 0, apart, 2 * apart, ...; and maybe a token with the id after them."""
    vocabulary = {word: apart * place for place, word in enumerate(WORDS)}
    backend = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend, unk_token="<unk>", eos_token="</s>"
    )
    if image:
        tokenizer.add_special_tokens({"additional_special_tokens": ["<image>"]})
        assert tokenizer.convert_tokens_to_ids("<image>") == IMAGE
    tokenizer.save_pretrained(folder)
    return tokenizer


def make_model(folder, rows, tokenizer):
    shape = dict(width=16, layers=1, heads=2, mlp_width=16, max_positions=128)
    config = DecoderConfig(**LLAMA, **shape, vocab_size=rows)
    params = jax.jit(decoder.build(config).init)(jax.random.key(0))
    huggingface.save(folder, config, params, tokenizer=tokenizer)


def make_texts(path, *more):
    texts = [f"the film was {word} {'the ' * (i % 5)}film" for i in range(20) for word in WORDS[5:]]
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in (*texts, *more)))
    return str(path)


def sft_config(tiny, source, **changes):
    return tiny(**{"stages": ("sft",), "sft.data.source": source, "sft.steps": 2} | changes)


def prepared(config, workdir):
    return open_stage(prepare_setup(registry.resolve(config, workdir)), "sft").prepare()


def test_a_tokenizer_with_one_id_more_than_the_table_trains_where_no_text_uses_it(tiny, tmp_path):
    tokenizer = make_tokenizer(tmp_path / "words", image=True)
    make_model(tmp_path / "model", IMAGE, tokenizer)
    source = make_texts(tmp_path / "texts.jsonl")
    config = sft_config(tiny, source, **{"model.path": str(tmp_path / "model")})
    stage = prepared(config, tmp_path / "run")
    assert stage.batches.data.examples.largest_id() == IMAGE - 1
    assert stage.setup.model.config.vocab_size == IMAGE


def test_a_text_that_uses_an_id_beyond_the_table_is_named_with_its_token(tiny, tmp_path):
    tokenizer = make_tokenizer(tmp_path / "words", image=True)
    make_model(tmp_path / "model", IMAGE, tokenizer)
    source = make_texts(tmp_path / "texts.jsonl", "the film <image> was good")
    config = sft_config(tiny, source, **{"model.path": str(tmp_path / "model")})
    message = r"texts.jsonl:41: the token '<image>' has the id 7, but .* only 7 rows, 0 to 6"
    with pytest.raises(DataError, match=message):
        prepared(config, tmp_path / "run")


def test_an_end_token_beyond_the_table_is_named_by_the_first_record_that_ends_with_it(
    tiny, tmp_path
):
    tokenizer = make_tokenizer(tmp_path / "words", image=True)
    tokenizer.eos_token = "<image>"
    make_model(tmp_path / "model", IMAGE, tokenizer)
    source = make_texts(tmp_path / "texts.jsonl")
    config = sft_config(tiny, source, **{"model.path": str(tmp_path / "model")})
    with pytest.raises(DataError, match=r"texts.jsonl:\d+: the token '<image>' has the id 7"):
        prepared(config, tmp_path / "run")


@pytest.mark.slow
def test_a_prompt_of_ppo_beyond_the_table_is_named(tiny, tmp_path):
    tokenizer = make_tokenizer(tmp_path / "words", image=True)
    make_model(tmp_path / "model", IMAGE, tokenizer)
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text('{"prompt": "the film"}\n' * 9 + '{"prompt": "the <image>"}\n')
    config = tiny(
        **{"stages": ("ppo",), "model.path": str(tmp_path / "model"), "ppo.prompts": str(prompts)},
        **{"ppo.reward": "reviews", "samples.prompts": str(prompts), "ppo.limit": 10},
        **{"ppo.batch_size": 4, "ppo.max_new_tokens": 4},
    )
    stage = open_stage(prepare_setup(registry.resolve(config, tmp_path / "run")), "ppo")
    with pytest.raises(DataError, match=r"prompts.jsonl, prompt 10: the token '<image>' has the"):
        stage.prepare()


@pytest.mark.slow
def test_a_table_with_2400_rows_more_trains_and_is_exported_whole(tiny, tmp_path):
    tokenizer = make_tokenizer(tmp_path / "words")
    make_model(tmp_path / "model", len(WORDS) + 2400, tokenizer)
    source = make_texts(tmp_path / "texts.jsonl")
    config = sft_config(tiny, source, **{"model.path": str(tmp_path / "model")})
    stage = prepared(config, tmp_path / "run")
    setup = stage.setup
    huggingface.save(
        tmp_path / "out", setup.model.config, initial_params(setup), setup.imported_config
    )
    raw = json.loads((tmp_path / "out" / "config.json").read_text())
    assert raw["vocab_size"] == len(WORDS) + 2400
    tensors = load_file(tmp_path / "out" / "model.safetensors")
    assert tensors["model.embed_tokens.weight"].shape == (len(WORDS) + 2400, 16)


@pytest.mark.slow  # test_the_published_gaps_get_rows looks at the rows alone
def test_a_new_model_has_a_row_for_every_id_of_a_vocabulary_with_holes(tiny, tmp_path):
    make_tokenizer(tmp_path / "words", apart=7)
    source = make_texts(tmp_path / "texts.jsonl")
    config = sft_config(tiny, source, tokenizer=str(tmp_path / "words"))
    run(config, tmp_path / "run")
    losses = [line["loss"] for line in lines(tmp_path / "run", "sft") if line["split"] == "train"]
    # A model that knows nothing gives each of the 6 * 7 + 1 rows the same probability.
    np.testing.assert_allclose(losses[0], np.log(43), atol=0.1)
    assert np.isfinite(losses).all()


def test_ids_without_a_token_are_decoded_to_no_text(tmp_path):
    tokenizer = make_tokenizer(tmp_path / "words", apart=7)
    assert tokenizer.decode([14, 15, 21, 10**6], skip_special_tokens=True) == "the film"


def test_the_published_gaps_get_rows(tiny, shared, tmp_path):
    folder = shared / "cases" / "data" / "holes"
    source = make_texts(tmp_path / "texts.jsonl")
    stage = prepared(sft_config(tiny, source, tokenizer=str(folder)), tmp_path / "run")
    vocabulary = json.loads((folder / "tokenizer.json").read_text())["model"]["vocab"]
    assert len(vocabulary) < max(vocabulary.values())
    assert stage.setup.model.config.vocab_size == max(vocabulary.values()) + 1
