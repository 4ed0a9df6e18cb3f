"""What a judge is: something that says which of two responses is better."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Protocol

from dpojax.evaluation.judging.verdicts import Question, Reply


class JudgeError(ValueError):
    """A judge that cannot be opened or asked."""


class Judge(Protocol):
    """Answers questions.

    Attributes:
      name: as the command line gives it, such as "exact" or "openai:MODEL@URL".
      fingerprint: another one for judges whose replies may differ: weights, prompt and its version,
        settings. With a question it is the key of the cache of verdicts.
      is_symmetric: its reply does not depend on which response stands first, so one order is asked
        and the other follows.
    """

    name: str
    fingerprint: str
    is_symmetric: bool

    def replies(self, questions: Sequence[Question]) -> Iterator[tuple[int, Reply]]:
        """Yield (index of the question, its reply) in any order, each as soon as it is there.

        Raises:
          JudgeError: no further question can be asked; what was yielded before stays good.
        """
        ...
