"""How examples share rows, rows share micro-batches, and at which sizes these are computed.

A row holds several examples; a micro-batch holds several rows, the fullest first. Every
micro-batch is computed at the cheapest of a handful of static sizes that holds it, so that neither
one long example nor the last, half-empty row sets what all others cost.
"""

from __future__ import annotations

import heapq
import itertools
import math
from collections.abc import Iterable, Sequence
from typing import NamedTuple

import jax
import numpy as np

from dpojax.data.records import DataError
from dpojax.data.tokenise import Example

GAIN = 0.005  # of the time that another size must save to be worth its compilation
DOUBLING = 0.03  # of the time that twice the tokens at once, with twice the activations, must save
SAMPLED = 512  # examples of batches by which sizes are chosen
SHORT = tuple(k / 16 for k in range(1, 16))  # lengths that are tried, in the longest example's
LONG = tuple(k / 8 for k in (*range(8, 25), 32))
TRIES = 8  # fullest sums of tokens whose scored tokens are looked at


class Size(NamedTuple):
    """What one example takes of a row."""

    tokens: int
    scored: int


class Bucket(NamedTuple):
    """A size at which a micro-batch may be computed: its first rows, columns and scored tokens."""

    rows: int
    length: int
    scored: int


@jax.tree_util.register_static
class Buckets(tuple[Bucket, ...]):
    """The sizes at which micro-batches may be computed, the cheapest first; () is the whole only.

    Part of the tree structure, not of the data: programs are compiled for it.
    """


class Costs(NamedTuple):
    """What a micro-batch costs besides its tokens' products with the weights of the layers.

    attention: at how many tokens a row's attention costs as much as all else of its layer.
    head: the time of a scored token's logits, in that of a token's products.
    overhead: the time of a micro-batch however small, in tokens: gradients are added up.
    step: lengths are multiples of it.
    gradient: the memory of a gradient, in that of a token's activations; a batch of several
      micro-batches holds two.
    """

    attention: float = 4096
    head: float = 0.3
    overhead: float = 64
    step: int = 32
    gradient: float = 0

    def of(self, bucket: Bucket) -> float:
        columns = bucket.length * (1 + bucket.length / self.attention)
        return bucket.rows * (columns + self.head * bucket.scored) + self.overhead


class Shape(NamedTuple):
    """The static sizes of a batch: micro-batches M, rows R in each, T, S, E and K as in `Rows`.

    `buckets` end with the whole of a micro-batch, or are (); `costs` decide how a batch is packed.
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
    """Columns and scored tokens that `example` needs."""
    scored = sum(map(len, example.responses)) + (len(example.prompt) - 1) * score_prompt
    return Size(len(example.prompt) + sum(map(len, example.responses)), scored)


def first_fit(sizes: Sequence[Size], *capacities: Size) -> list[list[int]]:
    """Rows as lists of indices: the largest example first, each into the first row with room.

    A new row has the first of the `capacities` that holds its example. Deterministic: equal sizes
    keep their order.

    Raises:
      ValueError: no capacity holds an example.
    """
    rows: list[list[int]] = []
    room: list[list[int]] = []
    for index in sorted(range(len(sizes)), key=lambda i: (-sizes[i].tokens, i)):
        tokens, scored = sizes[index]
        fitting = (i for i, left in enumerate(room) if tokens <= left[0] and scored <= left[1])
        row = next(fitting, len(rows))
        if row == len(rows):
            fits = [c for c in capacities if tokens <= c.tokens and scored <= c.scored]
            if not fits:
                raise ValueError(f"an example of {sizes[index]} fits no row of {capacities}")
            rows.append([])
            room.append(list(fits[0]))
        rows[row].append(index)
        room[row][0] -= tokens
        room[row][1] -= scored
    return rows


def best_fill(sizes: Sequence[Size], *capacities: Size) -> list[list[int]]:
    """Rows as `first_fit`'s, each of the largest example left and what best fills up its row.

    Raises:
      ValueError: no capacity holds an example.
    """
    left = sorted(range(len(sizes)), key=lambda i: (sizes[i].tokens, -i))
    rows = []
    while left:
        first = left.pop()
        tokens, scored = sizes[first]
        fits = [c for c in capacities if tokens <= c.tokens and scored <= c.scored]
        if not fits:
            raise ValueError(f"an example of {sizes[first]} fits no row of {capacities}")
        room = Size(fits[0].tokens - tokens, fits[0].scored - scored)
        more = _fullest([i for i in left if _holds(room, sizes[i])], sizes, room)
        rows.append([first, *more])
        left = [i for i in left if i not in more]
    return rows


def level(sizes: Sequence[Size], rows: int) -> list[list[int]]:
    """At most `rows` rows of about the same length: the largest first, to the shortest row."""
    shared: list[list[int]] = [[] for _ in range(rows)]
    shortest = [(0, row) for row in range(rows)]
    for index in sorted(range(len(sizes)), key=lambda i: (-sizes[i].tokens, i)):
        tokens, row = shortest[0]
        shared[row].append(index)
        heapq.heapreplace(shortest, (tokens + sizes[index].tokens, row))
    return [row for row in shared if row]


def pack(sizes: Sequence[Size], shape: Shape) -> list[list[list[int]]]:
    """Micro-batches of at most `shape.rows` rows of indices, for the least time.

    Rows are filled up to each of the lengths in turn, and further only where an example is longer,
    the fullest row first; what computes least is taken.
    """
    whole, most = Bucket(shape.rows, shape.length, shape.scored), shape.rows
    buckets = shape.buckets or (whole,)
    if buckets[-1] != whole:
        raise ValueError(f"the last of the sizes has to be the whole of a micro-batch: {shape}")
    time = lambda rows: _time(_needs(rows, sizes, most), buckets, shape.costs)
    capacities, tried = _capacities(buckets), []
    for i in range(len(capacities)):
        plain, filled = (
            _sorted(fill(sizes, *capacities[i:]), sizes) for fill in (first_fit, best_fill)
        )
        tried += [plain, filled, *_levelled(filled, sizes, buckets)]
    rows = min(tried, key=time)
    return [rows[i : i + most] for i in range(0, len(rows), most)]


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
    """The one shape into which every batch fits, chosen from the data for little time.

    Among numbers of rows, a larger one has to save enough: its activations are larger, too.

    Args:
      examples: the whole data set.
      batches: indices of the examples of each optimiser batch.
      length: most tokens of a row; None tries a few.
      micro_rows: most rows of a micro-batch; None tries a few. An empty one is not computed.
      multiple: rows of a micro-batch are rounded up to a multiple of this (row shards of the mesh).
      score_prompt: whether prompt tokens are scored as well.
      max_buckets: at how many sizes micro-batches may be computed; each is compiled.

    Raises:
      DataError: an example is longer than `length`.
      ValueError: `micro_rows` is not a multiple of `multiple`.
    """
    sizes = [size_of(example, score_prompt=score_prompt) for example in examples]
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
    batches = [[sizes[i] for i in batch] for batch in batches]
    search = _Search(sizes, batches, multiple, costs)
    buckets = search.best(length, micro_rows, max_buckets)
    whole = buckets[-1]
    shape = Shape(1, *whole, 1, max(len(e.responses) for e in examples), buckets, costs)
    packed = [pack(batch, shape) for batch in batches]
    # Of a single micro-batch XLA would compute all sizes: what is the same in every turn of a loop
    # it takes out of the loop. With a second one, empty, it cannot.
    fewest = 2 if len(buckets) > 1 else 1
    in_row = max(len(row) for parts in packed for part in parts for row in part)
    return shape._replace(
        micro_batches=_coarse(max(fewest, *map(len, packed))),
        examples=_coarse(in_row),
        buckets=buckets if len(buckets) > 1 else Buckets(),
    )


class _Search:
    """Sizes of micro-batches by what some of the batches cost with them."""

    def __init__(self, sizes, batches, multiple, costs):
        self.sizes, self.multiple, self.costs = sizes, multiple, costs
        largest = max(batches, key=lambda batch: sum(size.tokens for size in batch))
        count = max(4, SAMPLED // max(1, len(batches[0])))
        self.batches = [largest, *batches[: count - 1]]
        self.longest = _round_up(max(size.tokens for size in sizes), costs.step)
        self.share = sum(s.scored for s in sizes) / sum(s.tokens for s in sizes)
        self.filled: dict[tuple, list[list[list[int]]]] = {}
        self.needs: dict[tuple, tuple[np.ndarray, np.ndarray, int]] = {}

    def best(self, length: int | None, micro_rows: int | None, max_buckets: int) -> Buckets:
        """Buckets of micro-batches of few tokens, unless more at once save enough time."""
        counts = [micro_rows] if micro_rows else self._row_counts(length or self.longest)
        found: list[tuple[float, Buckets]] = []
        while counts:
            cost, buckets = self._with_rows(counts.pop(0), length, max_buckets)
            found.append((cost * (1 + DOUBLING) ** math.log2(self._at_once(buckets)), buckets))
            if len(found) > 1 and found[-1][0] >= found[-2][0]:
                counts = counts[-1:]  # with all rows at once there is no second gradient
        return min(found, key=lambda each: each[0])[1]

    def _with_rows(self, rows: int, length: int | None, max_buckets: int) -> tuple[float, Buckets]:
        """Buckets of micro-batches of so many rows at most, and what they cost."""
        buckets = self._whole(length, rows)
        tried = [(self.cost(buckets), buckets)]
        for _ in range(max_buckets - 1):  # two sizes may save what neither does alone
            more = [self._sorted({*buckets, bucket}) for bucket in self._shorter(buckets[-1])]
            cost, buckets = min(((self.cost(each), each) for each in more), default=tried[-1])
            tried.append((cost, buckets))
        return min(tried, key=lambda each: each[0] / (1 - GAIN) ** len(each[1]))

    def _at_once(self, buckets: Buckets) -> float:
        """Memory besides the state and a gradient, in that of a token's activations."""
        whole = buckets[-1]
        room = Size(whole.length, whole.scored)
        rows = max(len(first_fit(batch, room)) for batch in self.batches)
        single = len(buckets) == 1 and rows <= whole.rows  # see `plan`
        return whole.rows * whole.length + (0 if single else self.costs.gradient)

    def cost(self, buckets: Buckets) -> float:
        """Of all sampled batches, each in the cheapest of the rows that `best_fill` fills, as they
        are or levelled. `pack` tries those of `first_fit` too, and may find cheaper ones."""
        capacities, heights = _capacities(buckets), tuple(_heights(buckets))
        times = []
        for i in range(len(capacities)):
            needs, owners, ways = self._needed(buckets, tuple(capacities[i:]), heights)
            each = np.array([*map(self.costs.of, buckets), np.inf])[bucket_of(needs, buckets)]
            count = len(self.batches) * ways
            times.append(np.bincount(owners, each, count).reshape(-1, ways).min(-1))
        return float(np.min(times, axis=0).sum())

    def _needed(self, buckets: Buckets, capacities: tuple[Size, ...], heights: tuple[int, ...]):
        """What all micro-batches need, [M, 3], of which batch and filling, [M], and of how many."""
        key = buckets[-1].rows, heights, capacities
        if key not in self.needs:
            if capacities not in self.filled:
                self.filled[capacities] = [
                    _sorted(best_fill(sizes, *capacities), sizes) for sizes in self.batches
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
        """The size that holds all, whose length computes least."""
        lengths = [length] if length else map(self._length, LONG)
        most = max(size.scored for size in self.sizes)
        wholes = [
            Buckets([Bucket(rows, n, min(n, max(_round_up(most, 8), self._scored(n, 1.05))))])
            for n in dict.fromkeys(lengths)
        ]
        return min(wholes, key=self.cost)

    def _shorter(self, whole: Bucket) -> list[Bucket]:
        """Sizes within the whole that may be worth while."""
        rows = {_round_up(max(1, whole.rows // k), self.multiple) for k in (1, 2, 4)}
        lengths = {*map(self._length, SHORT + LONG), whole.length}
        made = {
            Bucket(r, n, min(self._scored(n, slack), whole.scored))
            for r in rows
            for n in lengths
            for slack in (1.05, 1.4)
            if n <= whole.length
        }
        return sorted(bucket for bucket in made if self.costs.of(bucket) < self.costs.of(whole))

    def _row_counts(self, length: int) -> list[int]:
        """Some numbers of rows, up to all that the largest batch needs."""
        counts = sorted(len(first_fit(batch, Size(length, length))) for batch in self.batches)
        usual, most = (_round_up(n, self.multiple) for n in (counts[len(counts) // 2], counts[-1]))
        powers = itertools.takewhile(lambda n: n < most, (self.multiple * 2**i for i in range(20)))
        return sorted({usual, most, *powers})

    def _length(self, factor: float) -> int:
        return _round_up(int(factor * self.longest), self.costs.step)

    def _scored(self, length: int, slack: float) -> int:
        """A little more than a row's share: the LM head computes few paddings."""
        return min(length, _round_up(int(slack * self.share * length), 8))

    def _sorted(self, buckets: Iterable[Bucket]) -> Buckets:
        return Buckets(sorted(buckets, key=self.costs.of))


def bucket_of(needs: np.ndarray, buckets: Sequence[Bucket]) -> np.ndarray:
    """The first of `buckets` that holds each micro-batch, int [M]; len(buckets) where none does.

    Args:
      needs: rows, columns and scored tokens of every micro-batch, [M, 3], of NumPy or JAX.
    """
    too_small = (needs[:, None, :] > np.array(buckets)[None]).any(-1)
    return too_small.cumprod(-1).sum(-1)


def _capacities(buckets: Sequence[Bucket]) -> list[Size]:
    return sorted({Size(bucket.length, bucket.scored) for bucket in buckets})


def _heights(buckets: Sequence[Bucket]) -> list[int]:
    """Numbers of rows, without one: a single row cannot be levelled."""
    return sorted({bucket.rows for bucket in buckets} - {1})


def _levelled(
    rows: list[list[int]], sizes: Sequence[Size], buckets: Sequence[Bucket]
) -> list[list[list[int]]]:
    """The examples of the last micro-batch over all rows that are computed anyway: shorter ones."""
    most = buckets[-1].rows
    full = max(0, len(rows) - 1) // most * most
    last = [i for row in rows[full:] for i in row]
    shared = (level([sizes[i] for i in last], height) for height in _heights(buckets))
    return [
        [*rows[:full], *_sorted([[last[i] for i in row] for row in each], sizes)] for each in shared
    ]


def _sorted(rows: list[list[int]], sizes: Sequence[Size]) -> list[list[int]]:
    return sorted(rows, key=lambda row: -sum(sizes[i].tokens for i in row))


def _holds(room: Size, size: Size) -> bool:
    return size.tokens <= room.tokens and size.scored <= room.scored


def _fullest(items: Sequence[int], sizes: Sequence[Size], room: Size) -> list[int]:
    """Of `items`, smallest first, those whose tokens fill the room best, of the large ones first.

    Sums of tokens that can be reached are bits of an integer. Of the fullest sums the first is
    taken whose scored tokens, of one choice of items, fit as well; if none does, the largest items
    that fit.
    """
    reached = [1]
    for item in items:
        reached.append((reached[-1] | reached[-1] << sizes[item].tokens) & ((2 << room.tokens) - 1))
    sums = reached[-1]
    for _ in range(min(TRIES, sums.bit_count() - 1)):
        left = sums.bit_length() - 1
        sums ^= 1 << left
        chosen = []
        for item, before in zip(reversed(items), reversed(reached[:-1])):
            rest = left - sizes[item].tokens
            if rest >= 0 and before >> rest & 1:
                chosen.append(item)
                left = rest
        if sum(sizes[item].scored for item in chosen) <= room.scored:
            return chosen
    chosen = []
    for item in reversed(items):
        if _holds(room, sizes[item]):
            chosen.append(item)
            room = Size(room.tokens - sizes[item].tokens, room.scored - sizes[item].scored)
    return chosen


def _needs(rows: list[list[int]], sizes: Sequence[Size], most: int) -> np.ndarray:
    """Rows, tokens and scored tokens of micro-batches of `most` rows in turn, [M, 3]."""
    taken = [[sum(sizes[i][j] for i in row) for j in (0, 1)] for row in rows]
    groups = [taken[i : i + most] for i in range(0, len(taken), most)]
    return np.array([[len(group), *map(max, zip(*group))] for group in groups])


def _time(needs: np.ndarray, buckets: Sequence[Bucket], costs: Costs) -> float:
    """Of micro-batches, each at the first size that holds it; infinite if none does."""
    times = np.array([*map(costs.of, buckets), np.inf])
    return float(times[bucket_of(needs, buckets)].sum())


def _coarse(n: int) -> int:
    """Rounded up: runs with other seeds then more often have the same shape and share programs.

    What is too much is not computed (micro-batches) or takes a few sums (examples of a row).
    """
    return n if n <= 4 else _round_up(n, 4)


def _round_up(n: int, multiple: int) -> int:
    return -(-n // multiple) * multiple
