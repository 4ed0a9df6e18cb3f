"""The order of the data is a function of the seed and can be taken up again anywhere."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from dpojax.data.examples import Example
from dpojax.data.packing import plan
from dpojax.data.pipeline import Mixture, fixed_batches, in_order, order, steps_in, train_batches


def example(i):
    ids = lambda n: np.full(n, i + 1, np.int32)
    return Example(f"file:{i + 1}", ids(1 + i % 3), (ids(2), ids(3)), (False, False), None)


EXAMPLES = [example(i) for i in range(10)]


@pytest.mark.slow
@given(st.integers(1, 30), st.integers(1, 7), st.integers(1, 3), st.integers(0, 5))
def test_every_epoch_visits_every_example_once(examples, batch_size, epochs, seed):
    steps = steps_in(examples, batch_size=batch_size, epochs=epochs)
    batches = order(examples, batch_size=batch_size, steps=steps, seed=seed)
    visited = [int(i) for batch in batches for i in batch]
    assert len(batches) == steps
    for epoch in range(epochs):
        assert sorted(visited[epoch * examples : (epoch + 1) * examples]) == list(range(examples))


def test_epochs_differ_from_each_other_and_seeds_from_each_other():
    visits = lambda seed: [int(i) for b in order(50, batch_size=5, steps=20, seed=seed) for i in b]
    first = visits(0)
    assert first[:50] != first[50:]
    assert first != visits(1)
    assert first == visits(0)


def test_more_steps_than_an_epoch_go_on_into_the_next():
    assert len(order(10, batch_size=4, steps=7, seed=0)) == 7


@pytest.mark.parametrize("taken", [0, 1, 4])
def test_an_iterator_set_to_a_saved_position_goes_on_with_the_next_batch(taken):
    batches = order(len(EXAMPLES), batch_size=3, steps=8, seed=0)
    shape = plan(EXAMPLES, [[int(i) for i in b] for b in batches])
    iterator = train_batches(EXAMPLES, batches, shape)
    for _ in range(taken):
        next(iterator)
    position = iterator.get_state()
    expected = next(iterator)
    resumed = train_batches(EXAMPLES, batches, shape)
    resumed.set_state(position)
    got = next(resumed)
    np.testing.assert_array_equal(got.tokens, expected.tokens)
    np.testing.assert_array_equal(got.example, expected.example)


def test_a_ragged_last_batch_is_padded_with_nothing_and_loses_nothing():
    batches = in_order(range(2, 10), 3)
    assert [list(b) for b in batches] == [[2, 3, 4], [5, 6, 7], [8, 9]]
    rows = list(fixed_batches(EXAMPLES, batches, plan(EXAMPLES, batches)))
    assert sorted(int(i) for r in rows for i in r.example.ravel() if i >= 0) == list(range(2, 10))
    assert len({r.tokens.shape for r in rows}) == 1


@pytest.mark.parametrize("weights", [(1.0, 1.0), (3.0, 1.0), (1.0, 2.5), (0.2, 0.8)])
def test_a_mixture_has_each_source_in_its_share_and_no_example_twice_too_early(weights):
    counts, share = (60, 20), weights[1] / sum(weights)
    mixture = Mixture(counts, weights)
    batches = mixture.order(batch_size=8, steps=40, seed=3)
    order = [int(i) for batch in batches for i in batch]
    assert len(order) == 320
    of_second = [i >= 60 for i in order]
    for length in range(1, len(order) + 1):
        assert abs(sum(of_second[:length]) - share * length) <= 1
    for place, count in enumerate(counts):
        visits = [i for i, second in zip(order, of_second) if second == place]
        passes = [visits[first : first + count] for first in range(0, len(visits), count)]
        assert all(len({*some}) == len(some) for some in passes)
        assert len(passes) < 2 or passes[0] != passes[1]
    assert order == [int(i) for batch in batches for i in batch]
    other = mixture.order(batch_size=8, steps=40, seed=4)
    assert order != [int(i) for batch in other for i in batch]


@pytest.mark.parametrize(
    ("counts", "weights", "epoch"),
    [((60, 20), (1.0, 1.0), 40), ((60, 20), (3.0, 1.0), 80), ((60, 20, 10), (2.0, 2.0, 1.0), 50)],
)
def test_an_epoch_of_a_mixture_ends_with_the_source_that_is_used_up_first(counts, weights, epoch):
    assert Mixture(counts, weights).epoch == epoch
