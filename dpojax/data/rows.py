"""Rows: examples of one prompt and its K responses, packed into arrays of fixed shape.

An example is a *segment* of a row, `[prompt | y1 | y2 | ... | yK]`. A row holds several segments,
one after another. The prompt is computed once for all its responses, and nothing is padded per
pair. Each response is a *branch*: its positions go on from the prompt's end, and its tokens attend
to the prompt and to earlier tokens of the same branch.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from dpojax.data.examples import Example
from dpojax.data.packing import Bucket, Buckets, Shape, bucket_of, pack, size_of


class Rows(NamedTuple):
    """One batch of R rows with T columns, S scored tokens, E examples and K responses of each.

    Every array may have leading dimensions (micro-batches) before [R, ...]. A scored token is a
    token whose log-prob the loss reads: those of a response that `Example.scored` does not mask. It
    is predicted from column `source` and belongs to the response slot `response` = (example in the
    row) * K + (index of the response, best first).
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
    # [R, E, K] int32, how many responses are better; -1: answers another prompt; 0 at padding
    rank: np.ndarray
    scores: np.ndarray  # [R, E, K] float32, from the data; 0 where unknown, and at padding
    desirable: np.ndarray  # [R, E] bool, false if labelled undesirable, and at padding
    weight: np.ndarray  # [R, E] float32, factor of the example's loss; 0 at padding
    reference: np.ndarray | None = None  # [R, S] float32, the reference's log-probs in nats
    category: np.ndarray | None = None  # [R, E] int32, the class of a text; 0 at padding
    buckets: Buckets = Buckets()  # static: the sizes in which its micro-batches are computed


def collate(
    examples: Sequence[Example],
    indices: Sequence[int],
    shape: Shape,
    *,
    score_prompt: bool = False,
) -> Rows:
    """Pack the examples at `indices` into one batch of `shape`, arrays [M, R, ...].

    Raises:
      ValueError: they do not fit, since the shape was planned for other batches.
    """
    sizes = [size_of(examples[i], score_prompt=score_prompt) for i in indices]
    packed = pack(sizes, shape)
    most = max((len(row) for part in packed for row in part), default=0)
    if len(packed) > shape.micro_batches or most > shape.examples:
        raise ValueError(
            f"{len(packed)} micro-batches of at most {most} examples a row do not fit {shape}; "
            "plan the shape with these batches"
        )
    batch = empty(shape)
    for m, rows in enumerate(packed):
        for r, members in enumerate(rows):
            row = _row(batch, m, r)
            column = score = 0
            for e, member in enumerate(members):
                example = examples[indices[member]]
                row.example[e] = indices[member]
                _write(row, example, e, column, score, score_prompt)
                _write_judgement(row, example, e)
                column, score = column + sizes[member].tokens, score + sizes[member].scored
    return batch


def _row(batch: Rows, m: int, r: int) -> Rows:
    """Row `r` of micro-batch `m` as views: what is written to them is written to the batch."""
    return jax.tree.map(lambda x: x[m, r], batch)


def empty(shape: Shape) -> Rows:
    """A batch of padding, arrays [M, R, ...]."""
    rows = (shape.micro_batches, shape.rows)
    columns, scored = (*rows, shape.length), (*rows, shape.scored)
    examples, slots = (*rows, shape.examples), (*rows, shape.examples, shape.responses)
    return Rows(
        tokens=np.zeros(columns, np.int32),
        positions=np.zeros(columns, np.int32),
        segment=np.zeros(columns, np.int32),
        branch=np.zeros(columns, np.int32),
        source=np.zeros(scored, np.int32),
        target=np.zeros(scored, np.int32),
        response=np.full(scored, -1, np.int32),
        present=np.zeros(slots, bool),
        example=np.full(examples, -1, np.int32),
        rank=np.zeros(slots, np.int32),
        scores=np.zeros(slots, np.float32),
        desirable=np.zeros(examples, bool),
        weight=np.zeros(examples, np.float32),
        category=np.zeros(examples, np.int32),
        buckets=shape.buckets,
    )


def buckets_of(rows: Rows) -> tuple[Bucket, ...]:
    """The buckets of micro-batches [M, R, ...]; a single micro-batch is computed whole."""
    whole = (Bucket(*rows.tokens.shape[1:], rows.target.shape[-1]),)
    return rows.buckets if rows.buckets and len(rows.tokens) > 1 else whole


def needs_of(rows: Rows) -> np.ndarray:
    """How many rows, columns and scored tokens each micro-batch uses: int [M, 3], 0 if empty.

    All are filled from the front. The result is a NumPy array for NumPy rows, else a JAX array.
    """
    used, scored = rows.segment > 0, rows.response >= 0  # [M, R, T] and [M, R, S]
    needs = used.any(-1).sum(-1), used.sum(-1).max(-1), scored.sum(-1).max(-1)
    numpy = np if isinstance(rows.segment, np.ndarray) else jnp
    return numpy.stack(needs, axis=-1)


def utilisation(rows: Rows) -> float:
    """Share of the computed columns that hold a token; empty micro-batches are not computed."""
    buckets, needs = buckets_of(rows), needs_of(rows)
    columns = np.array([bucket.rows * bucket.length for bucket in buckets])
    computed = columns[bucket_of(needs[needs[:, 0] > 0], buckets)].sum()
    return float((rows.segment > 0).sum() / max(1, computed))


def _write(row: Rows, example: Example, e: int, column: int, score: int, score_prompt: bool):
    """Write the tokens of an example into one row.

    Args:
      row: arrays [T], [S], ...
      example: what to write.
      e: the example's number in the row, from 0.
      column, score: its first column, and its first place among the row's scored tokens.
      score_prompt: whether prompt tokens are scored as well.
    """
    prompt_end = column + len(example.prompt) - 1
    slots = row.present.shape[-1]
    for k, piece in enumerate((example.prompt, *example.responses)):  # k is the branch
        at = slice(column, column + len(piece))
        row.tokens[at], row.segment[at], row.branch[at] = piece, e + 1, k
        row.positions[at] = np.arange(len(piece)) + (len(example.prompt) if k else 0)
        source = np.arange(column - 1, at.stop - 1)  # a token is predicted from the one before it
        if k:
            source[0] = prompt_end  # a response's first token is predicted from the prompt's last
            row.present[e, k - 1] = True
        else:
            first = 1 if score_prompt else len(piece)  # nothing predicts the prompt's first token
            piece, source = piece[first:], source[first:]
        if k and example.scored is not None:
            piece, source = piece[example.scored[k - 1]], source[example.scored[k - 1]]
        scored = slice(score, score + len(piece))
        row.source[scored], row.target[scored] = source, piece
        row.response[scored] = e * slots + max(k - 1, 0)
        column, score = at.stop, scored.stop


def _write_judgement(row: Rows, example: Example, e: int):
    """Write rank, scores, label, weight and category of an example into a row's [E, K] and [E]."""
    count = len(example.responses)
    row.rank[e, :count] = range(count) if example.rank is None else example.rank
    row.scores[e, :count] = 0.0 if example.scores is None else example.scores
    row.desirable[e] = example.label is not False
    row.weight[e] = example.weight
    row.category[e] = example.category or 0
