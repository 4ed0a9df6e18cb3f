"""The reference is data: its per-token log-probs, computed once, hashed, and read by every run.

A store holds one float32 per scored token of every example, in the order of the examples, under a
key that hashes the reference's weights, the token ids and the precision. Sweeps share it.
"""

from __future__ import annotations

import hashlib
import os
import pathlib
import tempfile
from collections.abc import Callable, Iterable, Iterator, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from dpojax import sharding
from dpojax.data.packing import size_of
from dpojax.data.rows import Rows
from dpojax.data.tokenise import Example

FORMAT = "dpojax reference log-probs, version 1"  # changes when the same inputs give other numbers
TOLERANCE = {"float32": 1e-3, "bfloat16": 0.1}  # nats a token, between packings and devices


class ReferenceMismatch(ValueError):
    """Cached log-probs that are not those of this reference on this data."""


class Store:
    """Per-token log-probs of a data set: `values` [all scored tokens] float32, nats."""

    def __init__(self, examples: Sequence[Example], values: np.ndarray | None = None):
        counts = [size_of(example).scored for example in examples]
        self.starts = np.concatenate([[0], np.cumsum(counts)]).astype(np.int64)
        self.values = np.full(self.starts[-1], np.nan, np.float32) if values is None else values
        if self.values.shape != (self.starts[-1],):
            raise ReferenceMismatch(
                f"the store has {self.values.shape} values for {self.starts[-1]} scored tokens"
            )

    def attach(self, rows: Rows) -> Rows:
        """`rows` with `reference` [..., S] filled in; zero at padding."""
        reference = np.zeros(rows.target.shape, np.float32)
        for row, begin, end, example in self._places(rows):
            reference[row][begin:end] = self.values[self.starts[example] : self.starts[example + 1]]
        return rows._replace(reference=reference)

    def write(self, rows: Rows, logprobs: np.ndarray) -> None:
        """Keep log-probs [..., S] that were computed for `rows`."""
        for row, begin, end, example in self._places(rows):
            self.values[self.starts[example] : self.starts[example + 1]] = logprobs[row][begin:end]

    def _places(self, rows: Rows) -> Iterator[tuple[tuple, int, int, int]]:
        """(row, first scored token, one past its last, example) of every example in the batch."""
        for row in np.ndindex(rows.example.shape[:-1]):
            begin = 0
            for example in rows.example[row]:
                if example >= 0:
                    end = begin + int(self.starts[example + 1] - self.starts[example])
                    yield row, begin, end, int(example)
                    begin = end


def compute(
    score: Callable[[Rows], Array], examples: Sequence[Example], batches: Iterable[Rows]
) -> Store:
    """The reference's log-probs of every example; `batches` holds each once, as NumPy rows."""
    store = Store(examples)
    for rows in batches:
        store.write(rows, sharding.to_host(score(rows)))
    if not np.isfinite(store.values).all():
        bad = int(np.flatnonzero(~np.isfinite(store.values))[0])
        example = examples[int(np.searchsorted(store.starts, bad, side="right")) - 1]
        raise ReferenceMismatch(
            f"{example.id}: the reference's log-prob is {store.values[bad]}; the reference itself "
            "is broken here (its weights, or its compute dtype), or a batch left this example out"
        )
    return store


def cached(
    folder: str | os.PathLike, key: str, examples: Sequence[Example], make: Callable[[], Store]
) -> tuple[Store, bool]:
    """The store under `folder/key.npy` and True, or a new one made, saved whole, and False."""
    path = pathlib.Path(folder) / f"{key}.npy"
    if sharding.agreed(path.exists()):
        try:
            return Store(examples, np.load(path, mmap_mode="r")), True
        except ValueError as error:
            raise ReferenceMismatch(f"{path}: not a usable store ({error}); delete it") from error
    store = make()
    if jax.process_index() == 0:
        path.parent.mkdir(parents=True, exist_ok=True)
        unfinished, name = tempfile.mkstemp(suffix=".unfinished", dir=path.parent)
        try:
            with os.fdopen(unfinished, "wb") as file:
                np.save(file, store.values)
            os.chmod(name, 0o644)  # mkstemp keeps others out of a cache that is to be shared
            os.replace(name, path)
        except OSError:
            os.unlink(name)
            raise
    return store, False


def verify(
    store: Store,
    recomputed: Array,
    rows: Rows,
    examples: Sequence[Example],
    dtype: str,
) -> float:
    """The largest |stored - recomputed| log-prob [..., S] in nats over the examples of `rows`.

    Raises:
      ReferenceMismatch: it exceeds what packing and hardware explain; it names the example.
    """
    difference = np.abs(sharding.to_host(recomputed) - store.attach(rows).reference)
    difference = np.where(rows.response >= 0, difference, 0.0)
    worst = np.unravel_index(np.argmax(difference), difference.shape)
    if not difference[worst] <= TOLERANCE[dtype]:
        slot = rows.response[worst] // rows.present.shape[-1]
        name = examples[int(rows.example[worst[:-1]][slot])].id
        raise ReferenceMismatch(
            f"{name}: stored and recomputed reference log-probs differ by {difference[worst]:.3g} "
            f"nats (allowed {TOLERANCE[dtype]}); the store is stale or damaged: delete it and run "
            "again"
        )
    return float(difference[worst])


def key_of(
    weights: str, examples: Sequence[Example], *, model: str, dtype: str, tokenizer: str
) -> str:
    """The name under which a reference's log-probs are kept: a hash of all that they depend on.

    weights: their `fingerprint`; model and tokenizer: text that differs wherever they do.
    """
    digest = hashlib.sha256(f"{FORMAT} {dtype} {model} {tokenizer} {weights}".encode())
    for example in examples:
        for piece in (example.prompt, *example.responses):
            digest.update(np.int64(len(piece)).tobytes() + np.asarray(piece, np.int32).tobytes())
        digest.update(b";")
    return digest.hexdigest()[:32]


def fingerprint(params) -> str:
    """A hash of the weights that does not depend on how they are sharded; nothing is gathered.

    Every element's bits are mixed with its position and summed modulo 2^32, twice; integer sums
    come out the same in any order.
    """
    leaves = jax.tree_util.tree_flatten_with_path(params)[0]
    sums = jax.jit(lambda xs: [_mixed_sums(x) for x in xs])([x for _, x in leaves])
    digest = hashlib.sha256()
    for (keys, leaf), pair in zip(leaves, sharding.to_host(sums)):
        name = f"{sharding.path_of(keys)} {leaf.shape} {leaf.dtype} "
        digest.update(name.encode() + np.asarray(pair).tobytes())
    return digest.hexdigest()


def _mixed_sums(x: Array) -> Array:
    wide = x if x.dtype.itemsize == 4 else x.astype(jnp.float32)
    bits = jax.lax.bitcast_convert_type(wide, jnp.uint32)
    place = jnp.zeros(x.shape, jnp.uint32)
    for axis, size in enumerate(x.shape):
        place = place * jnp.uint32(size) + jax.lax.broadcasted_iota(jnp.uint32, x.shape, axis)
    sums = []
    for salt in (0x9E3779B9, 0x85EBCA6B):
        mixed = (bits ^ (place * jnp.uint32(salt))) * jnp.uint32(0xC2B2AE35)
        mixed = (mixed ^ (mixed >> 15)) * jnp.uint32(0x27D4EB2F)
        sums.append(jnp.sum(mixed ^ (mixed >> 13), dtype=jnp.uint32))
    return jnp.stack(sums)
