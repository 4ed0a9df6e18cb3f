"""The hidden Markov model is complete, and its likelihood is the sum over all hidden paths."""

import itertools
import math

import numpy as np
import pytest

from dpojax.data import grammar as rules
from dpojax.data import reviews


def tiny(sentiment: str) -> rules.Rules:
    """Two states and a choice: "yes" is likelier under +, "no" under -; "so" is said by both."""
    share = {"agree": 3.0, "differ": 1.0} if sentiment == "+" else {"agree": 1.0, "differ": 2.0}
    return {
        "begin": ("", "opinion"),
        "anew": ("", "differ"),
        "opinion": ("", share),
        "agree": ("yes:3 so", "opinion:2 end"),
        "differ": ("no:4 so", "agree end:3"),
    }


def sum_over_paths(model: rules.Grammar, words: list[str], sentiment: int, ends: bool) -> float:
    """P(words | sentiment) by the definition: every hidden path, one after another."""
    index = {word: i for i, word in enumerate(model.words)}
    columns = [index.get(word, len(model.words)) for word in words]
    transition = model.transition[sentiment].tolist()
    emission = model.emission.tolist()
    total = 0.0
    for path in itertools.product(range(1, len(model.states)), repeat=len(words)):
        p, before = 1.0, 0
        for state, column in zip(path, columns):
            p *= transition[before][state] * emission[state][column]
            before = state
        total += p * (transition[before][0] if ends else 1.0)
    return total


def test_rows_are_distributions_with_every_word_and_an_end_everywhere():
    model = rules.grammar()
    np.testing.assert_allclose(model.transition.sum(axis=-1), 1.0, rtol=1e-12)
    np.testing.assert_allclose(model.emission[1:].sum(axis=-1), 1.0, rtol=1e-12)
    assert (model.emission[1:] > 1e-7).all()
    assert (model.transition > 1e-7).all()
    assert not model.emission[0].any()


def test_the_unknown_word_is_equally_likely_in_every_state():
    assert len(np.unique(rules.grammar().emission[1:, -1])) == 1


def test_the_grammar_has_a_few_hundred_words_and_states():
    model = rules.grammar()
    assert 300 <= len(model.words) <= 500
    assert 60 <= len(model.states) <= 200
    assert len(set(model.states)) == len(model.states) == model.emission.shape[0]


def test_the_two_sentiments_are_mirror_images():
    """So neither the length of a review nor where it ends tells its sentiment."""
    model = rules.grammar()
    mirrored = [
        model.states.index(name[:-1] + rules.OTHER[name[-1]] if name[-1] in "+-" else name)
        for name in model.states
    ]
    negative, positive = model.transition
    np.testing.assert_allclose(negative, positive[np.ix_(mirrored, mirrored)], rtol=1e-12)


def test_choices_are_resolved_into_products_of_their_shares():
    model = rules.build(tiny("-"), tiny("+"), leak=0.0)
    assert model.states == ("boundary", "agree", "differ")
    np.testing.assert_allclose(model.transition[1, 0], [0, 3 / 4, 1 / 4])
    np.testing.assert_allclose(model.transition[1, 1], [1 / 3, 2 / 4, 2 / 12])
    np.testing.assert_allclose(model.transition[0, 1], [1 / 3, 2 / 9, 4 / 9])
    np.testing.assert_allclose(model.transition[0, 2], [3 / 4, 1 / 4, 0])
    np.testing.assert_allclose(model.emission[1], [0, 1 / 4, 3 / 4, 0])


def test_likelihood_of_a_small_grammar_is_the_sum_over_hidden_paths():
    model = rules.build(tiny("-"), tiny("+"), leak=0.05)
    words = ("yes", "no", "so", "else")
    strings = [list(s) for n in range(5) for s in itertools.product(words, repeat=n)]
    for ends in (False, True):
        log_p = reviews.log_likelihood(
            [" ".join([*string, reviews.EOS] if ends else string) for string in strings], model
        )
        expected = [
            [math.log(sum_over_paths(model, string, s, ends)) for s in (0, 1)] for string in strings
        ]
        np.testing.assert_allclose(log_p, expected, rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize("text", ["i hated", "good plot", "not bad", "zebra ."])
@pytest.mark.parametrize("ends", [False, True])
def test_likelihood_of_the_review_grammar_is_the_sum_over_hidden_paths(text, ends):
    expected = [
        math.log(sum_over_paths(rules.grammar(), text.split(), sentiment, ends))
        for sentiment in (0, 1)
    ]
    log_p = reviews.log_likelihood([f"{text} {reviews.EOS}" if ends else text])
    np.testing.assert_allclose(log_p[0], expected, rtol=1e-11)


def test_rules_whose_words_differ_by_sentiment_are_refused():
    with pytest.raises(ValueError, match="same states and words"):
        rules.build(tiny("-"), tiny("+") | {"agree": ("aye", "end")})


def test_a_next_state_without_a_rule_is_refused():
    broken = tiny("+") | {"agree": ("yes", "nowhere")}
    with pytest.raises(KeyError, match="nowhere"):
        rules.build(broken, broken)
