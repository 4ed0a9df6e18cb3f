"""Judges made of scores: against the scores themselves, and what is refused."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dpojax.data import reviews
from dpojax.data.pairing import NEUTRAL_WORDS
from dpojax.evaluation.judging import open_judge as judges
from dpojax.evaluation.judging.judge import JudgeError
from dpojax.evaluation.judging.open_judge import folder_of, open_judge
from dpojax.evaluation.judging.score_judge import Text, length_reward, reward_judge
from dpojax.evaluation.judging.verdicts import Choice, Question
from dpojax.evaluation.rewards import Reward, open_reward
from dpojax.models import decoder, huggingface
from dpojax.models.config import LLAMA, DecoderConfig


def answers(judge, questions):
    replies = dict(judge.replies(questions))
    assert sorted(replies) == list(range(len(questions)))
    return [replies[i] for i in range(len(questions))]


def numbers(**options):
    """A judge of responses that are numbers, and the texts that it was asked to score."""
    asked = []

    def value(prompts, responses):
        asked.extend(zip(prompts, responses))
        return [float(response) for response in responses]

    return reward_judge(Reward("value", value, "value"), name="value", **options), asked


def test_the_higher_score_wins_and_the_margin_makes_ties():
    judge, _ = numbers(tie=0.5)
    responses = [("2", "1"), ("1", "2"), ("1.5", "1"), ("1", "1.51"), ("1", "1")]
    choices = [reply.choice for reply in answers(judge, [Question("", *r) for r in responses])]
    assert choices == [Choice.FIRST, Choice.SECOND, Choice.TIE, Choice.SECOND, Choice.TIE]


def test_without_a_margin_only_equal_scores_tie():
    judge, _ = numbers(tie=0.0)
    pairs = [("0.3", "0.30000000000000004"), ("0.3", "0.3")]
    choices = [reply.choice for reply in answers(judge, [Question("", *pair) for pair in pairs])]
    assert choices == [Choice.SECOND, Choice.TIE]


def test_the_preference_is_that_of_bradley_and_terry():
    judge, _ = numbers(bradley_terry=True)
    questions = [Question("", *pair) for pair in (("3", "1"), ("1", "1"), ("0", "900"))]
    preferences = [reply.preference for reply in answers(judge, questions)]
    assert preferences[0] == pytest.approx(math.exp(3) / (math.exp(3) + math.exp(1)), rel=1e-12)
    assert preferences[1:] == [0.5, 0.0]
    plain, _ = numbers()
    assert math.isnan(answers(plain, questions)[0].preference)


def test_the_other_order_has_the_mirrored_reply():
    judge, _ = numbers(bradley_terry=True)
    question = Question("p", "0.25", "-3")
    (forward,), (backward,) = answers(judge, [question]), answers(judge, [question.mirrored])
    assert forward.choice is backward.mirrored.choice is Choice.FIRST
    assert forward.preference == pytest.approx(backward.mirrored.preference, rel=1e-12)
    assert judge.is_symmetric


def test_each_distinct_text_is_scored_once():
    judge, asked = numbers()
    rng = np.random.default_rng(0)
    values = rng.integers(0, 9, (1500, 2)).astype(str).tolist()  # more questions than a chunk has
    questions = [Question(f"p{i % 7}", *pair) for i, pair in enumerate(values)]
    replies = answers(judge, questions) + answers(judge, questions[:10])
    assert len(asked) == len(set(asked)) == 7 * 9
    expected = [np.sign(float(first) - float(second)) for first, second in values]
    signs = {Choice.FIRST: 1, Choice.SECOND: -1, Choice.TIE: 0}
    assert [signs[reply.choice] for reply in replies[:1500]] == expected


def test_replies_come_while_later_texts_are_not_scored_yet():
    judge, asked = numbers()
    questions = [Question("p", str(i), str(i + 1)) for i in range(2000)]
    assert next(judge.replies(questions))[0] == 0
    assert len(asked) < 2000


def test_a_score_that_cannot_be_used_ends_the_replies_and_names_the_judge():
    judge = reward_judge(Reward("odd", lambda p, r: [math.nan] * len(r)), name="reward_model:odd")
    with pytest.raises(JudgeError, match=r"judge reward_model:odd: reward odd: 2 of 2 .*not fin"):
        list(judge.replies([Question("p", "a", "b")]))


@pytest.mark.parametrize("tie", [-1.0, math.nan, math.inf])
def test_a_margin_that_is_no_margin_is_refused(tie):
    with pytest.raises(JudgeError, match="tie is"):
        open_judge("exact", tie=tie)


def test_the_exact_judge_says_what_the_grammar_says():
    records = reviews.preferences("eval", 64, 0)
    judge = open_judge("exact")
    replies = answers(judge, [Question(r["prompt"], r["chosen"], r["rejected"]) for r in records])
    assert {reply.choice for reply in replies} == {Choice.FIRST}
    odds = [[log_odds(r[f"{side}_reward"]) for side in ("chosen", "rejected")] for r in records]
    expected = [1 / (1 + math.exp(-(chosen - rejected))) for chosen, rejected in odds]
    np.testing.assert_allclose([reply.preference for reply in replies], expected, rtol=1e-6)


def log_odds(probability):
    return math.log(probability) - math.log1p(-probability)


def test_the_exact_judge_takes_neutral_words_for_a_tie():
    first, second = " was fine", " was fine ,"
    scores = reviews.score(["the film"] * 2, [first, second])
    judge = open_judge("exact", tie=float(abs(scores[0] - scores[1])) + 1e-12)
    assert answers(judge, [Question("the film", first, second)])[0].choice is Choice.TIE
    assert f"tie={NEUTRAL_WORDS!r}" in open_judge("exact").fingerprint


def test_length_counts_characters_within_the_white_space_around():
    texts = [Text("p", " three "), Text("p", "two")]
    assert reward_judge(length_reward(), name="length").scores(texts).tolist() == [5, 3]
    question = [Question("p", " three ", "two")]
    assert answers(open_judge("length"), question)[0].choice is Choice.FIRST
    assert answers(open_judge("length:shorter"), question)[0].choice is Choice.SECOND


def test_fingerprints_differ_where_verdicts_may():
    specs = [("exact", {}), ("exact", {"tie": 0.0}), ("length", {}), ("length:shorter", {})]
    fingerprints = [open_judge(spec, **options).fingerprint for spec, options in specs]
    assert len(set(fingerprints)) == len(specs)


@pytest.mark.parametrize("spec", ["", "exactly", "reward_model", "reward_model:", "openai"])
def test_an_unknown_judge_is_answered_with_the_known_ones(spec):
    with pytest.raises(JudgeError) as error:
        open_judge(spec)
    assert f"judge {spec!r}: is not one of" in str(error.value)
    for kind in judges.KINDS.values():
        assert kind.usage in str(error.value)


@pytest.mark.parametrize("spec", ["exact:log_odds", "length:longest"])
def test_an_argument_that_a_kind_does_not_have_is_refused(spec):
    with pytest.raises(JudgeError, match=f"judge '{spec}'"):
        open_judge(spec)


@pytest.mark.parametrize("kind", ["reward_model", "classifier"])
def test_a_folder_that_cannot_be_read_is_named_with_the_judge(kind, tmp_path):
    spec = f"{kind}:{tmp_path / 'none'}"
    with pytest.raises(JudgeError, match=f"judge '{spec}': .*no such folder"):
        open_judge(spec)
    (tmp_path / "model").mkdir()
    (tmp_path / "model/config.json").write_text('{"model_type": "abacus"}')
    with pytest.raises(JudgeError, match="model_type: 'abacus' is not supported"):
        open_judge(f"{kind}:{tmp_path / 'model'}")


def test_an_option_of_endpoints_is_refused_elsewhere():
    with pytest.raises(JudgeError, match=r"judge 'exact': threads: only openai:MODEL@URL"):
        open_judge("exact", threads=4)


def test_the_folder_of_a_judge_is_known_without_opening_it():
    specs = ["exact", "reward_model:a/b", "classifier:a/b:GOOD", "classifier:a/b"]
    assert [folder_of(spec) for spec in specs] == ["", "a/b", "a/b", "a/b"]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kind", "labels"), [("reward_model", ()), ("classifier", ("BAD", "GOOD"))]
)
def test_a_models_folder_judges_by_its_scores(tmp_path, kind, labels):
    sizes = {"width": 16, "layers": 1, "heads": 2, "mlp_width": 16, "max_positions": 48}
    vocabulary = len(reviews.tokenizer())
    config = DecoderConfig(**LLAMA, **sizes, vocab_size=vocabulary, scalar_head=True, labels=labels)
    shapes = jax.eval_shape(decoder.build(config).init, jax.random.key(0))
    rng = np.random.default_rng(0)
    params = jax.tree.map(lambda x: jnp.float32(0.3 * rng.normal(size=x.shape)), shapes)
    huggingface.save(tmp_path / "model", config, params, tokenizer=reviews.tokenizer())
    spec = f"{kind}:{tmp_path / 'model'}" + (":GOOD" if labels else "")
    question = Question("i", " hated it .", " liked it .")
    questions = [question, question.mirrored]
    first, second = open_reward(spec)(["i"] * 2, [" hated it .", " liked it ."])
    judge = open_judge(spec, batch_size=4)
    replies = answers(judge, questions)
    expected = [Choice.FIRST, Choice.SECOND] if first > second else [Choice.SECOND, Choice.FIRST]
    assert [reply.choice for reply in replies] == expected
    assert judge.name == spec
    if kind == "classifier":
        assert math.isnan(replies[0].preference)
    else:
        share = math.exp(first) / (math.exp(first) + math.exp(second))
        assert replies[0].preference == pytest.approx(share, abs=1e-6)
