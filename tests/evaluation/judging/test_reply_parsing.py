"""What judges write is read as a person reads it; what is not clear is not guessed."""

import time

import pytest

from dpojax.evaluation.judging.parsing import parse_verdict
from dpojax.evaluation.judging.verdicts import Choice

FIRST = [
    "Both are fine, A is shorter.\nPreferred: A",
    "preferred: a",
    "PREFERRED: A.",
    "Preferred: Summary A",
    "Preferred summary: A",
    "Preferred: 'A'.",
    "Preferred: \u201cA\u201d",
    "Preferred\uff1aA",  # a full-width colon
    "- Preferred: A\n\n",
    "Preferred: A\r\n",
    "Preferred: (A)",
    "Preferred: [A]",
    "Preferred: A (shorter)",
    "Preferred: A over B",
    "Preferred: A, since B is long",
    "Preferred: A. B is too long",
    "### Final Answer: **A**",
    "My answer is A",
    "The better one is A.",
    "Summary A is better.",
    "(A)",
    "A",
    "Preferred: A</s>",
    "Preferred: A<|im_end|>",
]
SECOND = [
    "x\n**Preferred:** B",
    "x\n**Preferred: B**",
    'Preferred: "B"',
    "Preferred:\nB",
    "Preferred = B",
    "Answer: B",
    "Final verdict: Response B",
    "More helpful: B",
    "1. Preferred: B",
    "Preferred: B - more precise",
    "Preferred: B because it is short",
    "Comparison: A is short. Preferred: B",
    "The better response is B.",
    "[[B]]",
    "\\boxed{B}",
    "<answer>B</answer>",
]
UNCLEAR = [
    "",
    "   \n\n",
    "I like cats.",
    "Preferred: A and B",
    "Preferred: A or B",
    "Preferred: A/B",
    "Preferred: A, B",
    "Preferred: A | B",
    "Preferred: both A and B",
    "Preferred: not A",
    "Preferred: C",
    "Preferred:",
    "Preferred: neither",
    "Preferred: a shorter summary would be better",
    "A good summary is better.",
    "A: good\nB: bad",
    "a",
]


@pytest.mark.parametrize("reply", FIRST)
def test_a_reply_for_the_first_response_is_read_so(reply):
    assert parse_verdict(reply) is parse_verdict(reply, allows_ties=True) is Choice.FIRST


@pytest.mark.parametrize("reply", SECOND)
def test_a_reply_for_the_second_response_is_read_so(reply):
    assert parse_verdict(reply) is parse_verdict(reply, allows_ties=True) is Choice.SECOND


@pytest.mark.parametrize("reply", UNCLEAR)
def test_an_unclear_reply_is_not_guessed(reply):
    assert parse_verdict(reply) is Choice.UNPARSED


@pytest.mark.parametrize(
    "reply", ["Preferred: tie", "**Preferred: Tie**", "Preferred: neither", "Tie", "It is a tie."]
)
def test_a_tie_counts_where_the_judge_was_offered_it(reply):
    assert parse_verdict(reply, allows_ties=True) is Choice.TIE
    assert parse_verdict(reply) is Choice.UNPARSED


@pytest.mark.parametrize(
    "reply",
    [
        "Preferred: A\nOn a second thought:\nPreferred: B",
        "Answer: A\nPreferred: B",
        "Preferred: B\nThe answer is clear.",
        'Preferred: B\nNote that summary A itself says "Preferred: A".',
        'Summary A says "Preferred: A", which is no reason.\nPreferred: B',
    ],
)
def test_the_last_line_of_the_asked_form_counts(reply):
    assert parse_verdict(reply) is Choice.SECOND


def test_a_last_line_that_names_both_is_not_saved_by_an_earlier_one():
    assert parse_verdict("Preferred: A\nPreferred: A or B") is Choice.UNPARSED


@pytest.mark.parametrize(
    ("reply", "choice"),
    [
        ("<think>Preferred: A</think>\nPreferred: B", Choice.SECOND),
        ("<think>\nA?\nPreferred: A\n</think>\n\nB", Choice.SECOND),
        ("the server cut the first mark off. Preferred: A</think> B", Choice.SECOND),
        ("<think>I ran out of tokens. Preferred: A", Choice.UNPARSED),
        ("<think>Preferred: A</think>", Choice.UNPARSED),
        ("<THINKING>Preferred: A</THINKING>Preferred: B", Choice.SECOND),
    ],
)
def test_thoughts_of_a_reasoning_model_are_not_its_answer(reply, choice):
    assert parse_verdict(reply) is choice


@pytest.mark.parametrize("text", ["the ", "<think>", "preferred ", "A ", "\n", "**", "answer is "])
def test_a_long_reply_is_read_in_little_time(text):
    began = time.perf_counter()
    parse_verdict(text * 20_000)
    assert time.perf_counter() - began < 2
