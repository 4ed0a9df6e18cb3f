"""Tokenised examples in Arrow arrays, in memory or mapped from a file.

The file is an Arrow file, followed by the SHA-256 of its bytes. Reading it copies nothing: token
ids are slices of the mapped file, whose pages the operating system loads and drops as needed.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa

from dpojax import storage
from dpojax.data.records import DataError

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
ABOUT = b"about"


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


class Examples(Sequence[Example]):
    """A sequence of examples, stored as Arrow arrays; indexing makes an `Example`.

    The arrays of an `Example` are read-only views. A slice is a list.
    """

    def __init__(self, batch: pa.RecordBatch):
        self.batch = batch
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
        return self.batch.num_rows

    def largest_id(self) -> int:
        """The largest token id of all prompts and responses."""
        return max(int(ids.values.max(initial=0)) for ids in (self._prompt, self._response))

    def __getitem__(self, index):
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        index = range(len(self))[index]
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


def save(path: str | os.PathLike, examples: Examples, about: dict[str, Any]) -> None:
    """Write a file that holds the examples, and `about` as JSON: the whole file or nothing."""
    schema = SCHEMA.with_metadata({ABOUT: json.dumps(about)})
    with storage.replacing(path) as unfinished, unfinished.open("w+b") as file:
        with pa.ipc.new_file(file, schema) as writer:
            writer.write_batch(examples.batch.replace_schema_metadata(schema.metadata))
        file.seek(0)
        digest = hashlib.file_digest(file, "sha256").digest()
        file.write(digest)


def load(path: str | os.PathLike) -> tuple[Examples, dict[str, Any]]:
    """Map a file of examples into memory; return them and the `about` that was saved with them.

    Raises:
      DataError: the file is not as it was written.
    """
    try:
        content = pa.memory_map(str(storage.local_copy(path))).read_buffer()
        arrow, digest = content[:-DIGEST], content[-DIGEST:]
        if hashlib.sha256(arrow).digest() != digest.to_pybytes():
            raise DataError("its bytes are not those that were written")
        reader = pa.ipc.open_file(pa.BufferReader(arrow))
        batch, about = reader.get_batch(0), json.loads(reader.schema.metadata[ABOUT])
    except (DataError, pa.ArrowException, OSError) as error:
        raise DataError(f"{path}: not a usable cache of tokens ({error}); delete it") from error
    return Examples(batch), about
