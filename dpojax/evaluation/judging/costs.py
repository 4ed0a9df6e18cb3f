"""What it costs to ask a judge: tokens, and their price."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple, Protocol, runtime_checkable

from dpojax.evaluation.judging.judge import Judge, JudgeError
from dpojax.evaluation.judging.verdicts import Question, Reply

FIRST_ROUND = 16  # questions of the first round under a limit: their replies show the real cost
MARGIN = 1.5  # the real number of tokens of a request, over the counted one, at the start
LATER_MARGIN = 1.1  # the same, over the largest ratio that was seen


class Tokens(NamedTuple):
    """Tokens of a request and, at most, of the reply."""

    input: int
    output: int


class Prices(NamedTuple):
    """Prices in a currency of the user's, per million tokens."""

    input: float
    output: float

    def of(self, tokens_in: float, tokens_out: float) -> float:
        """Return the price of this many tokens."""
        return (self.input * tokens_in + self.output * tokens_out) / 1e6


@runtime_checkable
class CountsTokens(Protocol):
    """A judge whose questions cost tokens.

    Attributes:
      prices: None where the user gave none.
      counted_by: how `tokens` counts, for a person.
    """

    prices: Prices | None
    counted_by: str

    def tokens(self, question: Question) -> Tokens:
        """Count the tokens of the request, and how many its reply has at most."""
        ...


class Estimate(NamedTuple):
    """What it costs to ask open questions.

    Attributes:
      calls: questions that no cache answers.
      tokens_in: of all requests; 0 for a judge that costs nothing.
      tokens_out: of all replies, at most.
      price: at most, in the currency of the prices; 0 for a judge that costs nothing, None where no
        prices were given.
      counted_by: how tokens were counted, for a person.
    """

    calls: int
    tokens_in: int
    tokens_out: int
    price: float | None
    counted_by: str = ""

    def __str__(self) -> str:
        if not self.counted_by:
            return f"{self.calls:,} calls, which cost nothing"
        price = "" if self.price is None else f". They cost at most {self.price:,.4f}"
        return (
            f"{self.calls:,} calls with {self.tokens_in:,} tokens, and at most "
            f"{self.tokens_out:,} tokens of replies, counted by {self.counted_by}{price}"
        )


def estimate_questions(judge: Judge, questions: Sequence[Question]) -> Estimate:
    """Return what it costs to ask all of these questions."""
    if not isinstance(judge, CountsTokens):
        return Estimate(len(questions), 0, 0, 0.0)
    counts = [judge.tokens(question) for question in questions]
    tokens_in, tokens_out = sum(x.input for x in counts), sum(x.output for x in counts)
    price = None if judge.prices is None else judge.prices.of(tokens_in, tokens_out)
    return Estimate(len(questions), tokens_in, tokens_out, price, judge.counted_by)


class Budget:
    """Hands out questions as long as what they cost at most fits below a limit.

    Questions go out in rounds: before each round, what the replies really cost is known.

    Attributes:
      spent: price of all replies so far; 0 without prices.
    """

    def __init__(self, judge: Judge, max_cost: float | None):
        """Open an account.

        Args:
          max_cost: the limit, in the currency of the judge's prices; None for none.

        Raises:
          JudgeError: there is a limit and the judge has no prices.
        """
        self.spent = 0.0
        self._judge = judge if isinstance(judge, CountsTokens) else None
        self._max_cost = max_cost
        self._margin = MARGIN
        self._worst_ratio = 0.0
        self._round = FIRST_ROUND
        self.is_limited = self._judge is not None and max_cost is not None
        if self.is_limited and self._judge.prices is None:
            raise JudgeError(
                f"max_cost = {max_cost}: {judge.name} has no prices; give --price_in and "
                "--price_out, the prices of a million tokens of requests and of replies"
            )

    def affordable(self, questions: Sequence[Question]) -> int:
        """Return how many of these questions, from the first, may be asked now."""
        if not self.is_limited:
            return len(questions)
        limit, self._round = self._round, 2 * self._round
        at_most = self.spent
        for count, question in enumerate(questions[:limit]):
            tokens = self._judge.tokens(question)
            at_most += self._judge.prices.of(self._margin * tokens.input, tokens.output)
            if at_most > self._max_cost:
                return count
        return min(len(questions), limit)

    def pay(self, question: Question, reply: Reply) -> None:
        """Note what a reply has cost."""
        if self._judge is None or self._judge.prices is None:
            return
        self.spent += self._judge.prices.of(reply.tokens_in, reply.tokens_out)
        if self.is_limited and reply.tokens_in:  # a request that was refused shows nothing
            ratio = reply.tokens_in / max(1, self._judge.tokens(question).input)
            self._worst_ratio = max(self._worst_ratio, ratio)
            self._margin = LATER_MARGIN * self._worst_ratio
