"""Algorithms that fill rows with examples: bin packing in two sizes, tokens and scored tokens."""

from __future__ import annotations

import heapq
from collections.abc import Iterable, Sequence
from typing import NamedTuple

TRIES = 8  # largest sums of tokens for which `_fullest` checks the scored tokens


class Size(NamedTuple):
    """Tokens of one example, or room for tokens in a row."""

    tokens: int
    scored: int  # of these, how many have a log-prob in the loss


def first_fit(sizes: Sequence[Size], *capacities: Size) -> list[list[int]]:
    """Pack examples into rows: the largest example first, each into the first row with room.

    The first of the `capacities` that holds an example is the capacity of the row that it opens.
    Deterministic: examples of equal size stay in order.

    Returns:
      Indices of the examples in each row.

    Raises:
      ValueError: no capacity holds an example.
    """
    rows: list[list[int]] = []
    room: list[list[int]] = []  # tokens and scored tokens left in each row
    for index in largest_first(sizes):
        tokens, scored = sizes[index]
        fitting = (i for i, (t, s) in enumerate(room) if tokens <= t and scored <= s)
        row = next(fitting, len(rows))
        if row == len(rows):
            rows.append([])
            room.append(list(_first_capacity(sizes[index], capacities)))
        rows[row].append(index)
        room[row][0] -= tokens
        room[row][1] -= scored
    return rows


def best_fill(sizes: Sequence[Size], *capacities: Size) -> list[list[int]]:
    """Pack examples into rows: the largest one left, and the others that fill its row best.

    Arguments, result and errors are those of `first_fit`.
    """
    remaining = largest_first(sizes)[::-1]
    rows = []
    while remaining:
        largest = remaining.pop()
        capacity, size = _first_capacity(sizes[largest], capacities), sizes[largest]
        room = Size(capacity.tokens - size.tokens, capacity.scored - size.scored)
        more = _fullest([i for i in remaining if _holds(room, sizes[i])], sizes, room)
        rows.append([largest, *more])
        remaining = [i for i in remaining if i not in more]
    return rows


def level(sizes: Sequence[Size], rows: int) -> list[list[int]]:
    """Spread examples over at most `rows` rows of about the same length.

    The largest example comes first, and each goes into the row that is the shortest by then.
    """
    spread: list[list[int]] = [[] for _ in range(rows)]
    shortest = [(0, row) for row in range(rows)]  # a heap of (tokens, row)
    for index in largest_first(sizes):
        tokens, row = shortest[0]
        spread[row].append(index)
        heapq.heapreplace(shortest, (tokens + sizes[index].tokens, row))
    return [row for row in spread if row]


def largest_first(sizes: Sequence[Size]) -> list[int]:
    """Indices of the sizes by falling number of tokens; equal ones stay in order."""
    return sorted(range(len(sizes)), key=lambda i: -sizes[i].tokens)


def tokens_of(sizes: Iterable[Size]) -> int:
    """The number of tokens of several examples together."""
    return sum(size.tokens for size in sizes)


def _first_capacity(size: Size, capacities: Sequence[Size]) -> Size:
    """The first of the capacities that holds an example."""
    for capacity in capacities:
        if _holds(capacity, size):
            return capacity
    raise ValueError(f"an example of {size} fits no row of {tuple(capacities)}")


def _holds(room: Size, size: Size) -> bool:
    return size.tokens <= room.tokens and size.scored <= room.scored


def _fullest(items: Sequence[int], sizes: Sequence[Size], room: Size) -> list[int]:
    """Choose the items whose tokens fill the room best, large ones before small ones.

    A subset sum: the sums of tokens that can be reached are the bits of one integer. From the
    largest sum down, one choice of items is made for each sum, and taken if its scored tokens fit
    as well. If none of `TRIES` does, the largest items that fit are taken.

    Args:
      items: indices into `sizes`, the smallest first.
      sizes: of all examples.
      room: what is left of the row.
    """
    reached = [1]  # reached[k]: sums of some of the first k items
    for item in items:
        reached.append((reached[-1] | reached[-1] << sizes[item].tokens) & ((2 << room.tokens) - 1))
    sums = reached[-1]
    for _ in range(min(TRIES, sums.bit_count() - 1)):
        missing = sums.bit_length() - 1
        sums ^= 1 << missing
        chosen = []
        for item, before in zip(reversed(items), reversed(reached[:-1])):
            rest = missing - sizes[item].tokens
            if rest >= 0 and before >> rest & 1:
                chosen.append(item)
                missing = rest
        if sum(sizes[item].scored for item in chosen) <= room.scored:
            return chosen
    chosen = []
    for item in reversed(items):
        if _holds(room, sizes[item]):
            chosen.append(item)
            room = Size(room.tokens - sizes[item].tokens, room.scored - sizes[item].scored)
    return chosen
