"""The reference's per-token log-probs: computed once, stored, and read by every run.

A store holds one float32 per scored token of every example, in the order of the examples. Its file
is named by a hash of the reference's weights, the token ids and the precision, so that all runs of
a sweep share it.
"""

from __future__ import annotations

import contextlib
import hashlib
import logging
import os
from collections.abc import Callable, Iterable, Iterator, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from dpojax import sharding, storage
from dpojax.data.examples import Example
from dpojax.data.packing import size_of
from dpojax.data.rows import Rows
from dpojax.watchdog import beat

FORMAT = (
    "dpojax reference log-probs, version 1"  # change it when the same inputs give other numbers
)
TOLERANCE = {"float32": 1e-3, "bfloat16": 0.1}  # nats per token; packings and devices differ

logger = logging.getLogger(__name__)


class ReferenceMismatch(ValueError):
    """Stored log-probs do not belong to this reference and this data."""


class Store:
    """Per-token log-probs of a data set.

    Attributes:
      values: [scored tokens of all examples] float32, nats; nan where not yet computed.
      starts: [examples + 1] int64, where each example begins in `values`.
    """

    def __init__(self, examples: Sequence[Example], values: np.ndarray | None = None):
        counts = [size_of(example).scored for example in examples]
        self.starts = np.concatenate([[0], np.cumsum(counts)]).astype(np.int64)
        self.values = np.full(self.starts[-1], np.nan, np.float32) if values is None else values
        if self.values.shape != (self.starts[-1],):
            raise ReferenceMismatch(
                f"the store has {self.values.shape} values for {self.starts[-1]} scored tokens"
            )

    def attach(self, rows: Rows) -> Rows:
        """Return `rows` with `reference` [..., S] filled in; padding gets zero."""
        reference = np.zeros(rows.target.shape, np.float32)
        for row, begin, end, example in self._spans(rows):
            reference[row][begin:end] = self.values[self.starts[example] : self.starts[example + 1]]
        return rows._replace(reference=reference)

    def write(self, rows: Rows, logprobs: np.ndarray) -> None:
        """Store the log-probs [..., S] that were computed for `rows`."""
        for row, begin, end, example in self._spans(rows):
            self.values[self.starts[example] : self.starts[example + 1]] = logprobs[row][begin:end]

    def _spans(self, rows: Rows) -> Iterator[tuple[tuple, int, int, int]]:
        """Yield (row, begin, end, example): the scored tokens of each example in the batch."""
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
    """Compute the reference's log-probs of every example.

    Args:
      score: returns log-probs [..., S] of rows, in nats.
      batches: NumPy rows that hold every example once.

    Raises:
      ReferenceMismatch: a log-prob is not finite, or an example is in no batch.
    """
    store = Store(examples)
    for rows in batches:
        store.write(rows, sharding.to_host(score(rows)))
        beat("the reference's log-probs are computed")
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
    """Load the store `folder/KEY.npy`, or make and save it. Every process makes this call.

    The file ends with a checksum. One that is damaged is made again, with a warning. Of several
    runs that need a file that is not there, one makes it, and the others wait for it.

    Returns:
      the store, and True if it was loaded.

    Raises:
      ReferenceMismatch: the file is of other examples.
    """
    path = storage.as_path(folder, "the reference's cache folder") / f"{key}.npy"
    with contextlib.ExitStack() as waiting:

        def take_turn() -> None:
            if not path.exists():
                waiting.enter_context(storage.turn(path))

        sharding.on_first_process(take_turn)
        return _load_or_make(path, examples, make)


def _load_or_make(
    path: storage.Path, examples: Sequence[Example], make: Callable[[], Store]
) -> tuple[Store, bool]:
    """See `cached`."""
    damage = _damage(path) if jax.process_index() == 0 and path.exists() else ""
    if sharding.agreed(path.exists() and not damage):
        values = np.load(storage.local_copy(path), mmap_mode="r")
        try:
            return Store(examples, values), True
        except ReferenceMismatch as error:
            raise ReferenceMismatch(f"{path}: not a usable store ({error}); delete it") from error
    if damage:
        logger.warning("%s is damaged (%s); its log-probs are computed again", path, damage)
    store = make()
    if jax.process_index() == 0:
        storage.remove_unfinished(path.parent)
        with storage.replacing(path) as unfinished:
            np.save(unfinished, store.values)
            storage.append_checksum(unfinished)
    return store, False


def _damage(path: storage.Path) -> str:
    """What is wrong with a file of log-probs; "" if it is as it was written."""
    try:
        local = storage.local_copy(path)
        storage.require_checksum(local)
        np.load(local, mmap_mode="r")
    except (ValueError, OSError, EOFError) as error:
        return str(error)
    return ""


def verify(
    store: Store,
    recomputed: Array,
    rows: Rows,
    examples: Sequence[Example],
    dtype: str,
) -> float:
    """Return the largest |stored - recomputed| log-prob in nats over the examples of `rows`.

    Args:
      recomputed: log-probs [..., S].
      dtype: the compute dtype, which decides the tolerance.

    Raises:
      ReferenceMismatch: the difference is above the tolerance; the message names the example.
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
    """Return the name of a store: a hash of everything that its log-probs depend on.

    Args:
      weights: the `fingerprint` of the reference's weights.
      model: text that differs between architectures.
      tokenizer: text that differs between tokenizers.
    """
    digest = hashlib.sha256(f"{FORMAT} {dtype} {model} {tokenizer} {weights}".encode())
    for example in examples:
        beat()
        for piece in (example.prompt, *example.responses):
            digest.update(np.int64(len(piece)).tobytes() + np.asarray(piece, np.int32).tobytes())
        for mask in example.scored or ():
            digest.update(mask.tobytes())
        digest.update(b";")
    return digest.hexdigest()[:32]


def fingerprint(params) -> str:
    """Return a hash of the weights that does not depend on their sharding. Nothing is gathered.

    Each element's bits are mixed with its position, then summed modulo 2^32; twice, with different
    constants. Integer sums do not depend on the order.
    """
    leaves = jax.tree_util.tree_flatten_with_path(params)[0]
    sums = jax.jit(lambda xs: [_mixed_sums(x) for x in xs])([x for _, x in leaves])
    digest = hashlib.sha256()
    for (keys, leaf), pair in zip(leaves, sharding.to_host(sums)):
        name = f"{sharding.path_of(keys)} {leaf.shape} {leaf.dtype} "
        digest.update(name.encode() + np.asarray(pair).tobytes())
    return digest.hexdigest()


def _mixed_sums(x: Array) -> Array:
    """Return the two position-mixed sums of an array's bits: [2] uint32."""
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
