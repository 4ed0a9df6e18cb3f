"""Questions to a judge, its replies, and what the replies in both orders say of a comparison."""

from __future__ import annotations

import enum
import math
from typing import NamedTuple


class Choice(enum.Enum):
    """What a judge says of the response that it reads first and the one that it reads second."""

    FIRST = "first"
    SECOND = "second"
    TIE = "tie"
    UNPARSED = "unparsed"

    @property
    def mirrored(self) -> Choice:
        """The same verdict where the two responses stand in the other order."""
        return _MIRRORED.get(self, self)


_MIRRORED = {Choice.FIRST: Choice.SECOND, Choice.SECOND: Choice.FIRST}


class Question(NamedTuple):
    """Which of two responses to a prompt is better?

    Attributes:
      reference: a good response that a judge may compare both with; "" where there is none.
    """

    prompt: str
    first: str
    second: str
    reference: str = ""

    @property
    def mirrored(self) -> Question:
        """The same question with the two responses in the other order."""
        return self._replace(first=self.second, second=self.first)


class Reply(NamedTuple):
    """A judge's answer to one question.

    Attributes:
      choice: what it says.
      preference: P(first is better) in [0, 1] where the judge gives one, else nan.
      text: what it wrote, for people to read; "" for a judge that writes nothing.
      tokens_in: tokens of the request that were paid for; 0 for a judge that costs nothing.
      tokens_out: tokens of the reply that were paid for.
    """

    choice: Choice
    preference: float = math.nan
    text: str = ""
    tokens_in: int = 0
    tokens_out: int = 0

    @property
    def mirrored(self) -> Reply:
        """The same answer to the question in the other order."""
        return self._replace(choice=self.choice.mirrored, preference=1 - self.preference)


class Comparison(NamedTuple):
    """Two responses to one prompt, of which A's is judged against B's.

    Attributes:
      id: of the prompt. Comparisons of other pairs of policies on the same prompt share it.
      reference: see `Question`.
    """

    id: str
    prompt: str
    a: str
    b: str
    reference: str = ""

    @property
    def question(self) -> Question:
        """The question in which A's response stands first."""
        return Question(self.prompt, self.a, self.b, self.reference)


class Outcome(enum.Enum):
    """What the replies in both orders say of A."""

    WIN = "win"
    LOSS = "loss"
    TIE = "tie"
    INCONSISTENT = "inconsistent"
    UNPARSED = "unparsed"


class Judgement(NamedTuple):
    """Replies to one comparison in both orders.

    Attributes:
      a_first: the reply where A's response stands first.
      b_first: the reply where B's response stands first.
    """

    a_first: Reply
    b_first: Reply

    @property
    def outcome(self) -> Outcome:
        """WIN or LOSS where both orders say so, INCONSISTENT where they contradict each other.

        A tie in one order or in both is a TIE. A reply that could not be read makes it UNPARSED.
        """
        choices = self.a_first.choice, self.b_first.choice.mirrored
        if Choice.UNPARSED in choices:
            return Outcome.UNPARSED
        if Choice.TIE in choices:
            return Outcome.TIE
        if choices[0] is not choices[1]:
            return Outcome.INCONSISTENT
        return Outcome.WIN if choices[0] is Choice.FIRST else Outcome.LOSS

    @property
    def score(self) -> float:
        """A's share of the win: the mean over both orders of 1, 1/2 for a tie, or 0; else nan.

        It is nan where a reply could not be read. An inconsistent judgement has 1/2.
        """
        values = {Choice.FIRST: 1.0, Choice.TIE: 0.5, Choice.SECOND: 0.0}
        forward = values.get(self.a_first.choice, math.nan)
        backward = values.get(self.b_first.choice.mirrored, math.nan)
        return (forward + backward) / 2
