"""Pairs become labelled responses, and every example gets a response to another prompt."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from dpojax.data.examples import Example
from dpojax.data.records import DataError, Record
from dpojax.data.unpaired import split, with_mismatched


def all_mismatched(data, max_length):
    return list(with_mismatched(data, range(len(data)), max_length))


def test_a_pair_becomes_a_desirable_and_an_undesirable_response():
    pair = Record("f:7", "q", ("good", "bad"), scores=(2.0, 0.5))
    assert split(pair) == [
        Record("f:7:chosen", "q", ("good",), True, (2.0,)),
        Record("f:7:rejected", "q", ("bad",), False, (0.5,)),
    ]


def test_of_a_ranking_the_best_and_the_worst_get_a_label():
    ranking = Record("f:1", "q", ("a", "b", "c", "d"), rank=(0, 0, 2, 2))
    assert split(ranking) == [
        Record("f:1:chosen", "q", ("a",), True),
        Record("f:1:rejected", "q", ("d",), False),
    ]


@pytest.mark.parametrize("label", [True, False])
def test_a_labelled_response_stays_as_it_is(label):
    record = Record("f:1", "q", ("a",), label)
    assert split(record) == [record]


def test_tied_responses_and_a_response_without_label_give_none():
    assert split(Record("f:1", "q", ("a", "b", "c"), rank=(0, 0, 0))) == []
    assert split(Record("f:1", "q", ("a",))) == []


def example(prompt, response, id="f:1", **rest):
    ids = lambda values: np.array(values, np.int32)
    return Example(id, ids(prompt), (ids(response),), (False,), True, **rest)


ids = st.lists(st.integers(0, 2), min_size=1, max_size=5)
# Few prompts, so that neighbours often share one.
examples = st.builds(example, st.lists(st.integers(0, 1), min_size=1, max_size=2), ids)


@given(st.lists(examples, min_size=2, max_size=15), st.integers(2, 8))
def test_the_second_response_is_that_of_an_example_with_another_prompt(data, max_length):
    prompts = [e.prompt.tolist() for e in data]
    if all(prompt == prompts[0] for prompt in prompts):
        with pytest.raises(DataError, match=f"{len(data)} examples with the same prompt"):
            all_mismatched(data, max_length)
        return
    result = all_mismatched(data, max_length)
    assert len(result) == len(data)
    for i, (before, after) in enumerate(zip(data, result)):
        response, mismatched = after.responses
        assert response is before.responses[0]
        room = max(1, max_length - len(prompts[i]))
        others = [e.responses[0].tolist() for e, p in zip(data, prompts) if p != prompts[i]]
        possible = {(tuple(whole[:room]), len(whole) > room) for whole in others}
        assert (tuple(mismatched.tolist()), after.cut[1]) in possible
        assert after.cut[0] is False
        assert after.rank == (0, -1)
        assert (after.id, after.label) == (before.id, before.label)
        assert after.prompt is before.prompt


def test_a_mismatched_response_scores_zero_and_stays_cut_if_it_was():
    first = example([1], [5, 6], scores=(3.0,))
    second = example([2], [7])._replace(cut=(True,))
    one, other = all_mismatched([first, second], 100)
    assert (one.scores, other.scores) == ((3.0, 0.0), None)
    assert (one.cut, other.cut) == ((False, True), (True, False))


def test_split_pairs_meet_desirable_and_undesirable_responses_alike():
    """A fixed shuffle stands between: pair after pair, the next prompt's first half is always the
    chosen one."""
    data = [example([i], [2 * i + half]) for i in range(200) for half in (0, 1)]
    result = all_mismatched(data, 10)
    rejected = np.mean([e.responses[1][0] % 2 for e in result])
    assert 0.4 < rejected < 0.6
    assert result == all_mismatched(data, 10)


def test_a_long_run_of_one_prompt_has_the_one_other_response():
    count = 300
    data = [example([1], [1])] * count + [example([2], [9])]
    result = all_mismatched(data, 10)
    assert all(e.responses[1].tolist() == [9] for e in result[:count])
    assert result[count].responses[1].tolist() == [1]
