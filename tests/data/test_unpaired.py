"""Pairs become labelled responses, and every example gets a response to another prompt."""

import time

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from dpojax.data.records import DataError, Record
from dpojax.data.tokenise import Example
from dpojax.data.unpaired import split, with_mismatched


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
def test_the_second_response_is_that_of_the_next_example_with_another_prompt(data, max_length):
    prompts = [e.prompt.tolist() for e in data]
    if all(prompt == prompts[0] for prompt in prompts):
        with pytest.raises(DataError, match=f"{len(data)} examples with the same prompt"):
            with_mismatched(data, max_length)
        return
    found = with_mismatched(data, max_length)
    assert len(found) == len(data)
    for i, (before, after) in enumerate(zip(data, found)):
        partner = (i + 1) % len(data)
        while prompts[partner] == prompts[i]:
            partner = (partner + 1) % len(data)
        own, mismatched = after.responses
        assert own is before.responses[0]
        whole = data[partner].responses[0].tolist()
        room = max(1, max_length - len(prompts[i]))
        assert mismatched.tolist() == whole[:room]
        assert after.cut == (False, len(whole) > room)
        assert after.rank == (0, 1)
        assert (after.id, after.label) == (before.id, before.label)
        assert after.prompt is before.prompt


def test_a_mismatched_response_scores_zero_and_stays_cut_if_it_was():
    first = example([1], [5, 6], scores=(3.0,))
    second = example([2], [7])._replace(cut=(True,))
    one, other = with_mismatched([first, second], 100)
    assert (one.scores, other.scores) == ((3.0, 0.0), None)
    assert (one.cut, other.cut) == ((False, True), (True, False))


def test_a_long_run_of_one_prompt_costs_no_more_than_its_length():
    count = 30_000  # looking ahead anew from every example would compare 450 million prompts
    data = [example([1], [1])] * count + [example([2], [9])]
    start = time.perf_counter()
    found = with_mismatched(data, 10)
    assert time.perf_counter() - start < 5
    assert all(e.responses[1].tolist() == [9] for e in found[:count])
    assert found[count].responses[1].tolist() == [1]
