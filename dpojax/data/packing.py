"""How examples are packed into rows, rows into micro-batches, and micro-batches into buckets.

A row holds several examples. A micro-batch holds several rows, the fullest first; the gradients of
a batch's micro-batches are accumulated. A *bucket* is a static size of a micro-batch (rows, columns
of a row, scored tokens of a row) for which the computation is compiled. There are a handful. Every
micro-batch is computed in the cheapest bucket that holds it. So one long example does not set the
cost of all others, nor does the last micro-batch cost as much as a full one.

`plan` chooses the buckets of a data set once. `pack` distributes the examples of one batch.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import NamedTuple

import jax
import numpy as np

from dpojax.data.examples import Example
from dpojax.data.filling import Size, best_fill, first_fit, level, tokens_of
from dpojax.data.records import DataError
from dpojax.watchdog import beat

GAIN = 0.005  # share of the time that one more bucket must save to be worth its compilation
DOUBLING = 0.03  # share of the time that twice the memory of activations must save
SAMPLED = 512  # examples in the batches by which buckets are priced
# Row lengths to try, as multiples of the longest example's.
SHORT = tuple(k / 16 for k in range(1, 16))
LONG = tuple(k / 8 for k in (*range(8, 25), 32))


class Bucket(NamedTuple):
    """A static size of a micro-batch: rows, columns of each row, scored tokens of each row."""

    rows: int
    length: int
    scored: int


@jax.tree_util.register_static
class Buckets(tuple[Bucket, ...]):
    """The buckets of a batch's micro-batches, the cheapest first; () is the largest one alone.

    They are part of the tree structure, not of the data: programs are compiled for them.
    """


class Costs(NamedTuple):
    """The relative costs by which buckets are compared.

    The unit of time is one token's matrix products with the weights of the layers.

    Attributes:
      attention: row length, in tokens, at which attention takes as long as the rest of the layer.
      head: time of a scored token's logits.
      overhead: time of a micro-batch besides its tokens, for adding up gradients.
      step: row lengths are multiples of it.
      gradient: memory of one gradient, in units of one token's activations. A batch of several
        micro-batches holds two gradients at once.
    """

    attention: float = 4096
    head: float = 0.3
    overhead: float = 64
    step: int = 32
    gradient: float = 0

    def of(self, bucket: Bucket) -> float:
        """Time of a micro-batch that is computed in `bucket`."""
        columns = bucket.length * (1 + bucket.length / self.attention)
        return bucket.rows * (columns + self.head * bucket.scored) + self.overhead


class Shape(NamedTuple):
    """The static sizes of a batch: micro-batches M, rows R in each, T, S, E and K as in `Rows`.

    `buckets` are () or end with the whole of a micro-batch. `costs` decide how a batch is packed.
    """

    micro_batches: int
    rows: int
    length: int
    scored: int
    examples: int
    responses: int
    buckets: Buckets = Buckets()
    costs: Costs = Costs()


USUAL = Costs()


def size_of(example: Example, *, score_prompt: bool = False) -> Size:
    """Tokens and scored tokens of `example` in a row."""
    prompt, responses = len(example.prompt), sum(map(len, example.responses))
    scored = responses
    if example.scored is not None:
        scored = sum(int(np.count_nonzero(mask)) for mask in example.scored)
    return Size(prompt + responses, scored + prompt - 1 if score_prompt else scored)


def pack(sizes: Sequence[Size], shape: Shape) -> list[list[list[int]]]:
    """Distribute the examples of a batch over micro-batches and rows, for the least time.

    Several packings are priced: for each row length of the buckets, rows are filled up to that
    length (a row of one longer example is longer), by `first_fit` and by `best_fill`; and the last
    micro-batch may be levelled. The fullest row comes first.

    Returns:
      Micro-batches of at most `shape.rows` rows, each a list of indices.

    Raises:
      ValueError: `shape` is inconsistent, or an example fits no row.
    """
    whole, rows_at_once = Bucket(shape.rows, shape.length, shape.scored), shape.rows
    buckets = shape.buckets or (whole,)
    if buckets[-1] != whole:
        raise ValueError(f"the last bucket has to be the whole of a micro-batch: {shape}")
    capacities, packings = _capacities(buckets), []
    for i in range(len(capacities)):
        plain, filled = (
            _fullest_first(fill(sizes, *capacities[i:]), sizes) for fill in (first_fit, best_fill)
        )
        packings += [plain, filled, *_levelled(filled, sizes, buckets)]

    def time(rows: list[list[int]]) -> float:
        return _time(_needs(rows, sizes, rows_at_once), buckets, shape.costs)

    rows = min(packings, key=time)
    return [rows[i : i + rows_at_once] for i in range(0, len(rows), rows_at_once)]


def plan(
    examples: Sequence[Example],
    batches: Iterable[Sequence[int]],
    *,
    length: int | None = None,
    micro_rows: int | None = None,
    multiple: int = 1,
    score_prompt: bool = False,
    costs: Costs = USUAL,
    max_buckets: int = 4,
) -> Shape:
    """Choose one shape that holds every batch and takes little time.

    More rows in a micro-batch need more memory for activations, so they have to save enough time.

    Args:
      examples: the whole data set.
      batches: indices of the examples of each optimiser batch.
      length: most tokens of a row; None tries a few.
      micro_rows: most rows of a micro-batch; None tries a few. Where a batch needs more rows, its
        gradient is accumulated over several micro-batches. Empty ones are not computed.
      multiple: rows of a micro-batch are rounded up to a multiple of this (row shards of the mesh).
      score_prompt: whether prompt tokens are scored as well.
      costs: relative times and memory.
      max_buckets: most buckets; each one is compiled.

    Raises:
      DataError: an example is longer than `length`.
      ValueError: `micro_rows` is not a multiple of `multiple`.
    """
    sizes = _sizes(examples, score_prompt)
    longest = max(range(len(sizes)), key=lambda i: sizes[i].tokens)
    if length is not None and sizes[longest].tokens > length:
        raise DataError(
            f"{examples[longest].id}: prompt and responses have {sizes[longest].tokens} tokens, "
            f"but a row has {length}; raise row_length, or lower tokens.max_length"
        )
    if micro_rows and micro_rows % multiple:
        raise ValueError(
            f"micro-batches of {micro_rows} rows cannot be spread over {multiple} row shards (mesh "
            f"data x fsdp); make micro_rows a multiple of {multiple}"
        )
    batch_sizes = [[sizes[i] for i in batch] for batch in batches]
    search = _Search(sizes, batch_sizes, multiple, costs)
    buckets = search.best(length, micro_rows, max_buckets)
    whole = buckets[-1]
    shape = Shape(1, *whole, 1, max(len(e.responses) for e in examples), buckets, costs)
    micro_batches = in_row = 0
    for batch in batch_sizes:
        packed = pack(batch, shape)
        micro_batches = max(micro_batches, len(packed))
        in_row = max(in_row, *(len(row) for rows in packed for row in rows))
    # With a single micro-batch XLA would compute all buckets: it moves what does not change out of
    # the loop. A second, empty micro-batch prevents that.
    fewest = 2 if len(buckets) > 1 else 1
    return shape._replace(
        micro_batches=_coarse(max(fewest, micro_batches)),
        examples=_coarse(in_row),
        buckets=buckets if len(buckets) > 1 else Buckets(),
    )


def _sizes(examples: Sequence[Example], score_prompt: bool) -> list[Size]:
    """The size of every example; equal ones are one object, as there may be millions."""
    known: dict[Size, Size] = {}
    sizes = []
    for example in examples:
        size = size_of(example, score_prompt=score_prompt)
        sizes.append(known.setdefault(size, size))
        beat()
    return sizes


class _Priced(NamedTuple):
    cost: float
    buckets: Buckets


class _Search:
    """Searches for the buckets in which a sample of the batches costs the least."""

    def __init__(
        self, sizes: list[Size], batches: list[list[Size]], multiple: int, costs: Costs
    ) -> None:
        self.sizes, self.multiple, self.costs = sizes, multiple, costs
        largest = max(batches, key=tokens_of)
        count = max(4, SAMPLED // max(1, len(batches[0])))
        self.batches = [largest, *batches[: count - 1]]
        self.longest = _round_up(max(size.tokens for size in sizes), costs.step)
        self.share = sum(s.scored for s in sizes) / sum(s.tokens for s in sizes)
        # Caches: rows of each batch by capacities, and the result of `_needed`.
        self.filled: dict[tuple, list[list[list[int]]]] = {}
        self.needs: dict[tuple, tuple[np.ndarray, np.ndarray, int]] = {}

    def best(self, length: int | None, micro_rows: int | None, max_buckets: int) -> Buckets:
        """The best buckets over all numbers of rows.

        The search goes from few rows to many, and stops where more rows no longer pay.
        """
        row_counts = [micro_rows] if micro_rows else self._row_counts(length or self.longest)
        tried: list[_Priced] = []
        while row_counts:
            cost, buckets = self._with_rows(row_counts.pop(0), length, max_buckets)
            doublings = math.log2(self._memory(buckets))
            tried.append(_Priced(cost * (1 + DOUBLING) ** doublings, buckets))
            if len(tried) > 1 and tried[-1].cost >= tried[-2].cost:
                row_counts = row_counts[-1:]  # all rows at once: that needs no second gradient
        costs = [each.cost for each in tried]
        return tried[costs.index(min(costs))].buckets

    def _with_rows(self, rows: int, length: int | None, max_buckets: int) -> _Priced:
        """The best buckets for micro-batches of at most `rows` rows."""
        buckets = self._whole(length, rows)
        tried = [_Priced(self.cost(buckets), buckets)]
        for _ in range(max_buckets - 1):  # all of them: two may save what neither saves alone
            larger = [self._sorted({*buckets, bucket}) for bucket in self._shorter(buckets[-1])]
            best = min((_Priced(self.cost(each), each) for each in larger), default=tried[-1])
            buckets = best.buckets
            tried.append(best)
        penalised = [each.cost / (1 - GAIN) ** len(each.buckets) for each in tried]
        return tried[penalised.index(min(penalised))]

    def _memory(self, buckets: Buckets) -> float:
        """Memory besides the state and one gradient, in units of a token's activations."""
        whole = buckets[-1]
        room = Size(whole.length, whole.scored)
        rows = max(len(first_fit(batch, room)) for batch in self.batches)
        single = len(buckets) == 1 and rows <= whole.rows  # one micro-batch, see `plan`
        return whole.rows * whole.length + (0 if single else self.costs.gradient)

    def cost(self, buckets: Buckets) -> float:
        """Time of all sampled batches, each in its cheapest packing.

        Packings are those of `best_fill`, as they are or levelled. `pack` also tries `first_fit`,
        so the real time may be lower.
        """
        capacities, heights = _capacities(buckets), tuple(_heights(buckets))
        times = []
        for i in range(len(capacities)):
            needs, owners, ways = self._needed(buckets, tuple(capacities[i:]), heights)
            each = np.array([*map(self.costs.of, buckets), np.inf])[bucket_of(needs, buckets)]
            count = len(self.batches) * ways
            times.append(np.bincount(owners, each, count).reshape(-1, ways).min(-1))
        return float(np.min(times, axis=0).sum())

    def _needed(
        self, buckets: Buckets, capacities: tuple[Size, ...], heights: tuple[int, ...]
    ) -> tuple[np.ndarray, np.ndarray, int]:
        """What the micro-batches of all sampled batches need, in every packing.

        Returns:
          Rows, tokens and scored tokens of each micro-batch, [M, 3]; the number (batch * packings +
          packing) that it belongs to, [M]; and the number of packings of a batch.
        """
        key = buckets[-1].rows, heights, capacities
        if key not in self.needs:
            if capacities not in self.filled:
                self.filled[capacities] = [
                    _fullest_first(best_fill(sizes, *capacities), sizes) for sizes in self.batches
                ]
            needs = [
                _needs(rows, sizes, buckets[-1].rows)
                for filled, sizes in zip(self.filled[capacities], self.batches)
                for rows in (filled, *_levelled(filled, sizes, buckets))
            ]
            owners = np.repeat(np.arange(len(needs)), list(map(len, needs)))
            self.needs[key] = np.concatenate(needs), owners, len(needs) // len(self.batches)
        return self.needs[key]

    def _whole(self, length: int | None, rows: int) -> Buckets:
        """The cheapest single bucket that holds every example."""
        lengths = [length] if length else map(self._length, LONG)
        most = max(size.scored for size in self.sizes)
        candidates = [
            Buckets([Bucket(rows, n, min(n, max(_round_up(most, 8), self._scored(n, 1.05))))])
            for n in dict.fromkeys(lengths)
        ]
        return min(candidates, key=self.cost)

    def _shorter(self, whole: Bucket) -> list[Bucket]:
        """Buckets that are cheaper than the whole, to try beside it."""
        rows = {_round_up(max(1, whole.rows // k), self.multiple) for k in (1, 2, 4)}
        lengths = {*map(self._length, SHORT + LONG), whole.length}
        candidates = {
            Bucket(r, n, min(self._scored(n, slack), whole.scored))
            for r in rows
            for n in lengths
            for slack in (1.05, 1.4)
            if n <= whole.length
        }
        return sorted(each for each in candidates if self.costs.of(each) < self.costs.of(whole))

    def _row_counts(self, length: int) -> list[int]:
        """Numbers of rows to try: powers of 2, the usual batch's, and the largest batch's."""
        counts = sorted(len(first_fit(batch, Size(length, length))) for batch in self.batches)
        usual, most = (_round_up(n, self.multiple) for n in (counts[len(counts) // 2], counts[-1]))
        powers = [self.multiple * 2**i for i in range(20)]
        return sorted({usual, most, *(n for n in powers if n < most)})

    def _length(self, factor: float) -> int:
        return _round_up(int(factor * self.longest), self.costs.step)

    def _scored(self, length: int, slack: float) -> int:
        """The usual scored tokens of a row, times `slack`: the LM head computes little padding."""
        return min(length, _round_up(int(slack * self.share * length), 8))

    def _sorted(self, buckets: Iterable[Bucket]) -> Buckets:
        return Buckets(sorted(buckets, key=self.costs.of))


def bucket_of(needs: np.ndarray, buckets: Sequence[Bucket]) -> np.ndarray:
    """The index of the first bucket that holds each micro-batch, int [M]; len(buckets) if none.

    Args:
      needs: rows, columns and scored tokens of every micro-batch, [M, 3], NumPy or JAX.
      buckets: the cheapest first.
    """
    too_small = (needs[:, None, :] > np.array(buckets)[None]).any(-1)
    return too_small.cumprod(-1).sum(-1)


def _capacities(buckets: Sequence[Bucket]) -> list[Size]:
    """The different sizes of a row in the buckets, the smallest first."""
    return sorted({Size(bucket.length, bucket.scored) for bucket in buckets})


def _heights(buckets: Sequence[Bucket]) -> list[int]:
    """The different numbers of rows in the buckets, without 1: a single row cannot be levelled."""
    return sorted({bucket.rows for bucket in buckets} - {1})


def _levelled(
    rows: list[list[int]], sizes: Sequence[Size], buckets: Sequence[Bucket]
) -> list[list[list[int]]]:
    """The packing `rows` with its last micro-batch levelled, once for each height of the buckets.

    A bucket computes all its rows, so the last examples may as well lie in many short rows.
    """
    rows_at_once = buckets[-1].rows
    full = max(0, len(rows) - 1) // rows_at_once * rows_at_once
    last = [i for row in rows[full:] for i in row]
    packings = []
    for height in _heights(buckets):
        spread = level([sizes[i] for i in last], height)
        levelled = [[last[i] for i in row] for row in spread]
        packings.append([*rows[:full], *_fullest_first(levelled, sizes)])
    return packings


def _fullest_first(rows: list[list[int]], sizes: Sequence[Size]) -> list[list[int]]:
    return sorted(rows, key=lambda row: -tokens_of(sizes[i] for i in row))


def _needs(rows: list[list[int]], sizes: Sequence[Size], rows_at_once: int) -> np.ndarray:
    """Rows, tokens and scored tokens of each micro-batch of `rows_at_once` rows in turn, [M, 3]."""
    needs = []
    for start in range(0, len(rows), rows_at_once):
        group = rows[start : start + rows_at_once]
        tokens = max(sum(sizes[i].tokens for i in row) for row in group)
        scored = max(sum(sizes[i].scored for i in row) for row in group)
        needs.append([len(group), tokens, scored])
    return np.array(needs)


def _time(needs: np.ndarray, buckets: Sequence[Bucket], costs: Costs) -> float:
    """Time of micro-batches [M, 3], each in the first bucket that holds it; infinite if none."""
    times = np.array([*map(costs.of, buckets), np.inf])
    return float(times[bucket_of(needs, buckets)].sum())


def _coarse(n: int) -> int:
    """Round up, so that runs with other seeds often have the same shape and share programs.

    Micro-batches beyond the need are not computed, and further examples of a row cost a few sums.
    """
    return n if n <= 4 else _round_up(n, 4)


def _round_up(n: int, multiple: int) -> int:
    return -(-n // multiple) * multiple
