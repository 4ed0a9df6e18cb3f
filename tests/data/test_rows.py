"""Rows hold every example once, in the layout that the docstring of `rows` promises."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from dpojax.data.examples import Example
from dpojax.data.filling import Size, best_fill, first_fit, level
from dpojax.data.packing import Bucket, Buckets, Costs, Shape, bucket_of, pack, plan, size_of
from dpojax.data.records import DataError
from dpojax.data.rows import buckets_of, collate, needs_of, utilisation

tokens = st.lists(st.integers(1, 99), min_size=1, max_size=9).map(np.int32)
responses = st.lists(tokens, min_size=1, max_size=4).map(tuple)
examples = st.builds(
    lambda prompt, answers: Example("id", prompt, answers, (False,) * len(answers), None),
    tokens,
    responses,
)


def read_back(rows, score_prompt=False):
    """{index of the example: (prompt, responses)}, from tokens, branch and segment alone."""
    read = {}
    slots = rows.present.shape[-1]
    for place in np.ndindex(rows.tokens.shape[:2]):
        for e, index in enumerate(rows.example[place]):
            if index < 0:
                continue
            here = rows.segment[place] == e + 1
            branch = lambda k, here=here, place=place: rows.tokens[place][
                here & (rows.branch[place] == k)
            ].tolist()
            count = int(rows.present[place][e].sum())
            read.setdefault(int(index), []).append(
                (branch(0), [branch(k + 1) for k in range(count)])
            )
            scored = [
                rows.target[place][rows.response[place] == e * slots + k].tolist()
                for k in range(count)
            ]
            prompt = branch(0)[1:] if score_prompt else []
            assert scored[0] == prompt + branch(1)
            assert scored[1:] == [branch(k + 1) for k in range(1, count)]
    return read


@given(st.lists(examples, min_size=1, max_size=12), st.booleans(), st.integers(1, 3))
def test_every_example_stands_once_in_the_rows(data, score_prompt, multiple):
    batch = list(range(len(data)))
    shape = plan(data, [batch], multiple=multiple, score_prompt=score_prompt)
    rows = collate(data, batch, shape, score_prompt=score_prompt)
    expected = {
        i: [(e.prompt.tolist(), [y.tolist() for y in e.responses])] for i, e in enumerate(data)
    }
    assert read_back(rows, score_prompt) == expected
    assert shape.rows % multiple == 0
    assert ((rows.segment == 0) | (rows.tokens > 0)).all()


@st.composite
def judged_examples(draw):
    """An example of any number of responses, with or without label, scores and ties."""
    example = draw(examples)
    count = len(example.responses)
    per_response = lambda values: (
        st.none() | st.lists(values, min_size=count, max_size=count).map(tuple)
    )
    return example._replace(
        label=draw(st.sampled_from([None, True, False])),
        scores=draw(per_response(st.floats(-1e6, 1e6, width=32))),
        rank=draw(per_response(st.integers(0, count - 1))),
    )


@given(st.lists(judged_examples(), min_size=1, max_size=12))
def test_what_the_data_say_of_a_response_lands_at_its_slot(data):
    batch = list(range(len(data)))
    rows = collate(data, batch, plan(data, [batch], micro_rows=2))
    for place, index in np.ndenumerate(rows.example):
        none = [0] * rows.present.shape[-1]
        if index < 0:
            assert rows.rank[place].tolist() == rows.scores[place].tolist() == none
            assert not rows.desirable[place]
            continue
        label, scores, rank = data[index].label, data[index].scores, data[index].rank
        count = len(data[index].responses)
        expected = scores or none[:count], rank or tuple(range(count))
        assert rows.scores[place].tolist() == [*expected[0], *none[count:]]
        assert rows.rank[place].tolist() == [*expected[1], *none[count:]]
        assert rows.desirable[place] == (label in (None, True))
    assert (rows.rank.dtype, rows.scores.dtype, rows.desirable.dtype) == (
        np.int32,
        np.float32,
        bool,
    )


@given(st.lists(examples, min_size=1, max_size=8))
def test_a_token_is_predicted_from_the_column_before_it_on_its_own_path(data):
    batch = list(range(len(data)))
    rows = collate(data, batch, plan(data, [batch]))
    for place in zip(*np.nonzero(rows.response >= 0)):
        row, source = place[:2], rows.source[place]
        rank = rows.response[place] % rows.present.shape[-1]
        branch, segment = rows.branch[row], rows.segment[row]
        columns = np.flatnonzero(
            (segment == segment[source])
            & (branch == rank + 1)
            & (rows.positions[row] == rows.positions[row][source] + 1)
        )
        assert len(columns) == 1, "positions go on from the prompt's end on every branch"
        assert rows.tokens[row][columns[0]] == rows.target[place]
        assert branch[source] in (0, rank + 1)


@st.composite
def masked_examples(draw):
    """An example of which some tokens of each response are scored, at least one."""
    example = draw(examples)
    masks = []
    for response in example.responses:
        bools = st.lists(st.booleans(), min_size=len(response), max_size=len(response))
        masks.append(np.array(draw(bools.filter(any))))
    return example._replace(scored=tuple(masks))


@given(st.lists(masked_examples(), min_size=1, max_size=8), st.booleans())
def test_only_scored_tokens_are_targets_and_all_tokens_are_context(data, score_prompt):
    batch = list(range(len(data)))
    sizes = [size_of(example, score_prompt=score_prompt) for example in data]
    whole = [example._replace(scored=None) for example in data]
    shape = plan(whole, [batch], score_prompt=score_prompt)
    masked, every = (
        collate(some, batch, shape, score_prompt=score_prompt) for some in (data, whole)
    )
    for place in np.ndindex(masked.example.shape):
        if masked.example[place] < 0:
            continue
        index, row = int(masked.example[place]), place[:2]
        (there,) = np.argwhere(every.example == index)
        columns = lambda rows, at: rows.tokens[tuple(at[:2])][
            rows.segment[tuple(at[:2])] == at[2] + 1
        ].tolist()
        assert columns(masked, place) == columns(every, there)
        slots = masked.present.shape[-1]
        mine = masked.response[row] // slots == place[2]
        assert (mine & (masked.response[row] >= 0)).sum() == sizes[index].scored
        for k, (response, mask) in enumerate(zip(data[index].responses, data[index].scored)):
            here = masked.response[row] == place[2] * slots + k
            prompt = data[index].prompt[1:].tolist() if score_prompt and k == 0 else []
            assert masked.target[row][here].tolist() == prompt + response[mask].tolist()
            for source, target in zip(masked.source[row][here], masked.target[row][here]):
                reached = (masked.segment[row] == place[2] + 1) & (
                    masked.positions[row] == masked.positions[row][source] + 1
                )
                assert target in masked.tokens[row][reached]


@given(st.lists(examples, min_size=1, max_size=8))
def test_a_mask_that_scores_every_token_is_no_mask(data):
    batch = list(range(len(data)))
    full = [e._replace(scored=tuple(np.ones(len(y), bool) for y in e.responses)) for e in data]
    shape = plan(data, [batch])
    assert plan(full, [batch]) == shape
    for a, b in zip(collate(data, batch, shape)[:12], collate(full, batch, shape)[:12]):
        np.testing.assert_array_equal(a, b)


some_sizes = st.lists(
    st.builds(lambda n, scored: Size(n, min(scored, n)), st.integers(1, 20), st.integers(0, 20)),
    max_size=30,
)


@pytest.mark.parametrize("fill", [first_fit, best_fill])
@given(some_sizes)
def test_no_row_is_filled_over_its_capacity_and_all_are_filled_the_same_again(fill, sizes):
    sizes = [Size(tokens, min(scored, 15)) for tokens, scored in sizes]
    rows = fill(sizes, Size(20, 15))
    assert sorted(i for row in rows for i in row) == list(range(len(sizes)))
    assert all(sum(sizes[i].tokens for i in row) <= 20 for row in rows)
    assert all(sum(sizes[i].scored for i in row) <= 15 for row in rows)
    assert rows == fill(list(sizes), Size(20, 15))


@given(some_sizes.filter(bool))
def test_packed_rows_are_never_more_than_those_of_first_fit(sizes):
    shape = Shape(1, 1, 24, 20, 1, 1)
    parts = pack(sizes, shape)
    assert sorted(i for part in parts for row in part for i in row) == list(range(len(sizes)))
    assert len(parts) <= len(first_fit(sizes, Size(24, 20)))


@given(some_sizes.filter(bool), st.integers(1, 3))
def test_packing_never_takes_more_time_than_first_fit_at_any_length(sizes, height):
    buckets = Buckets(
        [Bucket(height, 20, 20), Bucket(2 * height, 20, 20), Bucket(2 * height, 40, 30)]
    )
    costs = Costs(attention=100, overhead=5)

    def time(parts):
        taken = lambda part: [[sum(sizes[i][j] for i in row) for j in (0, 1)] for row in part]
        needs = np.array([[len(part), *np.max(taken(part), axis=0)] for part in parts])
        return sum(costs.of(buckets[i]) for i in bucket_of(needs, buckets))

    parts = pack(sizes, Shape(1, *buckets[-1], 1, 1, buckets, costs))
    for capacities in ([Size(20, 20), Size(40, 30)], [Size(40, 30)]):
        rows = first_fit(sizes, *capacities)
        rows.sort(key=lambda row: -sum(sizes[i].tokens for i in row))
        plain = [rows[i : i + 2 * height] for i in range(0, len(rows), 2 * height)]
        assert time(parts) <= time(plain)


@given(some_sizes, st.integers(1, 8))
def test_no_levelled_row_is_longer_than_the_mean_by_an_example(sizes, count):
    rows = level(sizes, count)
    assert sorted(i for row in rows for i in row) == list(range(len(sizes)))
    assert len(rows) == min(count, len(sizes))
    lengths = [sum(sizes[i].tokens for i in row) for row in rows]
    largest = max((size.tokens for size in sizes), default=0)
    assert max(lengths, default=0) <= sum(lengths) / count + largest


def test_a_row_is_filled_by_a_sum_where_first_fit_leaves_gaps():
    sizes = [Size(n, 1) for n in (5, 4, 3, 3, 3, 2)]
    assert len(first_fit(sizes, Size(10, 10))) == 3
    filled = [sorted(sizes[i].tokens for i in row) for row in best_fill(sizes, Size(10, 10))]
    assert filled == [[2, 3, 5], [3, 3, 4]]


def test_rows_that_row_shards_compute_anyway_share_what_few_would_hold():
    """Sixteen examples fill four rows of 128; eight shards compute eight rows: short ones do."""
    data = [pair(10, 10, 10) for _ in range(16)]
    buckets = Buckets([Bucket(8, 64, 64), Bucket(8, 128, 128)])
    shape = Shape(2, 8, 128, 128, 4, 2, buckets, Costs())
    rows = collate(data, range(16), shape)
    assert needs_of(rows)[0].tolist() == [8, 60, 40]
    assert utilisation(rows) == 60 / 64


def test_first_fit_decreasing_packs_a_known_case_without_waste():
    sizes = [Size(n, 1) for n in (3, 7, 5, 5, 6, 4)]
    assert first_fit(sizes, Size(10, 10)) == [[1, 0], [4, 5], [2, 3]]


def pair(prompt, chosen, rejected, id="file:1"):
    return Example(
        id,
        np.arange(1, prompt + 1, dtype=np.int32),
        tuple(np.arange(1, n + 1, dtype=np.int32) for n in (chosen, rejected)),
        (False, False),
        None,
    )


def test_one_pair_lies_in_its_row_as_the_docstring_says():
    data = [pair(2, 3, 1)]
    rows = collate(data, [0], plan(data, [[0]], length=8))
    at = lambda name: getattr(rows, name)[0, 0].tolist()
    assert at("tokens") == [1, 2, 1, 2, 3, 1, 0, 0]
    assert at("positions") == [0, 1, 2, 3, 4, 2, 0, 0]
    assert at("segment") == [1, 1, 1, 1, 1, 1, 0, 0]
    assert at("branch") == [0, 0, 1, 1, 1, 2, 0, 0]
    scored = rows.response[0, 0] >= 0
    assert rows.source[0, 0][scored].tolist() == [1, 2, 3, 1]
    assert rows.target[0, 0][scored].tolist() == [1, 2, 3, 1]
    assert rows.response[0, 0][scored].tolist() == [0, 0, 0, 1]
    assert utilisation(rows) == 6 / 8


def test_utilisation_counts_every_row_that_is_computed_and_no_empty_micro_batch():
    data = [pair(10, 10, 10) for _ in range(3)]
    shape = plan(data, [range(3)], length=32, micro_rows=2, max_buckets=1)
    rows = collate(data, [0, 1, 2], shape)
    assert rows.tokens.shape == (2, 2, 32)
    assert utilisation(rows) == 90 / 128
    assert utilisation(collate(data, [0], shape)) == 30 / 64


def test_a_micro_batch_that_is_not_full_is_computed_at_a_size_with_fewer_rows():
    data = [pair(10, 10, 10) for _ in range(3)]
    shape = plan(data, [range(3)], length=32, micro_rows=2)
    assert utilisation(collate(data, [0, 1, 2], shape)) == 90 / 96
    assert utilisation(collate(data, [0], shape)) == 30 / 32


def test_batches_that_need_different_numbers_of_rows_compute_few_empty_ones():
    data = [pair(10, 10, 10) for _ in range(100)]
    batches = [range(10)] * 9 + [range(20)]
    shape = plan(data, batches, length=32)
    assert [utilisation(collate(data, b, shape)) for b in batches] == [30 / 32] * 10


def test_one_long_example_does_not_set_what_the_others_cost():
    data = [pair(900, 50, 50)] + [pair(20, 20, 20) for _ in range(64)]
    batches = [range(32), range(32, 65)]
    shape = plan(data, batches)
    assert shape.length >= 1000
    assert min(utilisation(collate(data, batch, shape)) for batch in batches) > 0.9


@given(st.lists(examples, min_size=2, max_size=24), st.integers(1, 3), st.integers(1, 4))
def test_every_micro_batch_fits_the_size_that_it_is_computed_at(data, multiple, max_buckets):
    batches = [range(len(data) // 2), range(len(data) // 2, len(data))]
    fine = Costs(overhead=1, step=2)
    shape = plan(data, batches, multiple=multiple, costs=fine, max_buckets=max_buckets)
    assert len(shape.buckets) <= max_buckets
    assert (
        shape.micro_batches > 1 or not shape.buckets
    )  # of a single one XLA would compute all sizes
    assert all(bucket.rows % multiple == 0 for bucket in shape.buckets)
    for batch in batches:
        rows = collate(data, batch, shape)
        needs, buckets = needs_of(rows), buckets_of(rows)
        assert (bucket_of(needs, buckets) < len(buckets)).all()
        for part, need in enumerate(needs):
            used = np.argwhere(rows.segment[part] > 0).max(0, initial=-1) + 1
            scored = np.argwhere(rows.response[part] >= 0).max(0, initial=-1)[1] + 1
            assert need.tolist() == [*used, scored]


def test_micro_batches_take_the_rows_in_turn_and_empty_ones_come_last():
    data = [pair(10, 10, 10) for _ in range(5)]
    shape = plan(data, [range(5), range(1)], length=32, micro_rows=2)
    assert (shape.micro_batches, shape.rows) == (3, 2)
    filled = collate(data, range(1), shape).present.any(axis=(1, 2, 3))
    assert filled.tolist() == [True, False, False]


def test_rows_are_short_where_attention_is_dear_and_well_filled_where_it_is_cheap():
    data = [pair(11, 11, 11) for _ in range(20)]
    # 64 columns hold one of 33 tokens, 192 hold five.
    assert plan(data, [range(20)], costs=Costs(attention=1)).length == 64
    assert plan(data, [range(20)], costs=Costs(attention=1e9)).length >= 192


@pytest.mark.parametrize(("tokens", "rows"), [(64, 8), (1024, 1)])
def test_more_rows_at_once_have_to_save_their_share_of_the_time(tokens, rows):
    """A micro-batch costs 64 tokens more than its rows: much for short ones. Where a row costs as
    much as 1,400, two rows at once save 2 % of two micro-batches."""
    half = tokens // 4
    data = [pair(2 * half, half, half, id=f"file:{i}") for i in range(8)]
    assert plan(data, [range(8)], length=tokens, max_buckets=1).rows == rows


def test_batches_that_fill_a_row_with_a_few_more_examples_have_the_same_shape():
    """So that runs with other seeds share compiled programs."""
    data = [pair(4, 2, 2, id=f"file:{i}") for i in range(8)]
    shapes = {plan(data, [range(n)], length=64, micro_rows=1, max_buckets=1) for n in (5, 6, 7, 8)}
    assert {(shape.micro_batches, shape.examples) for shape in shapes} == {(1, 8)}
    assert len(shapes) == 1


def test_an_example_longer_than_the_row_is_named():
    with pytest.raises(DataError, match=r"hh.jsonl:7.*40 tokens.*raise row_length"):
        plan([pair(1, 1, 1), pair(20, 10, 10, id="hh.jsonl:7")], [[0, 1]], length=32)


def test_micro_rows_that_the_mesh_does_not_divide_are_refused():
    with pytest.raises(ValueError, match=r"micro-batches of 3 rows.*multiple of 2"):
        plan([pair(1, 1, 1)], [[0]], micro_rows=3, multiple=2)


def test_size_counts_prompt_tokens_as_scored_only_when_asked():
    assert size_of(pair(5, 2, 3)) == (10, 5)
    assert size_of(pair(5, 2, 3), score_prompt=True) == (10, 9)


def test_a_second_gradient_counts_as_memory_that_all_rows_at_once_do_without():
    data = [pair(40, 30, 30) for _ in range(16)]
    batches = [range(i, i + 4) for i in range(0, 16, 4)]
    shape = lambda gradient: plan(data, batches, costs=Costs(gradient=gradient, overhead=0))
    light, heavy = shape(0), shape(10_000)
    assert light.micro_batches * light.rows == heavy.rows
    assert light.micro_batches > 1
    assert heavy.micro_batches == 1
