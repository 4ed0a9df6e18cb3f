"""Batches in a deterministic order whose position can be saved: Grain over packed rows."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence

import grain
import numpy as np

from dpojax.data.packing import Shape
from dpojax.data.rows import Rows, collate
from dpojax.data.tokenise import Example

Attach = Callable[[Rows], Rows]


def steps_in(examples: int, *, batch_size: int, epochs: int) -> int:
    """Optimiser steps of so many epochs; the last batch may be smaller, nothing is dropped."""
    return math.ceil(examples * epochs / batch_size)


def order(examples: int, *, batch_size: int, steps: int, seed: int) -> grain.MapDataset:
    """Indices of the examples of each optimiser step: [at most batch_size] int, `steps` of them.

    Shuffled anew in every epoch; (seed, step) gives the batch, whatever the number of devices.
    """
    epochs = math.ceil(steps * batch_size / examples)
    indices = grain.MapDataset.range(examples).shuffle(seed=seed % 2**32).repeat(epochs)
    return indices.batch(batch_size, drop_remainder=False)[:steps]


def train_batches(
    examples: Sequence[Example],
    order: grain.MapDataset,
    shape: Shape,
    *,
    score_prompt: bool = False,
    attach: Attach | None = None,
) -> grain.DatasetIterator:
    """An iterator of `Rows` (NumPy) in `order`, prepared ahead in a thread; its state is saveable.

    `attach` adds the cached reference log-probs to a batch.
    """

    def batch(indices: np.ndarray) -> Rows:
        rows = collate(examples, [int(i) for i in indices], shape, score_prompt=score_prompt)
        return rows if attach is None else attach(rows)

    options = grain.ReadOptions(num_threads=1, prefetch_buffer_size=4)
    return iter(order.map(batch).to_iter_dataset(options))


def fixed_batches(
    examples: Sequence[Example],
    batches: Sequence[Sequence[int]],
    shape: Shape,
    *,
    score_prompt: bool = False,
    attach: Attach | None = None,
) -> Iterator[Rows]:
    """The given batches as `Rows`; what a smaller last one lacks is padding of weight zero."""
    for indices in batches:
        rows = collate(examples, indices, shape, score_prompt=score_prompt)
        yield rows if attach is None else attach(rows)


def in_order(indices: range, batch_size: int) -> list[range]:
    """`indices` cut into batches of at most `batch_size`: every example once."""
    return [indices[i : i + batch_size] for i in range(0, len(indices), batch_size)]
