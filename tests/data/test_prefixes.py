"""Prompts from the beginnings of texts, and a tokenizer made from texts."""

import json

import pytest
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from dpojax.data.prefixes import HELD_OUT, prefixes
from dpojax.data.prompts import read_prompts
from dpojax.data.records import DataError
from dpojax.data.vocabulary import SMALLEST, train_tokenizer

SENTENCE = "the film was slow and long but its end made up for it , i think , more or less"


def texts(count=400):
    """Texts that each begin with a word of their own; one is there twice, one is too short."""
    numbered = [f"n{i} {SENTENCE}" for i in range(count)]
    return [*numbered, numbered[0], "short one"]


@pytest.fixture(scope="module")
def pieces():
    """A tokenizer that cuts words into pieces."""
    return train_tokenizer(texts(), SMALLEST + 60)


@pytest.fixture(scope="module")
def tokenizer():
    """A token for each word."""
    words = sorted({word for text in texts() for word in text.split()})
    backend = Tokenizer(models.WordLevel({word: i for i, word in enumerate(["?", *words])}, "?"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="?")


def first_words(prompts):
    return [prefix.split()[0] for prefix in prompts]


def test_a_made_tokenizer_loses_nothing_begins_with_its_bos_and_is_the_same_again(pieces):
    text = "unseen \N{SNOWMAN} \n\t text <br />"
    ids = pieces(text)["input_ids"]
    assert ids[0] == pieces.bos_token_id
    assert pieces.decode(ids[1:]) == text
    assert len(pieces) == SMALLEST + 60
    assert train_tokenizer(texts(), SMALLEST + 60).get_vocab() == pieces.get_vocab()
    with pytest.raises(ValueError, match="has 259 ids or more, got 258"):
        train_tokenizer(texts(), SMALLEST - 1)


def test_prefixes_are_two_to_eight_tokens_of_each_text_and_the_seed_draws_them(tokenizer):
    prompts = prefixes(texts(), tokenizer, held_out=False)
    assert {len(prefix.split()) for prefix in prompts} == set(range(2, 9))
    assert all(
        f"{prefix} " in f"{word} {SENTENCE} " for prefix, word in zip(prompts, first_words(prompts))
    )
    assert len(prompts) == len(
        set(first_words(prompts))
    )  # the text that is there twice counts once
    assert "short one" not in prompts
    assert prompts == prefixes(texts()[::-1], tokenizer, held_out=False)
    assert prompts[:7] == prefixes(texts(), tokenizer, held_out=False, limit=7)
    assert prompts != prefixes(texts(), tokenizer, held_out=False, seed=1)


def test_a_prefix_alone_has_the_tokens_that_its_text_begins_with(pieces):
    ids = lambda text: pieces(text, add_special_tokens=False)["input_ids"]
    prompts = prefixes(texts(), pieces, held_out=False)
    whole = [tuple(ids(text)) for text in texts()]
    for prefix in prompts:
        tokens = tuple(ids(prefix))
        assert 2 <= len(tokens) <= 8
        assert any(other[: len(tokens)] == tokens for other in whole)


def test_held_out_prefixes_come_from_other_texts_whatever_the_seeds(tokenizer):
    train = first_words(prefixes(texts(), tokenizer, held_out=False, seed=0))
    test = first_words(prefixes(texts(), tokenizer, held_out=True, seed=1))
    assert not set(train) & set(test)
    share = len(test) / (len(train) + len(test))
    assert share == pytest.approx(HELD_OUT, abs=0.06)  # four standard errors of 400 texts


def test_a_spec_names_a_source_and_its_split(tokenizer, tmp_path):
    rows = [{"text": text} for text in texts()]
    (tmp_path / "a.jsonl").write_text("\n".join(map(json.dumps, rows)))
    (tmp_path / "b.json").write_text(json.dumps({"train": rows, "test": [{"label": 1}]}))
    how = {"limit": 5, "seed": 0, "tokenizer": tokenizer}
    expected = prefixes(texts(), tokenizer, held_out=True, limit=5)
    assert read_prompts(f"prefixes:{tmp_path}/a.jsonl", split="eval", **how) == expected
    assert read_prompts(f"prefixes:{tmp_path}/b.json@train", split="eval", **how) == expected
    with pytest.raises(DataError, match=r"b\.json:1: field 'text' should be text"):
        read_prompts(f"prefixes:{tmp_path}/b.json@test", split="eval", **how)
