"""What losses take: values of the chosen and of the rejected response."""

from __future__ import annotations

from typing import Generic, NamedTuple, TypeVar

Value = TypeVar("Value", covariant=True)


class Pair(NamedTuple, Generic[Value]):
    """Values of the preferred (chosen) and of the other (rejected) response to the same prompts.

    >>> Pair(chosen=-12.0, rejected=-14.0)
    Pair(chosen=-12.0, rejected=-14.0)
    """

    chosen: Value
    rejected: Value


# As `reference`: log-ratios are then the policy's log-probs, or scores, themselves.
NO_REFERENCE = Pair(0.0, 0.0)
