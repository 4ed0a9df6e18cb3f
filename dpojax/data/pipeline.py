"""Batches of packed rows by Grain, in a deterministic order whose position can be saved."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import grain
import numpy as np

from dpojax.data.examples import Example
from dpojax.data.packing import Shape
from dpojax.data.rows import Rows, collate

Attach = Callable[[Rows], Rows]  # adds the cached reference log-probs to a batch


def steps_in(examples: int, *, batch_size: int, epochs: int) -> int:
    """Number of optimiser steps in `epochs` epochs; the last batch may be smaller."""
    return math.ceil(examples * epochs / batch_size)


def order(examples: int, *, batch_size: int, steps: int, seed: int) -> grain.MapDataset:
    """The examples of each optimiser step: `steps` arrays of indices, [at most batch_size] int.

    Every epoch is shuffled differently. (seed, step) decides the batch, on any number of devices.
    """
    epochs = math.ceil(steps * batch_size / examples)
    indices = grain.MapDataset.range(examples).shuffle(seed=seed % 2**32).repeat(epochs)
    return indices.batch(batch_size, drop_remainder=False)[:steps]


class Mixture(NamedTuple):
    """Sources that are mixed by weights: where examples of each lie, and their shares.

    Every run of examples has each source in its share, to within one example. A source is shuffled,
    gone through to its end, and shuffled anew.

    Attributes:
      counts: examples of each source; those of the first come first.
      weights: above 0.
    """

    counts: tuple[int, ...]
    weights: tuple[float, ...]

    @property
    def epoch(self) -> int:
        """How many examples there are until the first of the sources is used up."""
        return len(grain.MapDataset.mix(self._sources(), self.weights))

    def order(self, *, batch_size: int, steps: int, seed: int) -> grain.MapDataset:
        """Like `order`, of the mixture."""
        sources = [
            source.shuffle(seed=(seed + place) % 2**32).repeat()
            for place, source in enumerate(self._sources())
        ]
        mixed = grain.MapDataset.mix(sources, self.weights)
        return mixed.batch(batch_size)[:steps]

    def _sources(self) -> list[grain.MapDataset]:
        ends = itertools.accumulate(self.counts, initial=0)
        return [grain.MapDataset.range(*both) for both in itertools.pairwise(ends)]


def train_batches(
    examples: Sequence[Example],
    order: grain.MapDataset,
    shape: Shape,
    *,
    score_prompt: bool = False,
    attach: Attach | None = None,
) -> grain.DatasetIterator:
    """Iterate over `Rows` (NumPy) in `order`.

    Batches are prepared ahead in a thread. The position of the iterator can be saved.
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
    """Iterate over `batches` of indices as `Rows`; a smaller last batch has more padding."""
    for indices in batches:
        rows = collate(examples, indices, shape, score_prompt=score_prompt)
        yield rows if attach is None else attach(rows)


def in_order(indices: range, batch_size: int) -> list[range]:
    """Split `indices` into batches of at most `batch_size`."""
    return [indices[i : i + batch_size] for i in range(0, len(indices), batch_size)]
