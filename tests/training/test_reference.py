"""The reference's log-probs: found again under their hash, refused when they are not theirs."""

import threading
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dpojax import sharding
from dpojax.data.packing import plan
from dpojax.data.pipeline import fixed_batches, in_order
from dpojax.models.decoder import SHARDING_RULES
from dpojax.training.reference import (
    ReferenceMismatch,
    Store,
    cached,
    compute,
    fingerprint,
    key_of,
    verify,
)

KEY = dict(dtype="float32", tokenizer="words", model="llama")


@pytest.fixture(scope="module")
def batches(pairs):
    order = in_order(range(10), 4)
    shape = plan(pairs, [*order, range(10)], length=32, multiple=8)
    return lambda: fixed_batches(pairs, order, shape)


@pytest.fixture(scope="module")
def score_rows(score, reference_params):
    return lambda rows: score(reference_params, rows).logprob


@pytest.fixture(scope="module")
def store(score_rows, pairs, batches):
    return compute(score_rows, pairs, batches())


def test_cached_log_probs_equal_live_ones_whatever_the_packing(store, rows):
    live = rows.reference
    got = store.attach(rows._replace(reference=None)).reference
    np.testing.assert_allclose(got, live, atol=1e-5)


def test_a_second_run_reads_what_the_first_computed(tmp_path, store, pairs):
    def never():
        raise AssertionError("computed again")

    first, found = cached(tmp_path / "new", "key", pairs, lambda: store)
    again, found_again = cached(tmp_path / "new", "key", pairs, never)
    assert (found, found_again) == (False, True)
    np.testing.assert_array_equal(first.values, again.values)
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["key.npy"]


def test_of_two_runs_that_need_a_store_at_once_one_computes_it(tmp_path, store, pairs):
    computed, both = [], threading.Barrier(2)

    def slowly():
        computed.append("a store")
        time.sleep(0.2)
        return store

    def need():
        both.wait()
        found.append(cached(tmp_path, "key", pairs, slowly))

    found: list = []
    threads = [threading.Thread(target=need) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert computed == ["a store"]
    assert sorted(was_cached for _, was_cached in found) == [False, True]
    for one, _ in found:
        np.testing.assert_array_equal(one.values, store.values)


def empty(content, rng):
    del rng
    return content[:0]


def cut(content, rng):
    return content[: int(rng.integers(1, len(content)))]


def flipped(content, rng):
    content = bytearray(content)
    content[int(rng.integers(len(content)))] ^= 1 << int(rng.integers(8))
    return bytes(content)


def other_values(content, rng):
    """A thousand zeros, or as many as there are values."""
    del rng
    return content[:128] + bytes(len(content) - 132) + content[-4:]


def garbage(content, rng):
    return rng.bytes(len(content))


@pytest.mark.parametrize("damage", [empty, cut, flipped, other_values, garbage])
def test_a_damaged_store_is_noticed_and_made_again(tmp_path, store, pairs, damage, caplog):
    rng = np.random.default_rng(3)
    cached(tmp_path, "key", pairs, lambda: store)
    path = tmp_path / "key.npy"
    whole = path.read_bytes()
    for _ in range(20):
        path.write_bytes(damage(whole, rng))
        caplog.clear()
        again, found = cached(tmp_path, "key", pairs, lambda: store)
        assert not found
        assert again.values is store.values
        assert f"{path} is damaged" in caplog.text
        assert path.read_bytes() == whole


def test_a_store_of_other_examples_is_refused_with_its_path(tmp_path, store, pairs):
    cached(tmp_path, "key", pairs, lambda: store)
    with pytest.raises(ReferenceMismatch, match=r"key\.npy.*delete it"):
        cached(tmp_path, "key", pairs[:-1], lambda: store)


def test_a_changed_value_is_found_and_the_example_is_named(store, score_rows, pairs, batches):
    rows = next(batches())
    assert verify(store, score_rows(rows), rows, pairs, "float32") < 1e-5
    values = store.values.copy()
    values[store.starts[2]] += 0.1
    with pytest.raises(ReferenceMismatch, match=r"file:3: .*differ by 0\.1 nats"):
        verify(Store(pairs, values), score_rows(rows), rows, pairs, "float32")


def test_a_reference_that_gives_nan_is_refused_and_the_example_is_named(score_rows, pairs, batches):
    def broken(rows):
        owner = np.take_along_axis(rows.example, np.maximum(rows.response, 0) // 2, axis=-1)
        return jnp.where((owner == 5) & (rows.response >= 0), jnp.nan, score_rows(rows))

    with pytest.raises(ReferenceMismatch, match=r"file:6: the reference's log-prob is nan"):
        compute(broken, pairs, batches())


def test_the_key_changes_with_weights_tokens_and_precision(reference_params, pairs):
    weights = fingerprint(reference_params)
    key = key_of(weights, pairs, **KEY)
    assert key == key_of(fingerprint(jax.tree.map(jnp.array, reference_params)), pairs, **KEY)
    nudged = jax.tree.map(lambda x: x.at[(0,) * x.ndim].add(1e-6), reference_params)
    swapped = pairs[0]._replace(responses=pairs[0].responses[::-1])
    moved = pairs[0]._replace(
        prompt=pairs[0].prompt[:-1],
        responses=(np.append(pairs[0].prompt[-1:], pairs[0].responses[0]), pairs[0].responses[1]),
    )
    others = [
        key_of(fingerprint(nudged), pairs, **KEY),
        key_of(weights, [swapped, *pairs[1:]], **KEY),
        key_of(weights, [moved, *pairs[1:]], **KEY),
        key_of(weights, pairs[1:], **KEY),
        key_of(weights, pairs, **KEY | {"dtype": "bfloat16"}),
        key_of(weights, pairs, **KEY | {"tokenizer": "letters"}),
        key_of(weights, pairs, **KEY | {"model": "llama with another rope"}),
    ]
    assert len({key, *others}) == 8


def test_the_fingerprint_does_not_depend_on_the_mesh(reference_params):
    shardings = sharding.tree_shardings(
        reference_params, sharding.make_mesh(1, 4, 2), SHARDING_RULES
    )
    spread = jax.device_put(reference_params, shardings)
    assert fingerprint(spread) == fingerprint(reference_params)


def test_the_fingerprint_sees_two_values_that_changed_places():
    a, b = jnp.array([1.0, 2.0, 3.0]), jnp.array([2.0, 1.0, 3.0])
    assert fingerprint({"w": a}) != fingerprint({"w": b})
    assert fingerprint({"w": a}) != fingerprint({"v": a})
    assert fingerprint({"w": a}) != fingerprint({"w": a.astype(jnp.bfloat16)})
