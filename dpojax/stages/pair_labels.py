"""What the held-out examples of a preference or reward stage state: pairs, or labels."""

from __future__ import annotations

import itertools

from dpojax.stages.data import StageData


def is_labelled(data: StageData) -> bool:
    """Whether the examples are single responses with a label."""
    return data.examples[0].label is not None


def count_pairs(data: StageData) -> int:
    """How many held-out pairs state a preference; of labelled responses, how many there are."""
    if is_labelled(data):
        return len(data.held_out)
    count = 0
    for index in data.held_out:
        example = data.examples[index]
        ranks = example.rank or range(len(example.responses))
        count += sum(a < b for a, b in itertools.combinations(ranks, 2))
    return count
