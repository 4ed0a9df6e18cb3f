"""A language model as judge: log-probs against torch's, chat templates, lengths, and refusals."""

import functools
import json
import logging
import math

import numpy as np
import pytest
import tokenizers
import transformers

from dpojax.data import reviews
from dpojax.evaluation.judging.judge import JudgeError
from dpojax.evaluation.judging.local_judge import ANSWERS, BEFORE_ANSWER, open_local
from dpojax.evaluation.judging.open_judge import folder_of, open_judge
from dpojax.evaluation.judging.templates import Template
from dpojax.evaluation.judging.verdicts import Choice, Question
from dpojax.sharding import make_mesh
from tests import further

POSITIONS = 160
SHORT = Template("short", "{prompt} | {first} | {second}")
CHAT = (
    "{{ bos_token }}{% for m in messages %}<u>{{ m.content }}<e>{% endfor %}"
    "{% if add_generation_prompt %}<a>{% endif %}"
)
MARKS = ["<s>", "</s>", "<u>", "<a>", "<e>"]
QUESTIONS = [
    Question("a film", "it was fine", "it was dull"),
    Question("", "good", "bad"),
    Question("the plot of the film", "x", "a longer response than the other one"),
]


def letters(template=None):
    """A tokenizer of single characters that puts <s> before a text."""
    vocabulary = {token: i for i, token in enumerate([*MARKS, *map(chr, (10, *range(32, 127)))])}
    core = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocabulary, unk_token="</s>"))
    core.pre_tokenizer = tokenizers.pre_tokenizers.Split("", "isolated")
    core.add_special_tokens([tokenizers.AddedToken(mark, normalized=False) for mark in MARKS])
    core.post_processor = tokenizers.processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", 0)]
    )
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=core, bos_token="<s>", eos_token="</s>", chat_template=template
    )


def folder_with(tmp_path, tokenizer, model_type="llama", **settings):
    """A random tiny decoder of torch's with a tokenizer."""
    torch = pytest.importorskip("torch", reason="the expected values come from torch")
    sizes = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
    sizes |= {"intermediate_size": 16, "max_position_embeddings": POSITIONS}
    if model_type == "gpt2":
        sizes = {"n_embd": 16, "n_layer": 2, "n_head": 2, "n_positions": POSITIONS}
    sizes |= {"vocab_size": len(tokenizer), "initializer_range": 0.4}
    ids = {"bos_token_id": 0, "eos_token_id": 1, "pad_token_id": None}
    config = transformers.AutoConfig.for_model(model_type, **sizes, **ids, **settings)
    torch.manual_seed(0)
    transformers.AutoModelForCausalLM.from_config(config).eval().save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    return tmp_path


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    return folder_with(tmp_path_factory.mktemp("plain"), letters())


@pytest.fixture(scope="module")
def judge(plain):
    return open_local(plain, SHORT, batch_size=2)


@functools.lru_cache(maxsize=1)
def their_model(folder):
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    return tokenizer, transformers.AutoModelForCausalLM.from_pretrained(folder).eval()


def their_logprobs(folder, text):
    """Log-probs of the two answers behind a text, by torch, one sequence for each."""
    import torch

    tokenizer, model = their_model(folder)
    starts = text.startswith("<s>")
    totals = []
    wholes = [tokenizer(text + a, add_special_tokens=not starts)["input_ids"] for a in ANSWERS]
    shared = next(i for i, (a, b) in enumerate(zip(*wholes)) if a != b)
    for ids in wholes:
        with torch.no_grad():
            logprobs = model(torch.tensor([ids])).logits[0].double().log_softmax(-1)
        totals.append(sum(float(logprobs[i - 1, ids[i]]) for i in range(shared, len(ids))))
    return totals


@pytest.mark.parametrize("model_type", ["llama", *further("gpt2")])
def test_log_probs_of_the_answers_are_those_of_torch(tmp_path, model_type):
    judge = open_local(folder_with(tmp_path, letters(), model_type), SHORT, batch_size=2)
    both = [question for q in QUESTIONS for question in (q, q.mirrored)]
    texts = [f"{SHORT.fill(q).rstrip()}\n\n{BEFORE_ANSWER}" for q in both]
    expected = np.array([their_logprobs(tmp_path, text) for text in texts])
    np.testing.assert_allclose(judge.answer_logprobs(both), expected, rtol=0, atol=1e-4)
    replies = dict(judge.replies(both))
    assert sorted(replies) == list(range(6))
    for index, (first, second) in enumerate(expected):
        share = math.exp(first) / (math.exp(first) + math.exp(second))
        assert replies[index].preference == pytest.approx(share, abs=1e-4)
        assert replies[index].choice is (Choice.FIRST if first > second else Choice.SECOND)
    assert not judge.is_symmetric


@pytest.mark.slow
def test_a_chat_template_writes_the_prompt_and_opens_the_answer(tmp_path):
    judge = open_local(folder_with(tmp_path, letters(CHAT)), SHORT, batch_size=2)
    texts = [f"<s><u>{SHORT.fill(q)}<e><a>{BEFORE_ANSWER}" for q in QUESTIONS]
    expected = [their_logprobs(tmp_path, text) for text in texts]
    np.testing.assert_allclose(judge.answer_logprobs(QUESTIONS), expected, rtol=0, atol=1e-4)


def test_answers_of_several_tokens_count_with_all_of_them(tmp_path):
    """A tokenizer of bytes of two letters: " A" is one token, and " B" two."""
    tokenizer = letters()
    core = json.loads(tokenizer.backend_tokenizer.to_str())
    core["pre_tokenizer"] = {
        "type": "Split",
        "pattern": {"Regex": " A|."},
        "behavior": "Isolated",
        "invert": False,
    }
    core["model"]["vocab"][" A"] = len(tokenizer)
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizers.Tokenizer.from_str(json.dumps(core)),
        bos_token="<s>",
        eos_token="</s>",
    )
    judge = open_local(folder_with(tmp_path, tokenizer), SHORT, batch_size=2)
    texts = [f"{SHORT.fill(q).rstrip()}\n\n{BEFORE_ANSWER}" for q in QUESTIONS]
    expected = [their_logprobs(tmp_path, text) for text in texts]
    assert [len(ids) for ids in judge._encoder.example(QUESTIONS[0]).responses] == [1, 2]
    np.testing.assert_allclose(judge.answer_logprobs(QUESTIONS), expected, rtol=0, atol=1e-4)


def test_replies_depend_on_neither_the_batch_nor_the_mesh(plain, judge):
    alone = np.concatenate([judge.answer_logprobs([q]) for q in QUESTIONS])
    meshed = open_local(plain, SHORT, mesh=make_mesh(), batch_size=3)
    np.testing.assert_allclose(meshed.answer_logprobs(QUESTIONS * 3), [*alone] * 3, atol=1e-5)


def test_a_prompt_that_is_too_long_loses_its_start_and_its_reply_says_so(judge, caplog):
    room = POSITIONS - len(f"<s> | a | b\n\n{BEFORE_ANSWER} A") + len("<s>") - 1
    end = "the end of the post"
    fits, longer = Question(end.rjust(room), "a", "b"), Question(end.rjust(room + 50), "a", "b")
    with caplog.at_level(logging.WARNING):
        replies = dict(judge.replies([fits, longer]))
    assert replies[0].preference == pytest.approx(replies[1].preference, abs=1e-6)
    assert "left out" in replies[1].text
    assert "left out" not in replies[0].text
    assert f"1 of 2 questions are longer than the model's {POSITIONS} positions" in caplog.text


def test_responses_that_are_too_long_cannot_be_judged(judge):
    replies = dict(judge.replies([Question("p", "a" * 200, "b"), Question("p", "a", "b")]))
    assert replies[0].choice is Choice.UNPARSED
    assert f"longer than the model's {POSITIONS} positions" in replies[0].text
    assert replies[1].choice is not Choice.UNPARSED


def test_equal_log_probs_are_a_tie_and_the_margin_is_in_nats(plain, judge):
    first, second = judge.answer_logprobs(QUESTIONS[:1])[0]
    for margin, is_tie in ((abs(first - second) + 1e-3, True), (abs(first - second) - 1e-3, False)):
        ((_, reply),) = open_local(plain, SHORT, tie=margin, batch_size=2).replies(QUESTIONS[:1])
        assert (reply.choice is Choice.TIE) is is_tie


@pytest.mark.slow
def test_fingerprints_differ_where_replies_may(tmp_path, plain):
    chat = folder_with(tmp_path / "chat", letters(CHAT))  # the same weights
    judges = [
        open_local(plain, SHORT),
        open_local(chat, SHORT),
        open_local(plain, SHORT, tie=0.1),
        open_judge(f"local:{plain}", template="concise"),
        open_judge(f"local:{plain}", template="summary"),
    ]
    assert len({judge.fingerprint for judge in judges}) == len(judges)
    assert judges[0].fingerprint == open_local(plain, SHORT).fingerprint
    assert judges[3].name == f"local:{plain}"
    assert folder_of(judges[3].name) == str(plain)


def test_a_template_that_needs_a_reference_refuses_a_question_without(plain):
    judge = open_local(plain, Template("mine", "{first} {second} {reference}"))
    with pytest.raises(JudgeError, match="no reference response"):
        list(judge.replies(QUESTIONS))


def test_what_is_no_language_model_is_refused(tmp_path):
    folder = folder_with(tmp_path, letters())
    with pytest.raises(JudgeError, match=r"template 'none': is not one of summary"):
        open_judge(f"local:{folder}", template="none")
    file = folder / "config.json"
    raw = json.loads(file.read_text()) | {"architectures": ["LlamaForSequenceClassification"]}
    file.write_text(json.dumps(raw))
    with pytest.raises(JudgeError, match=f"judge 'local:{folder}': .*score.weight"):
        open_judge(f"local:{folder}")


def test_a_chat_template_that_refuses_is_told(tmp_path):
    refusing = "{% if messages[0].content != 'a question' %}{{ raise_exception('no') }}{% endif %}"
    with pytest.raises(JudgeError, match="chat template refuses a question: no"):
        open_local(folder_with(tmp_path, letters(refusing)), SHORT)


@pytest.mark.slow
def test_stories_answers_both_orders(shared):
    """A model that knows stories alone: every reply is there, and equal in a second call."""
    judge = open_judge(f"local:{shared / 'data/stories260k'}", template="summary", batch_size=2)
    questions = [QUESTIONS[0], QUESTIONS[0].mirrored]
    replies = dict(judge.replies(questions))
    assert replies == dict(judge.replies(questions))
    assert all(0 < replies[i].preference < 1 for i in range(2))


def test_a_tokenizer_that_cannot_tell_the_answers_apart_is_refused(tmp_path):
    folder = folder_with(tmp_path, reviews.tokenizer())  # both are <unk> there
    with pytest.raises(JudgeError, match="the same ids for  A and  B"):
        open_judge(f"local:{folder}")
