"""Tokenised examples in Arrow arrays, in memory or mapped from a file.

The file is an Arrow file of many batches, written one after the other. Behind it stand a text about
it, and the SHA-256 of all bytes. Reading it copies nothing: token ids are slices of the mapped
file, whose pages the operating system loads and drops as needed.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
from collections import Counter
from collections.abc import Iterable, Sequence
from typing import Any, BinaryIO, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute

from dpojax import storage
from dpojax.data.records import DataError
from dpojax.watchdog import beat

# One column for each field of an Example. None is stored as null.
SCHEMA = pa.schema(
    {
        "id": pa.large_string(),
        "prompt": pa.large_list(pa.int32()),
        "responses": pa.large_list(pa.large_list(pa.int32())),
        "cut": pa.large_list(pa.uint8()),  # Arrow packs bools into bits, which NumPy cannot view
        "label": pa.bool_(),
        "scores": pa.large_list(pa.float64()),
        "rank": pa.large_list(pa.int32()),
        "category": pa.int32(),
        "weight": pa.float64(),
        "source": pa.int32(),
        "scored": pa.large_list(pa.large_list(pa.uint8())),
    }
)
DIGEST = hashlib.sha256().digest_size
LENGTH = 8  # bytes that hold the length of the text about the file
BLOCK = 2**20


class Example(NamedTuple):
    """Token ids of one record.

    Attributes:
      id: the record's id.
      prompt: int32 [P], P >= 1.
      responses: K arrays int32 [T_k], T_k >= 1, best first.
      cut: for each response, whether truncation removed its end (and so its EOS).
      label: for unpaired data, whether the response is desirable.
      scores: the score of each response in the data, or None.
      rank: for each response the number of responses that are better; None where every response is
        worse than the one before it.
      category: index of a classified text's class; `tokenise` leaves it None.
      weight: weight of the example's loss.
      source: index of the source that the record comes from.
      scored: for each response bool [T_k], which of its tokens the loss scores. The others are
        context, such as the result of a tool. None: all are scored.
    """

    id: str
    prompt: np.ndarray
    responses: tuple[np.ndarray, ...]
    cut: tuple[bool, ...]
    label: bool | None
    scores: tuple[float, ...] | None = None
    rank: tuple[int, ...] | None = None
    category: int | None = None
    weight: float = 1.0
    source: int = 0
    scored: tuple[np.ndarray, ...] | None = None


class Ragged(NamedTuple):
    """Arrays of different lengths in one: the i-th is values[starts[i] : starts[i + 1]].

    A null is an empty array.
    """

    starts: np.ndarray
    values: np.ndarray

    @classmethod
    def view(cls, lists: pa.LargeListArray) -> Ragged:
        return cls(lists.offsets.to_numpy(), lists.values.to_numpy())

    def at(self, index: int) -> np.ndarray:
        return self.values[self.starts[index] : self.starts[index + 1]]


class _Batch:
    """The examples of one Arrow batch."""

    def __init__(self, batch: pa.RecordBatch):
        responses = batch.column("responses")
        self._of_example = responses.offsets.to_numpy()
        self._response = Ragged.view(responses.values)
        ragged = ("prompt", "cut", "scores", "rank")
        self._prompt, self._cut, self._scores, self._rank = (
            Ragged.view(batch.column(name)) for name in ragged
        )
        single = ("id", "label", "category", "weight", "source")
        self._single = {name: batch.column(name) for name in single}
        scored = batch.column("scored")
        self._mask_of_example = scored.offsets.to_numpy()
        self._mask = Ragged.view(scored.values)

    def largest_id(self) -> int:
        return max(int(ids.values.max(initial=0)) for ids in (self._prompt, self._response))

    def example(self, index: int) -> Example:
        places = range(self._of_example[index], self._of_example[index + 1])
        masks = range(self._mask_of_example[index], self._mask_of_example[index + 1])
        return Example(
            prompt=self._prompt.at(index),
            responses=tuple(map(self._response.at, places)),
            cut=tuple(map(bool, self._cut.at(index).tolist())),
            scores=tuple(self._scores.at(index).tolist()) or None,
            rank=tuple(self._rank.at(index).tolist()) or None,
            scored=tuple(self._mask.at(place).view(bool) for place in masks) or None,
            **{name: column[index].as_py() for name, column in self._single.items()},
        )


class Examples(Sequence[Example]):
    """A sequence of examples, stored as batches of Arrow arrays; indexing makes an `Example`.

    The arrays of an `Example` are read-only views. A slice is a list.
    """

    def __init__(self, *batches: pa.RecordBatch):
        self.batches = tuple(batch for batch in batches if batch.num_rows)
        self._views = [_Batch(batch) for batch in self.batches]
        self._starts = np.cumsum([0, *(batch.num_rows for batch in self.batches)])

    @classmethod
    def of(cls, examples: Sequence[Example]) -> Examples:
        columns = {name: [e[i] for e in examples] for i, name in enumerate(Example._fields)}
        columns["cut"] = [[int(x) for x in cut] for cut in columns["cut"]]
        columns["scored"] = [
            None if masks is None else [mask.view(np.uint8) for mask in masks]
            for masks in columns["scored"]
        ]
        return cls(pa.RecordBatch.from_pydict(columns, schema=SCHEMA))

    def __len__(self) -> int:
        return int(self._starts[-1])

    def largest_id(self) -> int:
        """The largest token id of all prompts and responses."""
        largest = 0
        for view in self._views:
            largest = max(largest, view.largest_id())
            beat()
        return largest

    def __getitem__(self, index):
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        index = range(len(self))[index]
        batch = int(np.searchsorted(self._starts, index, side="right")) - 1
        return self._views[batch].example(index - int(self._starts[batch]))

    @classmethod
    def joined(cls, *parts: Examples) -> Examples:
        """The examples of several sequences in one; nothing is copied."""
        return cls(*(batch for part in parts for batch in part.batches))

    def count(self, name: str) -> Counter:
        """How many examples have each value of a column of single values, such as "source"."""
        counts: Counter = Counter()
        for batch in self.batches:
            for value in pa.compute.value_counts(batch.column(name)).to_pylist():
                counts[value["values"]] += value["counts"]
        return counts


class Store:
    """Takes examples chunk by chunk, and gives them back.

    This one keeps them in memory.
    """

    def __init__(self) -> None:
        self._batches: list[tuple[bool, pa.RecordBatch]] = []

    def add(self, examples: Examples, *, held_out: bool) -> None:
        """Add some examples to those to train on, or to those that are held out."""
        self._batches += [(held_out, batch) for batch in examples.batches]

    def finish(self) -> tuple[Examples, Examples]:
        """The examples to train on, and those held out; nothing may be added afterwards."""
        return _both_sides(self._batches)


class NotStored(Exception):
    """A file of examples could not be written; the message says why."""


class FileStore(Store):
    """Writes examples to a file, and maps it: memory does not grow with them.

    Raises:
      NotStored: from every method.
    """

    def __init__(self, path: str | os.PathLike):
        self.path = path
        self._sides: list[bool] = []  # of each batch: whether it is held out
        with _storing():
            self._file = open(path, "wb")  # noqa: SIM115 (closed by `finish`)
            self._writer = pa.ipc.new_file(self._file, SCHEMA)

    def add(self, examples: Examples, *, held_out: bool) -> None:
        with _storing():
            for batch in examples.batches:
                self._writer.write_batch(batch)
                self._sides.append(held_out)

    def finish(self) -> tuple[Examples, Examples]:
        with _storing():
            self._writer.close()
            self._file.close()
            content = pa.memory_map(str(self.path)).read_buffer()
        return _mapped(content, self._sides)

    def seal(self, about: dict[str, Any]) -> None:
        """Write `about` as JSON and the hash behind the examples, so that `load` can read them."""
        text = json.dumps({"held_out": self._sides, "about": about}).encode()
        with _storing(), open(self.path, "rb+") as file:
            file.seek(0, os.SEEK_END)
            file.write(text + len(text).to_bytes(LENGTH, "little"))
            length = file.tell()
            file.seek(0)
            file.write(_hash_of(file, length))

    def close(self) -> None:
        """Close the file of a store that was not finished."""
        self._file.close()


def load(path: str | os.PathLike) -> tuple[tuple[Examples, Examples], dict[str, Any]]:
    """Map a file of examples into memory; return what `FileStore.finish` did, and its `about`.

    Raises:
      DataError: the file is not as it was written.
    """
    try:
        local = storage.local_copy(path)
        _check(local)
        content = pa.memory_map(str(local)).read_buffer()[:-DIGEST]
        length = int.from_bytes(content[-LENGTH:].to_pybytes(), "little")
        text = json.loads(content[-LENGTH - length : -LENGTH].to_pybytes())
        return _mapped(content[: -LENGTH - length], text["held_out"]), text["about"]
    except (DataError, ValueError, KeyError, pa.ArrowException, OSError) as error:
        raise DataError(f"{path}: not a usable cache of tokens ({error})") from error


def _check(path: os.PathLike) -> None:
    """Raise DataError unless the hash at the end of a file is that of its other bytes.

    They are read and not mapped: pages of a mapped file would count as memory of this process.
    """
    with open(path, "rb") as file:
        digest = _hash_of(file, os.path.getsize(path) - DIGEST)
        if file.read() != digest:
            raise DataError("its bytes are not those that were written")


def _hash_of(file: BinaryIO, length: int) -> bytes:
    """The SHA-256 of the next `length` bytes of a file."""
    digest = hashlib.sha256()
    while length > 0 and (block := file.read(min(BLOCK, length))):
        digest.update(block)
        length -= len(block)
        beat()
    return digest.digest()


def _mapped(content: pa.Buffer, sides: Iterable[bool]) -> tuple[Examples, Examples]:
    reader = pa.ipc.open_file(pa.BufferReader(content))
    return _both_sides(zip(sides, map(reader.get_batch, range(reader.num_record_batches))))


def _both_sides(batches: Iterable[tuple[bool, pa.RecordBatch]]) -> tuple[Examples, Examples]:
    sides = {False: [], True: []}
    for held_out, batch in batches:
        sides[held_out].append(batch)
    return Examples(*sides[False]), Examples(*sides[True])


@contextlib.contextmanager
def _storing():
    try:
        yield
    except OSError as error:
        raise NotStored(str(error)) from error
