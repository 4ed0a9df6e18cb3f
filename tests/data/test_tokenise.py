"""What must hold of token ids, whatever the tokenizer, the text and the policy."""

import json
import logging

import numpy as np
import pytest
import tokenizers
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st

from dpojax.data.records import DataError, Record
from dpojax.data.sources import load_records
from dpojax.data.tokenise import tokenise
from dpojax.data.tokenize_config import TokenizeConfig
from tests import further

BOS, EOS = "<s>", "</s>"
TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}[{{ m.role }}]{{ m.content }}{{ eos_token }}\n"
    "{% endfor %}{% if add_generation_prompt %}[assistant]{% endif %}"
)
TEXT = ["the cat sat on the mat", "the dog ate the cat", "on the mat sat the dog", "that, this"]


def byte_level(bos: bool = False, eos: bool = False, **options):
    """A byte-level BPE of 300 tokens; with or without BOS before and EOS after every text."""
    core = tokenizers.Tokenizer(tokenizers.models.BPE())
    core.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=300,
        special_tokens=[BOS, EOS],
        initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    core.train_from_iterator(TEXT * 20, trainer)
    single = f"{BOS if bos else ''} $A {EOS if eos else ''}".strip()
    core.post_processor = tokenizers.processors.TemplateProcessing(
        single=single, special_tokens=[(BOS, 0), (EOS, 1)]
    )
    special = {"bos_token": BOS, "eos_token": EOS, **options}
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=core, clean_up_tokenization_spaces=False, **special
    )


PLAIN, WITH_BOS, WITH_BOTH = byte_level(), byte_level(bos=True), byte_level(bos=True, eos=True)
WIDE = TokenizeConfig(max_length=10_000)


def spaced():
    """Words and letters in SentencePiece's manner: a text gets a space of its own in front."""
    letters = "▁abcdefghijklmnopqrstuvwxyz\n"
    vocab = {token: i for i, token in enumerate(["<unk>", BOS, EOS, *letters])}
    core = tokenizers.Tokenizer(tokenizers.models.BPE(vocab=vocab, merges=[], unk_token="<unk>"))
    core.normalizer = tokenizers.normalizers.Sequence(
        [tokenizers.normalizers.Prepend("▁"), tokenizers.normalizers.Replace(" ", "▁")]
    )
    core.decoder = tokenizers.decoders.Sequence(
        [
            tokenizers.decoders.Replace("▁", " "),
            tokenizers.decoders.Fuse(),
            tokenizers.decoders.Strip(" ", 1, 0),
        ]
    )
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=core, bos_token=BOS, eos_token=EOS, unk_token="<unk>"
    )


def pair(prompt="the cat", chosen=" sat", rejected=" ate", id="f:1"):
    return Record(id, prompt, (chosen, rejected))


def one(record, tokenizer=PLAIN, policy=WIDE):
    """The only example and the report of one record."""
    examples, report = tokenise([record], tokenizer, policy)
    return examples[0], report


def ids(tokenizer, text):
    return tokenizer(text, add_special_tokens=False)["input_ids"]


def test_ids_are_int32_and_spell_the_texts():
    example, _ = one(pair())
    assert example.prompt.dtype == np.int32
    assert [response.dtype for response in example.responses] == [np.int32, np.int32]
    assert PLAIN.decode(example.prompt) == "the cat"
    assert [PLAIN.decode(response) for response in example.responses] == [" sat</s>", " ate</s>"]
    assert (example.id, example.cut, example.label) == ("f:1", (False, False), None)


@pytest.mark.parametrize(
    ("tokenizer", "prompt", "count"),
    [
        (PLAIN, "the cat", 0),
        (WITH_BOS, "the cat", 1),
        (WITH_BOTH, "the cat", 1),
        (WITH_BOS, "<s>the cat", 1),
        (WITH_BOS, "", 1),
    ],
)
def test_bos_stands_once_where_the_tokenizer_puts_one(tokenizer, prompt, count):
    example, report = one(pair(prompt), tokenizer)
    assert example.prompt.tolist().count(tokenizer.bos_token_id) == count
    assert tokenizer.eos_token_id not in example.prompt
    assert all(tokenizer.bos_token_id not in response for response in example.responses)
    assert report.starts == {count: 1}


@pytest.mark.parametrize("tokenizer", [PLAIN, WITH_BOS, WITH_BOTH])
@pytest.mark.parametrize("answer", [" sat", " sat</s>"])
def test_eos_stands_once_at_the_end_of_a_response(tokenizer, answer):
    example, report = one(pair(chosen=answer), tokenizer)
    for response in example.responses:
        assert response.tolist().count(tokenizer.eos_token_id) == 1
        assert response[-1] == tokenizer.eos_token_id
    assert report.ends == {"with EOS": 2}


def test_eos_is_left_out_when_asked_and_counted_when_inside():
    example, report = one(pair(chosen=" s</s>at"), policy=TokenizeConfig(append_eos=False))
    assert example.responses[1][-1] != PLAIN.eos_token_id
    assert report.number("noted", "eos_inside") == 1
    assert report.number("noted", "special_in_text") == 1
    assert report.ends == {"without EOS": 2}


def test_a_tokenizer_without_eos_is_an_error_that_says_what_to_set():
    with pytest.raises(DataError, match=r"set tokenizer\.eos_token, or append_eos=False"):
        one(pair(), byte_level(eos_token=None))
    assert (
        one(pair(), byte_level(eos_token=None), TokenizeConfig(append_eos=False))[0].prompt.size > 0
    )


def test_pad_equal_to_eos_takes_nothing_away():
    padded = byte_level(pad_token=EOS)
    example, _ = one(pair(), padded)
    expected, _ = one(pair(), PLAIN)
    assert padded.pad_token_id == padded.eos_token_id
    assert [r.tolist() for r in example.responses] == [r.tolist() for r in expected.responses]


def test_an_empty_prompt_starts_with_bos_or_eos_or_is_dropped():
    assert one(pair(prompt=""), PLAIN)[0].prompt.tolist() == [PLAIN.bos_token_id]
    no_bos = byte_level(bos_token=None)
    assert one(pair(prompt=""), no_bos)[0].prompt.tolist() == [no_bos.eos_token_id]
    neither = byte_level(bos_token=None, eos_token=None)
    policy = TokenizeConfig(append_eos=False)
    examples, report = tokenise([pair(prompt=""), pair()], neither, policy)
    assert len(examples) == 1
    assert report.number("dropped", "empty_prompt") == 1


def test_a_token_across_the_boundary_is_split_and_counted():
    assert ids(PLAIN, "the") != ids(PLAIN, "th") + ids(PLAIN, "e")  # "the" is one token
    example, report = one(pair("th", "e cat", " dog"))
    assert example.prompt.tolist() == ids(PLAIN, "th")
    assert PLAIN.decode(np.concatenate([example.prompt, example.responses[0]])) == "the cat</s>"
    assert report.number("noted", "boundary_merge") == 1


def test_no_space_is_invented_between_prompt_and_response():
    tokenizer = spaced()
    assert tokenizer.tokenize("cat") == ["▁", "c", "a", "t"]
    example, report = one(pair("dog\n", "cat", " cat"), tokenizer)
    tokens = [tokenizer.convert_ids_to_tokens(response) for response in example.responses]
    assert tokens == [["c", "a", "t", EOS], ["▁", "c", "a", "t", EOS]]
    assert report.number("noted", "boundary_merge") == 0


def test_no_space_is_invented_after_a_merged_boundary(shared):
    tokenizer = transformers.AutoTokenizer.from_pretrained(shared / "data/stories260k")
    example, report = one(pair("Once upon a ti", "me there", "ger"), tokenizer)
    assert report.number("noted", "boundary_merge") == 1
    whole = np.concatenate([example.prompt, example.responses[0]])
    assert tokenizer.decode(whole, skip_special_tokens=True) == "Once upon a time there"


TEXTS = st.text(
    st.characters(exclude_categories=["Cs"], exclude_characters="<"), min_size=1, max_size=30
)


@settings(max_examples=150, deadline=None)
@given(TEXTS, TEXTS, TEXTS, st.sampled_from([PLAIN, WITH_BOS, WITH_BOTH]))
def test_prompt_and_response_decode_to_their_text(prompt, chosen, rejected, tokenizer):
    policy = TokenizeConfig(max_length=10_000, empty="keep", identical="keep", append_eos=False)
    example, _ = one(pair(prompt, chosen, rejected), tokenizer, policy)
    bos = [tokenizer.bos_token_id] if tokenizer is not PLAIN else []
    assert example.prompt.tolist() == bos + ids(tokenizer, prompt)
    for text, response in zip((chosen, rejected), example.responses):
        both = [*example.prompt.tolist()[len(bos) :], *response.tolist()]
        assert tokenizer.decode(both, clean_up_tokenization_spaces=False) == prompt + text


@settings(max_examples=150, deadline=None)
@given(data=st.data())
def test_a_real_sentencepiece_tokenizer_gives_the_text_back_too(shared, data):
    tokenizer = transformers.AutoTokenizer.from_pretrained(shared / "data/stories260k")
    words = st.text(st.sampled_from("the cat\n,.O é🐈"), min_size=1, max_size=12)
    prompt, chosen, rejected = (data.draw(words) for _ in range(3))
    policy = TokenizeConfig(max_length=10_000, empty="keep", identical="keep", append_eos=False)
    example, _ = one(pair(prompt, chosen, rejected), tokenizer, policy)
    for text, response in zip((chosen, rejected), example.responses):
        whole = np.concatenate([example.prompt[1:], response])
        assert tokenizer.decode(whole) == prompt + text


@pytest.mark.parametrize("responses", [(" sat",), (" sat", " ate", " ran", " lay")])
def test_one_and_many_responses_keep_their_order(responses):
    example, report = one(Record("f:1", "the cat", responses, label=True))
    assert [PLAIN.decode(r[:-1]) for r in example.responses] == list(responses)
    assert example.label is True
    assert report.lengths["response"].total() == len(responses)
    assert "chosen" not in report.lengths


def test_scores_and_ranks_go_with_the_responses():
    record = Record("f:1", "the cat", (" sat", " ate"), scores=(2.0, 2.0), rank=(0, 0))
    example, _ = one(record)
    assert (example.scores, example.rank) == ((2.0, 2.0), (0, 0))
    assert (one(pair())[0].scores, one(pair())[0].rank) == (None, None)


# -- truncation. "a b ... " of one token a word makes lengths easy to state.

ALPHABET = "abcdefghijklmnopqrstuvwxyz"


def letters(count, first=0):
    return "".join(ALPHABET[(first + i) % 26] for i in range(count))


def lengths(example):
    return len(example.prompt), [len(response) for response in example.responses]


LONG = pair(letters(10), letters(4), letters(7, 3))  # with BOS and EOS: 11 + 5 and 11 + 8


def word_level():
    """One token per letter, BOS in front."""
    vocab = {token: i for i, token in enumerate([BOS, EOS, *ALPHABET])}
    core = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocab, unk_token=BOS))
    core.pre_tokenizer = tokenizers.pre_tokenizers.Split("", "isolated")
    core.post_processor = tokenizers.processors.TemplateProcessing(
        single=f"{BOS} $A", special_tokens=[(BOS, 0), (EOS, 1)]
    )
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=core, bos_token=BOS, eos_token=EOS, unk_token=None
    )


LETTER = word_level()


@pytest.mark.parametrize("truncation", ["drop", "cut_prompt_start", "cut_response_end", "error"])
def test_a_record_that_just_fits_is_left_alone(truncation):
    example, report = one(LONG, LETTER, TokenizeConfig(max_length=19, truncation=truncation))
    assert lengths(example) == (11, [5, 8])
    assert report.tallies["cut"] == {}


def test_drop_drops_a_record_that_is_one_token_too_long():
    short = pair("a", "b", "c", id="f:2")
    examples, report = tokenise([LONG, short], LETTER, TokenizeConfig(max_length=18))
    assert [example.id for example in examples] == ["f:2"]
    assert report.tallies["dropped"]["too_long"].examples == ["f:1"]
    policy = TokenizeConfig(max_length=30, max_prompt_length=10)
    _, report = tokenise([LONG, short], LETTER, policy)
    assert report.number("dropped", "prompt_too_long") == 1


def test_cut_prompt_start_keeps_bos_and_the_end_of_the_prompt():
    example, report = one(
        LONG, LETTER, TokenizeConfig(max_length=15, truncation="cut_prompt_start")
    )
    assert lengths(example) == (7, [5, 8])
    assert LETTER.convert_ids_to_tokens(example.prompt) == [BOS, *letters(10)[-6:]]
    assert example.cut == (False, False)
    assert report.number("cut", "prompt_start") == 1
    assert report.kept == 1


def test_cut_prompt_start_drops_a_record_whose_responses_leave_no_room():
    records = [LONG, pair("a", "b", "c")]
    for length, count in [(10, 2), (9, 1)]:
        policy = TokenizeConfig(max_length=length, truncation="cut_prompt_start")
        examples, report = tokenise(records, LETTER, policy)
        assert len(examples) == count
        assert report.number("dropped", "too_long") == 2 - count


def test_cut_response_end_marks_the_cut_responses_and_takes_their_eos():
    example, report = one(
        LONG, LETTER, TokenizeConfig(max_length=17, truncation="cut_response_end")
    )
    assert lengths(example) == (11, [5, 6])
    assert example.cut == (False, True)
    assert LETTER.convert_ids_to_tokens(example.responses[1]) == list(letters(6, 3))
    assert report.number("cut", "response_end") == 1
    assert report.ends == {"with EOS": 1, "without EOS": 1}


def test_cut_response_end_cuts_a_prompt_only_to_its_own_limit():
    policy = TokenizeConfig(max_length=9, max_prompt_length=4, truncation="cut_response_end")
    example, report = one(LONG, LETTER, policy)
    assert lengths(example) == (4, [5, 5])
    assert example.cut == (False, True)
    assert report.number("cut", "prompt_start") == report.number("cut", "response_end") == 1


def test_a_response_with_nothing_left_is_dropped():
    policy = TokenizeConfig(max_length=11, truncation="cut_response_end")
    examples, report = tokenise([LONG, pair("a", "b", "c")], LETTER, policy)
    assert len(examples) == report.number("dropped", "nothing_left") == 1


def test_responses_that_cutting_made_equal_follow_the_policy_for_equal_ones():
    record = pair("ab", "cdef", "cdgh")
    policy = TokenizeConfig(max_length=5, truncation="cut_response_end")
    with pytest.raises(DataError, match="identical_after_cut"):
        one(record, LETTER, policy)
    keep = TokenizeConfig(max_length=5, truncation="cut_response_end", identical="keep")
    example, report = one(record, LETTER, keep)
    assert lengths(example) == (3, [2, 2])
    assert report.number("noted", "identical_after_cut") == 1


def test_truncation_error_names_the_record_and_the_lengths():
    with pytest.raises(DataError, match=r"f:1: a prompt of 11 tokens .* of 8 exceed max_length=18"):
        one(LONG, LETTER, TokenizeConfig(max_length=18, truncation="error"))


@pytest.mark.parametrize(
    ("cause", "record"),
    [("identical", pair(chosen=" sat", rejected=" sat")), ("empty", pair(rejected=" \n"))],
)
def test_equal_and_empty_responses_follow_the_policy(cause, record):
    examples, report = tokenise([record, pair(id="f:2")], PLAIN, TokenizeConfig())
    assert [example.id for example in examples] == ["f:2"]
    assert report.tallies["dropped"][cause].examples == ["f:1"]
    _, report = one(record, policy=TokenizeConfig(**{cause: "keep"}))
    assert report.number("noted", cause) == report.kept == 1
    with pytest.raises(DataError, match=f"f:1: {cause}"):
        one(record, policy=TokenizeConfig(**{cause: "error"}))


def test_an_empty_response_that_is_kept_is_one_eos_or_is_dropped():
    record = pair(rejected="")
    example, _ = one(record, policy=TokenizeConfig(empty="keep"))
    assert example.responses[1].tolist() == [PLAIN.eos_token_id]
    policy = TokenizeConfig(empty="keep", append_eos=False)
    _, report = tokenise([record, pair()], PLAIN, policy)
    assert report.number("dropped", "nothing_left") == 1


def test_when_all_are_dropped_the_causes_are_shown():
    records = [pair(letters(9), id=f"f:{i}") for i in range(3)]
    with pytest.raises(DataError, match=r"all 3 records were dropped:(.|\n)*too_long.* 3 .*f:0"):
        tokenise(records, LETTER, TokenizeConfig(max_length=8))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"truncation": "cut"}, "truncation should be one of drop, cut_prompt_start"),
        ({"identical": "ignore"}, "identical should be one of drop, keep, error"),
        ({"prompts_differ": "keep"}, "prompts_differ should be one of drop, error"),
        ({"max_length": 1}, "max_length should be 2 or more"),
        ({"max_length": 8, "max_prompt_length": 8}, "between 1 and max_length - 1 = 7"),
        ({"max_prompt_length": 0}, "between 1"),
    ],
)
def test_a_policy_that_makes_no_sense_is_refused(options, message):
    with pytest.raises(ValueError, match=message):
        TokenizeConfig(**options)


def test_prompts_that_differ_are_an_error_when_the_policy_says_so(tmp_path):
    good = {"chosen": "\n\nHuman: a\n\nAssistant: x", "rejected": "\n\nHuman: a\n\nAssistant: y"}
    bad = {**good, "rejected": "\n\nHuman: b\n\nAssistant: y"}
    path = tmp_path / "a.jsonl"
    path.write_text("\n".join(map(json.dumps, [good, bad])), encoding="utf-8")
    records, report = load_records(path)
    with pytest.raises(DataError, match=r"a\.jsonl:2: .*different prompts"):
        tokenise(records, PLAIN, TokenizeConfig(prompts_differ="error"), report)
    examples, report = tokenise(records, PLAIN, TokenizeConfig(), report)
    assert (report.read, report.kept, report.dropped, len(examples)) == (2, 1, 1, 1)


def user(text):
    return {"role": "user", "content": text}


def assistant(text):
    return {"role": "assistant", "content": text}


CHAT = Record("f:1", (user("the cat"),), ((assistant("sat"),), (assistant("ate"),)))


@pytest.mark.slow
@pytest.mark.parametrize("bos", [False, True])
def test_a_chat_template_gives_one_bos_and_one_eos(bos):
    tokenizer = byte_level(bos=bos, chat_template=TEMPLATE)
    example, report = one(CHAT, tokenizer)
    assert tokenizer.decode(example.prompt) == "<s>[user]the cat</s>\n[assistant]"
    assert [tokenizer.decode(r) for r in example.responses] == ["sat</s>", "ate</s>"]
    assert report.starts == {1: 1}
    # The template's own marks are no special tokens "in the text", and its EOS is at the end.
    assert report.tallies["noted"] == {}


@pytest.mark.slow
def test_a_special_token_that_a_user_wrote_is_counted_in_a_chat_too():
    record = Record("f:1", (user("say </s>"),), CHAT.responses)
    _, report = one(record, byte_level(chat_template=TEMPLATE))
    assert report.number("noted", "special_in_text") == 1


def test_messages_without_a_chat_template_are_an_error_that_says_how_to_set_one():
    with pytest.raises(DataError, match=r"f:1: .*set tokenizer\.chat_template"):
        one(CHAT)


def test_a_template_that_refuses_names_the_record():
    template = "{{ raise_exception('roles must alternate') }}"
    tokenizer = byte_level(chat_template=template)
    with pytest.raises(DataError, match="f:1: the chat template refuses this: roles must"):
        one(CHAT, tokenizer, TokenizeConfig(malformed="error"))
    with pytest.raises(DataError, match=r"template_refuses: f:1: roles must alternate"):
        one(CHAT, tokenizer)


def test_a_template_that_changes_the_prompt_before_an_answer_drops_the_record():
    template = "{{ messages | length }}{% for m in messages %}{{ m.content }}{% endfor %}"
    with pytest.raises(DataError, match="template_changes_prompt"):
        one(CHAT, byte_level(chat_template=template))


def test_lengths_are_counted_before_truncation_with_bos_and_eos():
    records = [LONG, pair("a", "b", "c")]
    _, report = tokenise(
        records, LETTER, TokenizeConfig(max_length=12, truncation="cut_response_end")
    )
    assert report.lengths == {
        "prompt": {11: 1, 2: 1},
        "response": {5: 1, 8: 1, 2: 2},
        "chosen": {5: 1, 2: 1},
        "rejected": {8: 1, 2: 1},
        "longest": {19: 1, 4: 1},
    }


def test_no_warning_about_the_models_length_leaks(caplog):
    tokenizer = byte_level(model_max_length=4)
    transformers.logging.enable_propagation()
    with caplog.at_level(logging.WARNING):
        one(pair(prompt="the cat sat on the mat and on the dog"), tokenizer)
    transformers.logging.disable_propagation()
    assert caplog.records == []


@pytest.mark.parametrize("chunk", [1, 3])
def test_chunks_do_not_show(monkeypatch, chunk):
    records = [pair(letters(n), letters(3), letters(4), id=f"f:{n}") for n in range(1, 8)]
    expected, _ = tokenise(records, LETTER, WIDE)
    monkeypatch.setattr("dpojax.data.tokenise.CHUNK", chunk)
    chunked, _ = tokenise(records, LETTER, WIDE)
    assert [e.id for e in chunked] == [e.id for e in expected]
    for a, b in zip(chunked, expected):
        np.testing.assert_array_equal(np.concatenate(a.responses), np.concatenate(b.responses))


@pytest.fixture(scope="module")
def gpt2(shared):
    return transformers.AutoTokenizer.from_pretrained(shared / "data/gpt2-tokenizer")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "causes"),
    [
        *further(
            ("hh-rlhf/harmless-base/test.jsonl.gz", (5, 0, 4)),
            ("hh-rlhf/helpful-single-turn/train_gt.jsonl.gz", (10, 1, 2)),
            ("hh-rlhf/helpful-single-turn/train_w2s.jsonl.gz", (9, 0, 6)),
        ),
        ("hh-rlhf/helpful-single-turn/test.jsonl.gz", (6, 2, 1)),
        ("instruction-preference/instruction-data-with-preference.json", (0, 6, 0)),
    ],
)
def test_the_traps_of_real_data_are_counted(shared, gpt2, name, causes):
    records, report = load_records(shared / "data" / name)
    examples, report = tokenise(records, gpt2, WIDE, report)
    names = ("prompts_differ", "identical", "empty")
    assert tuple(report.number("dropped", cause) for cause in names) == causes
    assert report.kept == len(examples) == report.read - sum(causes)
    by_id = {record.id: record for record in records}
    for example in examples[::50]:
        record = by_id[example.id]
        for text, response in zip(record.responses, example.responses):
            whole = np.concatenate([example.prompt, response[:-1]])
            assert gpt2.decode(whole) == record.prompt + text


def test_the_stories_tokenizer_gives_one_bos_and_the_known_ids(shared, gpt2):
    tokenizer = transformers.AutoTokenizer.from_pretrained(shared / "data/stories260k")
    expected = json.loads((shared / "data/stories260k/expected.json").read_text())
    example, report = one(pair("Once upon a time", ", a girl", ", a dog"), tokenizer)
    assert example.prompt.tolist() == [1, 403, 407, 261, 378]
    assert [1, 403, 407, 261, 378] in expected.values()
    assert report.starts == {1: 1}
    assert one(pair("Hello world"), gpt2)[0].prompt.tolist() == [15496, 995]
    assert one(pair(""), gpt2)[0].prompt.tolist() == [50256]
