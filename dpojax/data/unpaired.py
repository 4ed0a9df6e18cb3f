"""Labelled single responses, and the unrelated responses that KTO's KL is estimated from."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import numpy as np

from dpojax.data.records import DataError, Record
from dpojax.data.tokenise import Example


def split(record: Record) -> list[Record]:
    """A record as labelled single responses.

    Of two or more responses the first becomes a desirable record, "ID:chosen", and the last an
    undesirable one, "ID:rejected"; those between them are left out. None if all are tied. One
    response stays as it is where it has a label, and gives none where it has not.
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


def with_mismatched(examples: Sequence[Example], max_length: int) -> list[Example]:
    """Every example with an unrelated response as its second: KTO's KL is estimated from these.

    The unrelated response is the first one of the next example that has another prompt, cyclically
    in a fixed random order: desirable and undesirable responses come in their shares (Ethayarajh et
    al. 2024 take the next one of a shuffled batch). Batches do not change it, so a cached reference
    covers it. It loses its end beyond `max_length` minus the prompt's length, but keeps a token.
    Its rank is -1, which no answer to the prompt has.

    Args:
      examples: of one response each.
      max_length: most tokens of a prompt with a response.

    Raises:
      DataError: all examples have the same prompt.
    """
    shuffled = np.random.default_rng(0).permutation(len(examples))
    after = _next_of_another_prompt([examples[i].prompt.tobytes() for i in shuffled])
    partners = dict(zip(shuffled.tolist(), shuffled[after].tolist()))
    mismatched = []
    for index, example in enumerate(examples):
        partner = partners[index]
        whole = examples[partner].responses[0]
        kept = whole[: max(1, max_length - len(example.prompt))]
        mismatched.append(
            example._replace(
                responses=(*example.responses, kept),
                cut=(*example.cut, examples[partner].cut[0] or len(kept) < len(whole)),
                scores=None if example.scores is None else (*example.scores, 0.0),
                rank=(0, -1),
            )
        )
    return mismatched


def _next_of_another_prompt(prompts: Sequence[bytes]) -> list[int]:
    """For each place the next one, cyclically, with another prompt; one pass from the end."""
    count = len(prompts)
    changes = (i for i in range(count) if prompts[i] != prompts[(i + 1) % count])
    last = next(changes, None)
    if last is None:
        raise DataError(
            f"{count} examples with the same prompt: a response to another prompt is needed (KTO's "
            "KL is estimated from mismatched responses); give records with other prompts"
        )
    found = [0] * count
    for i in range(last, last - count, -1):
        after = (i + 1) % count
        differs = prompts[i % count] != prompts[after]
        found[i % count] = after if differs else found[after]
    return found
