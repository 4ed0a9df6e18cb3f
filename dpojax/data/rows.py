"""Rows: examples of one prompt and its K responses, packed into arrays of fixed shape.

A row of tokens is `[prompt | y1 | y2 | ... | yK]`, several such examples one after another. The
prompt is computed once for all its responses, and nothing is padded per pair. A token attends to
what stands before it in its own segment on the prompt or on its own branch; the positions of every
branch go on from the prompt's end.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from dpojax.data.packing import Bucket, Buckets, Shape, bucket_of, pack, size_of
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
    buckets: Buckets = Buckets()  # static: the sizes at which its micro-batches may be computed


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
    packed = pack(sizes, shape)
    most = max((len(row) for part in packed for row in part), default=0)
    if len(packed) > shape.micro_batches or most > shape.examples:
        raise ValueError(
            f"{len(packed)} micro-batches of at most {most} examples a row do not fit {shape}; "
            "plan the shape with these batches"
        )
    rows = empty(shape)
    places = [(m, r) for m, part in enumerate(packed) for r in range(len(part))]
    for place in places:
        members = packed[place[0]][place[1]]
        row = jax.tree.map(lambda x, place=place: x[place], rows)
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
        buckets=shape.buckets,
    )


def buckets_of(rows: Rows) -> tuple[Bucket, ...]:
    """The sizes at which micro-batches [M, R, ...] are computed; a single one is, whole."""
    whole = (Bucket(*rows.tokens.shape[1:], rows.target.shape[-1]),)
    return rows.buckets if rows.buckets and len(rows.tokens) > 1 else whole


def needs_of(rows: Rows) -> np.ndarray:
    """How many rows, columns and scored tokens the micro-batches use: int [M, 3], 0 if empty.

    All are filled from the front. NumPy's for NumPy rows, JAX's for JAX rows.
    """
    used, scored = rows.segment > 0, rows.response >= 0
    found = used.any(-1).sum(-1), used.sum(-1).max(-1), scored.sum(-1).max(-1)
    numpy = np if isinstance(rows.segment, np.ndarray) else jnp
    return numpy.stack(found, axis=-1)


def utilisation(rows: Rows) -> float:
    """Share of the computed columns, those of all micro-batches with any example, with a token."""
    buckets, needs = buckets_of(rows), needs_of(rows)
    columns = np.array([bucket.rows * bucket.length for bucket in buckets])
    computed = columns[bucket_of(needs[needs[:, 0] > 0], buckets)].sum()
    return float((rows.segment > 0).sum() / max(1, computed))


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
