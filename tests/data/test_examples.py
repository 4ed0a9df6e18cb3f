"""Examples in arrays, kept in a file or not, are those that they were made of."""

import os
import threading

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dpojax.data.examples import Example, Examples, FileStore, NotStored, load
from dpojax.data.records import DataError
from tests.stored_examples import save

INT32 = st.integers(-(2**31), 2**31 - 1)
ids = st.lists(INT32, min_size=1, max_size=4).map(lambda x: np.asarray(x, np.int32))
maybe = lambda values: st.none() | values


@st.composite
def examples(draw):
    several = lambda values: st.lists(values, min_size=count, max_size=count).map(tuple)
    count = draw(st.integers(1, 4))
    responses = draw(several(ids))
    masks = tuple(np.asarray(x) % 2 == 0 for x in responses)
    return Example(
        id=draw(st.text(max_size=8)),
        prompt=draw(ids),
        responses=responses,
        cut=draw(several(st.booleans())),
        label=draw(maybe(st.booleans())),
        scores=draw(maybe(several(st.floats(allow_nan=False)))),
        rank=draw(maybe(several(st.integers(-1, 9)))),
        category=draw(maybe(st.integers(0, 99))),
        weight=draw(st.floats(0, 9)),
        source=draw(st.integers(0, 9)),
        scored=draw(maybe(st.just(masks))),
    )


def plain(example: Example) -> tuple:
    """With lists in the place of arrays, and the dtype of each."""
    arrays = [example.prompt, *example.responses, *(example.scored or ())]
    tokens = [(x.tolist(), x.dtype) for x in arrays]
    single = example._replace(prompt=None, responses=None, scored=example.scored is None)
    return single, tokens, type(example.responses)


def pairs(count: int) -> list[Example]:
    made = lambda i: np.arange(i % 7 + 1, dtype=np.int32)
    both = lambda i: (made(i), made(i + 1))
    return [Example(f"f:{i}", made(i), both(i), (False, True), None) for i in range(count)]


@pytest.mark.slow
@settings(max_examples=30)
@given(made=st.lists(examples(), min_size=1, max_size=6))
def test_what_is_kept_and_what_is_read_back_are_the_examples(made, tmp_path_factory):
    path = tmp_path_factory.mktemp("kept") / "new" / "key.arrow"
    in_memory = Examples.of(made)
    save(path, in_memory, {"train": 3, "labels": ["a"]})
    (mapped, held_out), about = load(path)
    assert (len(held_out), about) == (0, {"train": 3, "labels": ["a"]})
    assert [*map(plain, in_memory)] == [*map(plain, mapped)] == [*map(plain, made)]


def test_it_is_a_sequence_as_a_list_is_one():
    made = pairs(9)
    found = Examples.of(made)
    assert len(found) == 9
    for part in (slice(2, 5), slice(None, None, -2), slice(-3, None)):
        assert [*map(plain, found[part])] == [*map(plain, made[part])]
    assert plain(found[-1]) == plain(found[np.int64(8)]) == plain(made[8])
    for outside in (9, -10):
        with pytest.raises(IndexError):
            found[outside]


def test_a_file_is_mapped_and_not_copied(tmp_path):
    path = tmp_path / "key.arrow"
    save(path, Examples.of(pairs(2_000)), {})
    before = pa.total_allocated_bytes()
    (found, _), _ = load(path)
    tokens = [found[1_234].prompt, *found[1_234].responses]
    assert pa.total_allocated_bytes() == before
    assert path.stat().st_size > 2_000 * 4
    for array in tokens:
        assert array.base is not None
        with pytest.raises(ValueError, match="read-only"):
            array[0] = 1


@pytest.mark.parametrize("place", [3, 400, -400, -3])
def test_a_changed_byte_anywhere_is_found(tmp_path, place):
    path = tmp_path / "key.arrow"
    save(path, Examples.of(pairs(50)), {})
    content = bytearray(path.read_bytes())
    content[place] ^= 1
    path.write_bytes(content)
    with pytest.raises(DataError, match=r"key\.arrow: not a usable cache of tokens"):
        load(path)


@pytest.mark.parametrize("size", [0, 1, 40, -1, -40])
def test_a_file_that_was_cut_is_found(tmp_path, size):
    path = tmp_path / "key.arrow"
    save(path, Examples.of(pairs(50)), {})
    path.write_bytes(path.read_bytes()[:size])
    with pytest.raises(DataError, match=r"key\.arrow: not a usable cache of tokens"):
        load(path)


def test_what_could_not_be_written_leaves_what_was_there(tmp_path, monkeypatch):
    path = tmp_path / "key.arrow"
    save(path, Examples.of(pairs(3)), {})

    def full(*_):
        raise OSError("No space left on device")

    monkeypatch.setattr(os, "replace", full)  # once all is written
    with pytest.raises(OSError, match="No space left"):
        save(path, Examples.of(pairs(5)), {})
    assert [x.name for x in tmp_path.iterdir()] == ["key.arrow"]
    assert len(load(path)[0][0]) == 3


def test_several_may_write_and_read_one_file_at_once(tmp_path):
    path, made, failures = tmp_path / "key.arrow", Examples.of(pairs(300)), []

    def work():
        try:
            for _ in range(5):
                save(path, made, {})
                assert len(load(path)[0][0]) == 300
        except Exception as error:
            failures.append(error)

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures
    assert [x.name for x in tmp_path.iterdir()] == ["key.arrow"]


def test_chunks_of_both_sides_come_back_apart_and_in_their_order(tmp_path):
    made, store = pairs(60), FileStore(tmp_path / "0.arrow")
    for first, last, held_out in ((0, 20, False), (20, 25, True), (25, 25, True), (25, 60, False)):
        store.add(Examples.of(made[first:last]), held_out=held_out)
    at_once = store.finish()
    store.seal({"n": 1})
    read_again, about = load(tmp_path / "0.arrow")
    wanted = [*map(plain, made[:20] + made[25:])], [*map(plain, made[20:25])]
    for sides in (at_once, read_again):
        assert tuple([*map(plain, side)] for side in sides) == wanted
    joined = Examples.joined(*read_again)
    assert [plain(joined[i]) for i in (0, 20, 54, 55, -1)] == [
        plain(made[i]) for i in (0, 25, 59, 20, 24)
    ]
    assert about == {"n": 1}


def test_examples_are_counted_by_a_column():
    made = [example._replace(source=i % 3, label=i < 4) for i, example in enumerate(pairs(10))]
    found = Examples.joined(Examples.of(made[:7]), Examples.of(made[7:]))
    assert found.count("source") == {0: 4, 1: 3, 2: 3}
    assert found.count("label") == {True: 4, False: 6}


def test_a_file_that_cannot_be_written_is_told_from_other_errors(tmp_path):
    with pytest.raises(NotStored, match="No such file"):
        FileStore(tmp_path / "nowhere" / "0.arrow")
