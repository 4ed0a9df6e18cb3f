"""Unpaired data: labelled single responses, and the mismatched responses for KTO's KL estimate."""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Iterator, Sequence

import numpy as np

from dpojax.data.examples import Example
from dpojax.data.records import DataError, Record


def split(record: Record) -> list[Record]:
    """Split a record into labelled single responses.

    The first of two or more responses becomes a desirable record, "ID:chosen", and the last an
    undesirable one, "ID:rejected". Responses between them are left out. The result is empty if all
    responses are tied, or if a single response has no label. A single labelled response stays as
    it is.
    """
    if len(record.responses) == 1:
        return [record] if record.label is not None else []
    if record.all_tied:
        return []
    scores = record.scores
    return [
        dataclasses.replace(
            record,
            id=f"{record.id}:{name}",
            responses=(record.responses[place],),
            label=label,
            scores=None if scores is None else (scores[place],),
            rank=None,
        )
        for place, label, name in ((0, True, "chosen"), (-1, False, "rejected"))
    ]


def with_mismatched(
    examples: Sequence[Example], indices: Sequence[int], max_length: int
) -> Iterator[Example]:
    """Give every example a mismatched response as its second, for KTO's KL estimate.

    A mismatched response answers another prompt: it is that of the next example with another prompt
    in a fixed random order, cyclically. So desirable and undesirable responses keep their shares.
    Ethayarajh et al. 2024 take the next response of a shuffled batch instead; here the pairing does
    not depend on the batches, so a cached reference covers it. The response is truncated where it
    would exceed `max_length`, but keeps one token. Its rank is -1, which no answer to the prompt
    has.

    Args:
      examples: of one response each.
      indices: which of them are given one, and give theirs.
      max_length: most tokens of a prompt with its mismatched response.

    Raises:
      DataError: all examples have the same prompt.
    """
    shuffled = np.random.default_rng(0).permutation(len(indices))
    # Hashes, as the prompts themselves may not fit into memory.
    prompts = [_hash(examples[indices[i]].prompt) for i in shuffled]
    partners = np.empty(len(indices), np.int64)
    partners[shuffled] = shuffled[_next_of_another_prompt(prompts)]
    for index, place in zip(indices, partners.tolist()):
        example, partner = examples[index], indices[place]
        response = examples[partner].responses[0]
        truncated = response[: max(1, max_length - len(example.prompt))]
        yield example._replace(
            responses=(*example.responses, truncated),
            cut=(*example.cut, examples[partner].cut[0] or len(truncated) < len(response)),
            scores=None if example.scores is None else (*example.scores, 0.0),
            rank=(0, -1),
            scored=_scored_with(example, examples[partner], len(truncated)),
        )


def _scored_with(example: Example, partner: Example, length: int) -> tuple[np.ndarray, ...] | None:
    """Which tokens are scored once the partner's first `length` response tokens are added."""
    if example.scored is None and partner.scored is None:
        return None
    mask, partner_mask = (
        np.ones(len(e.responses[0]), bool) if e.scored is None else e.scored[0]
        for e in (example, partner)
    )
    return mask, partner_mask[:length]


def _hash(tokens: np.ndarray) -> bytes:
    return hashlib.blake2b(tokens.tobytes(), digest_size=16).digest()


def _next_of_another_prompt(prompts: Sequence[bytes]) -> list[int]:
    """For each place, the next place (cyclically) with another prompt; in one pass from the end."""
    count = len(prompts)
    changes = (i for i in range(count) if prompts[i] != prompts[(i + 1) % count])
    last = next(changes, None)
    if last is None:
        raise DataError(
            f"{count} examples with the same prompt: a response to another prompt is needed (KTO's "
            "KL is estimated from mismatched responses); give records with other prompts"
        )
    others = [0] * count
    for i in range(last, last - count, -1):
        after = (i + 1) % count
        differs = prompts[i % count] != prompts[after]
        others[i % count] = after if differs else others[after]
    return others
