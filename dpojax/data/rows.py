"""Rows: examples of one prompt and its K responses, packed into arrays of fixed shape.

A row of tokens is `[prompt | y1 | y2 | ... | yK]`, several such examples one after another. The
prompt is computed once for all its responses, and nothing is padded per pair. A token attends to
what stands before it in its own segment on the prompt or on its own branch; the positions of every
branch go on from the prompt's end.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import NamedTuple

import numpy as np

from dpojax.data.records import DataError
from dpojax.data.tokenise import Example


class Rows(NamedTuple):
    """One batch. Every array may have leading dimensions (micro-batches) before [R, ...].

    A scored token is predicted at column `source`; its log-prob counts for the response slot
    `response` = (example in the row) * K + (index of the response), best response first.
    """

    tokens: np.ndarray  # [R, T] int32
    positions: np.ndarray  # [R, T] int32, from 0 in every example
    segment: np.ndarray  # [R, T] int32, which example of the row, from 1; 0 is padding
    branch: np.ndarray  # [R, T] int32, 0 on the prompt, k on the k-th response
    source: np.ndarray  # [R, S] int32, the column whose hidden state predicts the token
    target: np.ndarray  # [R, S] int32, the token that is predicted
    response: np.ndarray  # [R, S] int32, its response slot in [0, E * K); -1 is padding
    present: np.ndarray  # [R, E, K] bool, which responses exist
    example: np.ndarray  # [R, E] int32, index into the data set; -1 is none
    rank: np.ndarray  # [R, E, K] int32, how many are better; -1 if to another prompt; padding is 0
    scores: np.ndarray  # [R, E, K] float32, the data's own; 0 where unknown, and at padding
    desirable: np.ndarray  # [R, E] bool, false if labelled undesirable, and at padding
    reference: np.ndarray | None = None  # [R, S] float32, the reference's log-probs in nats
    category: np.ndarray | None = None  # [R, E] int32, the class of a text; 0 at padding


class Shape(NamedTuple):
    """The static sizes of a batch: micro-batches M, rows R in each, T, S, E and K as in `Rows`."""

    micro_batches: int
    rows: int
    length: int
    scored: int
    examples: int
    responses: int


class Size(NamedTuple):
    """What one example takes of a row."""

    tokens: int
    scored: int


def size_of(example: Example, *, score_prompt: bool = False) -> Size:
    """Columns and scored tokens that `example` needs."""
    scored = sum(map(len, example.responses)) + (len(example.prompt) - 1) * score_prompt
    return Size(len(example.prompt) + sum(map(len, example.responses)), scored)


def first_fit(sizes: Sequence[Size], length: int, scored: int) -> list[list[int]]:
    """Rows as lists of indices: the largest example first, each into the first row with room.

    Deterministic: equal sizes keep their order. A row holds at most `length` tokens, of which at
    most `scored` are scored.
    """
    rows: list[list[int]] = []
    room = np.zeros((len(sizes), 2), np.int64)
    for index in sorted(range(len(sizes)), key=lambda i: (-sizes[i].tokens, i)):
        need = np.array(sizes[index])
        fits = np.flatnonzero((room[: len(rows)] >= need).all(axis=1))
        row = int(fits[0]) if len(fits) else len(rows)
        if row == len(rows):
            rows.append([])
            room[row] = length, scored
        rows[row].append(index)
        room[row] -= need
    return rows


def plan(
    examples: Sequence[Example],
    batches: Iterable[Sequence[int]],
    *,
    length: int | None = None,
    micro_rows: int | None = None,
    multiple: int = 1,
    score_prompt: bool = False,
    attention: float = 4096,
) -> Shape:
    """The one shape into which every batch fits, chosen from the data.

    Args:
      examples: the whole data set.
      batches: indices of the examples of each optimiser batch.
      length: tokens of a row; None tries a few and takes the one that computes least.
      micro_rows: rows of a micro-batch; None takes the number that computes least: batches need
        different numbers of rows, and a micro-batch without any is not computed.
      multiple: rows of a micro-batch are rounded up to a multiple of this (row shards of the mesh).
      score_prompt: whether prompt tokens are scored as well.
      attention: at how many tokens a row's attention costs as much as all else of its layer.

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
    batches = [list(batch) for batch in batches]
    shortest = _round_up(sizes[longest].tokens, 32)
    lengths = (
        [length] if length else [shortest + 32 * i for i in range(0, 3 * shortest // 32 + 1, 2)]
    )
    rows = {n: _packings(sizes, batches[:32], n) for n in lengths}
    best = min(lengths, key=lambda n: _cost(rows[n][0], n, attention))
    packed, scored = _packings(sizes, batches, best)
    counts = np.array([len(rows_) for rows_ in packed])
    per_micro = micro_rows or _least_rows(counts, multiple)
    return Shape(
        micro_batches=-(-int(counts.max()) // per_micro),
        rows=per_micro,
        length=best,
        scored=scored,
        examples=max(len(row) for rows_ in packed for row in rows_),
        responses=max(len(example.responses) for example in examples),
    )


def collate(
    examples: Sequence[Example],
    indices: Sequence[int],
    shape: Shape,
    *,
    score_prompt: bool = False,
) -> Rows:
    """The examples at `indices` as one batch of `shape`, arrays [M, R, ...]; the rest is padding.

    Raises:
      ValueError: they do not fit (the shape was planned for other batches).
    """
    sizes = [size_of(examples[i], score_prompt=score_prompt) for i in indices]
    packed = first_fit(sizes, shape.length, shape.scored)
    if len(packed) > shape.micro_batches * shape.rows:
        raise ValueError(
            f"{len(packed)} rows do not fit {shape}; plan the shape with these batches"
        )
    rows = empty(shape)
    for r, members in enumerate(packed):
        place = (r // shape.rows, r % shape.rows)
        row = Rows(*(None if x is None else x[place] for x in rows))
        column = score = 0
        for e, member in enumerate(members):
            example = examples[indices[member]]
            row.example[e] = indices[member]
            _write(row, example, e, column, score, score_prompt)
            _write_judgement(row, example, e)
            column, score = column + sizes[member].tokens, score + sizes[member].scored
    return rows


def empty(shape: Shape) -> Rows:
    """A batch of padding."""
    batch = (shape.micro_batches, shape.rows)
    zeros = lambda *size, dtype=np.int32: np.zeros((*batch, *size), dtype)
    slots = (shape.examples, shape.responses)
    return Rows(
        *(zeros(shape.length) for _ in range(4)),
        *(zeros(shape.scored) for _ in range(2)),
        response=zeros(shape.scored) - 1,
        present=zeros(*slots, dtype=bool),
        example=zeros(shape.examples) - 1,
        rank=zeros(*slots),
        scores=zeros(*slots, dtype=np.float32),
        desirable=zeros(shape.examples, dtype=bool),
        category=zeros(shape.examples),
    )


def utilisation(rows: Rows) -> float:
    """Share of the computed columns, those of all micro-batches with any example, with a token."""
    used = np.asarray(rows.segment) > 0
    computed = used.any(axis=(1, 2)).sum() * used[0].size
    return float(used.sum() / max(1, computed))


def _write(row: Rows, example: Example, e: int, column: int, score: int, score_prompt: bool):
    """One example into row arrays [T], [S], ..., from the given column and scored token on."""
    prompt_end = column + len(example.prompt) - 1
    slots = row.present.shape[-1]
    for k, piece in enumerate((example.prompt, *example.responses)):
        at = slice(column, column + len(piece))
        row.tokens[at], row.segment[at], row.branch[at] = piece, e + 1, k
        row.positions[at] = np.arange(len(piece)) + (len(example.prompt) if k else 0)
        source = np.arange(column - 1, at.stop - 1)
        if k:
            source[0] = prompt_end
            row.present[e, k - 1] = True
        else:  # nothing predicts the prompt's first token
            piece, source = (piece[1:], source[1:]) if score_prompt else (piece[:0], source[:0])
        scored = slice(score, score + len(piece))
        row.source[scored], row.target[scored] = source, piece
        row.response[scored] = e * slots + max(k - 1, 0)
        column, score = at.stop, scored.stop


def _write_judgement(row: Rows, example: Example, e: int):
    """What the data say of one example's responses, into row arrays [E, K] and [E]."""
    count = len(example.responses)
    row.rank[e, :count] = range(count) if example.rank is None else example.rank
    row.scores[e, :count] = 0.0 if example.scores is None else example.scores
    row.desirable[e] = example.label is not False
    row.category[e] = example.category or 0


def _packings(sizes, batches, length):
    """The packing of every batch into rows of `length`, and the scored tokens allowed in a row.

    A row is allowed a little more than its share of scored tokens: the LM head then computes few
    paddings, and only rows of unusually long responses are closed early.
    """
    share = sum(s.scored for s in sizes) / sum(s.tokens for s in sizes)
    most = max(size.scored for size in sizes)
    scored = min(length, max(_round_up(most, 8), _round_up(int(1.05 * share * length), 8)))
    return [first_fit([sizes[i] for i in batch], length, scored) for batch in batches], scored


def _cost(packed, length, attention):
    """Relative time of these rows: all columns, plus attention's share, which grows with length."""
    return sum(map(len, packed)) * length * (1 + length / attention)


def _least_rows(counts: np.ndarray, multiple: int) -> int:
    """Rows of a micro-batch for the least computed rows over batches that need `counts` rows.

    Every micro-batch is charged 2 % of the largest batch for adding up gradients.
    """
    most = _round_up(int(counts.max()), multiple)
    choices = range(multiple, most + 1, multiple)
    return min(choices, key=lambda m: (np.ceil(counts / m).sum() * (m + 0.02 * most), -m))


def _round_up(n: int, multiple: int) -> int:
    return -(-n // multiple) * multiple
