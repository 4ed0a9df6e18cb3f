"""A prompt is encoded once; the ids are those of the whole text all the same."""

import pytest
import tokenizers
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st

from dpojax.data import encoding
from dpojax.data.encoding import GPT2, KNOWN, TextEncoder

MARKS = ["<|a|>", "<|b|>"]
TEXT = ["the cat sat on the mat", "the dog ate the cat 1234", "It's on\n\nthe mat. Sat?\n", "a  b"]
# Pieces that sit at places where a tokenizer might cut a text, or might not.
WORDS = [
    "the",
    " the",
    "cat",
    "A",
    "a",
    "Assistant:",
    "'s",
    "'",
    ".",
    "12",
    "345",
    "日本",
    "🐈",
    "é",
]
SPACES = [" ", "  ", "\n", "\n\n", "\t", "?\n", "\u00a0", "\u3000", "e\u0301"]
PARTS = st.sampled_from([*WORDS, *SPACES, *MARKS, "<|", "|>"])
TEXTS = st.lists(PARTS, max_size=14).map("".join)


def byte_level(regex=None, normalizer=None, added=MARKS, **options):
    core = tokenizers.Tokenizer(tokenizers.models.BPE())
    level = tokenizers.pre_tokenizers.ByteLevel
    core.pre_tokenizer = level(add_prefix_space=False)
    if regex:
        core.pre_tokenizer = tokenizers.pre_tokenizers.Sequence(
            [
                tokenizers.pre_tokenizers.Split(tokenizers.Regex(regex), "isolated"),
                level(add_prefix_space=False, use_regex=False),
            ]
        )
    core.normalizer = normalizer
    core.train_from_iterator(
        TEXT * 50,
        tokenizers.trainers.BpeTrainer(
            vocab_size=420, initial_alphabet=level.alphabet(), show_progress=False
        ),
    )
    core.add_special_tokens([tokenizers.AddedToken(mark, normalized=False) for mark in added])
    return transformers.PreTrainedTokenizerFast(tokenizer_object=core, **options)


def spaced():
    """In SentencePiece's manner: no cuts at all, and a space in front of every text."""
    core = tokenizers.Tokenizer(tokenizers.models.BPE(unk_token="<unk>"))
    core.normalizer = tokenizers.normalizers.Sequence(
        [tokenizers.normalizers.Prepend("▁"), tokenizers.normalizers.Replace(" ", "▁")]
    )
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=200, special_tokens=["<unk>"], show_progress=False
    )
    core.train_from_iterator(TEXT * 50, trainer)
    core.add_special_tokens([tokenizers.AddedToken(mark, normalized=False) for mark in MARKS])
    return transformers.PreTrainedTokenizerFast(tokenizer_object=core, unk_token="<unk>")


TOKENIZERS = {
    "gpt2": byte_level(),
    **{f"known {i}": byte_level(regex) for i, regex in enumerate(sorted(KNOWN))},
    "nfc": byte_level(GPT2, tokenizers.normalizers.NFC()),
    "lower": byte_level(None, tokenizers.normalizers.Lowercase()),
    "spaces are tokens": byte_level(added=[*MARKS, "  ", "    ", "\n\n", "a cat"]),
    "unknown": byte_level(r"\w+\s*|[^\w]+"),
    "spaced": spaced(),
}
ENCODERS = {name: TextEncoder(tokenizer) for name, tokenizer in TOKENIZERS.items()}


def ids(name, text):
    return TOKENIZERS[name](text, add_special_tokens=False)["input_ids"]


@pytest.mark.parametrize("name", TOKENIZERS)
@settings(max_examples=120, deadline=None)
@given(prompt=TEXTS, texts=st.lists(TEXTS, min_size=1, max_size=3))
def test_ids_are_those_of_the_whole_text(name, prompt, texts):
    encoder = ENCODERS[name]
    ((prompt_ids, added),) = encoder.continued([(prompt, texts)])
    assert prompt_ids == ids(name, prompt)
    for text, rest in zip(texts, added):
        whole = ids(name, prompt + text)
        fits = whole[: len(prompt_ids)] == prompt_ids
        assert rest == (whole[len(prompt_ids) :] if fits else None)


@pytest.mark.parametrize(
    ("name", "prompt", "tail"),
    [
        ("gpt2", "Human: the cat sat?\n\nAssistant:", " sat?\n\nAssistant:"),
        ("gpt2", "<|a|>user\nthe cat sat<|b|>\n<|a|>assistant\n", "<|a|>assistant\n"),
        ("known 0", "the mat. Sat\n", " Sat\n"),
        ("spaced", "the cat<|b|>x", "<|b|>x"),
        ("spaced", "the cat sat", "the cat sat"),  # nothing tells where it is cut
        ("unknown", "the cat sat", "the cat sat"),
        ("spaces are tokens", "the cat sat<|b|>", "<|b|>"),
        ("spaces are tokens", "the cat sat", "the cat sat"),  # a token may span the words
    ],
)
def test_only_a_prompts_end_is_encoded_with_each_response(name, prompt, tail):
    encoder = ENCODERS[name]
    assert prompt[encoder.cut(prompt) :] == tail


@given(texts=st.lists(TEXTS, max_size=6))
def test_words_that_are_forgotten_or_long_keep_their_ids(texts):
    encoder = TextEncoder(TOKENIZERS["gpt2"])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(encoding, "WORDS", 5)
        patch.setattr(encoding, "LONGEST", 3)
        patch.setattr(encoding, "BATCH", 2)
        for text in texts:
            assert encoder.encode([text]) == [ids("gpt2", text)]


def test_a_word_is_encoded_once(monkeypatch):
    encoder, asked = TextEncoder(TOKENIZERS["gpt2"]), []
    call = encoder._call_backend

    def recording(rows, **options):
        asked.extend(word for row in rows for word in row)
        return call(rows, **options)

    monkeypatch.setattr(encoder, "_call_backend", recording)
    encoder.encode(["the cat sat. The cat", "the cat ate"])
    encoder.encode(["A cat sat."])
    assert sorted(asked) == [" The", " ate", " cat", " sat.", "A", "the"]


def test_tokens_that_swallow_white_space_forbid_every_cut():
    tokenizer = byte_level()
    tokenizer.backend_tokenizer.add_tokens([tokenizers.AddedToken("<x>", lstrip=True)])
    assert TextEncoder(tokenizer).cut("the cat <|a|> sat") == 0
    whole = byte_level(split_special_tokens=True)
    assert TextEncoder(whole).cut("the cat <|a|> sat") == 0


def test_a_pattern_of_a_real_tokenizer_is_known(shared):
    file = shared / "data/gpt2-tokenizer/tokenizer.json"
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_file=str(file))
    assert TextEncoder(tokenizer).cut("the cat sat") == len("the cat")
