"""A judge whose faults are known, and what a report should find when it is asked.

It knows which response is better, and replies so with known probabilities of a fault:

1. `unparsed`: the reply cannot be read.
2. else `position_bias`: it chooses the first response, whatever they are.
3. else `ties`: it calls a tie.
4. else `noise`: it chooses the worse response.
5. else it chooses the better one.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np

from dpojax.evaluation.judging.verdicts import Choice, Judgement, Outcome, Question, Reply

LENGTH_SCALE = 100.0  # characters: standard deviation of the length differences


@dataclass
class SimulatedJudge:
    """A `Judge` with known faults; `first_is_better(question)` is the truth."""

    first_is_better: Callable[[Question], bool]
    position_bias: float = 0.0
    noise: float = 0.0
    ties: float = 0.0
    unparsed: float = 0.0
    seed: int = 0
    name: str = "simulated"
    is_symmetric: bool = False
    questions: list[Question] = field(default_factory=list)

    @property
    def fingerprint(self) -> str:
        faults = self.position_bias, self.noise, self.ties, self.unparsed
        return f"{self.name} {faults} {self.seed}"

    def replies(self, questions: Sequence[Question]):
        self.questions += questions
        rng = np.random.default_rng([self.seed, len(self.questions)])
        better = np.array([self.first_is_better(question) for question in questions])
        for index, choice in enumerate(self.choices(better, rng)):
            yield index, Reply(choice)

    def choices(self, first_is_better: np.ndarray, rng: np.random.Generator) -> list[Choice]:
        """A choice for each question."""
        draws = rng.random((4, len(first_is_better)))
        says_first = first_is_better ^ (draws[3] < self.noise)
        codes = np.select(
            [draws[0] < self.unparsed, draws[1] < self.position_bias, draws[2] < self.ties],
            [3, 0, 2],
            np.where(says_first, 0, 1),
        )
        names = [Choice.FIRST, Choice.SECOND, Choice.TIE, Choice.UNPARSED]
        return [names[code] for code in codes]

    def judgements(self, a_is_better: np.ndarray, rng: np.random.Generator) -> list[Judgement]:
        """Replies in both orders for comparisons whose truth is known."""
        pairs = zip(self.choices(a_is_better, rng), self.choices(~a_is_better, rng))
        return [Judgement(Reply(first), Reply(second)) for first, second in pairs]

    def expected(self, a_wins: float) -> dict[str, float]:
        """What a report should find if A is the better one with probability `a_wins`.

        All are worked out from the list at the top of this file. Given a reply that can be read,
        the better response is chosen with probability `right + bias` where it stands first and
        `right` where it stands second.
        """
        bias, honest = self.position_bias, 1 - self.position_bias
        right = honest * (1 - self.ties) * (1 - self.noise)
        wrong = honest * (1 - self.ties) * self.noise
        tie = honest * self.ties
        # Both orders choose the better one, or both the worse one.
        agree, contradict = (bias + right) * right, wrong * (bias + wrong)
        read = (1 - self.unparsed) ** 2
        accuracy = agree / (agree + contradict)
        table = np.array(
            [
                [a_wins * agree, (1 - a_wins) * contradict],
                [a_wins * contradict, (1 - a_wins) * agree],
            ]
        )
        table /= table.sum()
        chance = table.sum(0) @ table.sum(1)
        return {
            # A's share where it is better is bias / 2 + right + tie / 2, else 1 minus that.
            "win_rate": 0.5 + (2 * a_wins - 1) * (bias / 2 + right + tie / 2 - 0.5),
            "position_bias": bias,
            "flip_rate": (bias + right) * (bias + wrong) + right * wrong,
            "accuracy": read * agree,
            "decided_accuracy": accuracy,
            "kappa": (accuracy - chance) / (1 - chance),
            Outcome.WIN: read * (a_wins * agree + (1 - a_wins) * contradict),
            Outcome.LOSS: read * (a_wins * contradict + (1 - a_wins) * agree),
            Outcome.INCONSISTENT: read * ((bias + right) * (bias + wrong) + right * wrong),
            Outcome.TIE: read * (1 - (1 - tie) ** 2),
            Outcome.UNPARSED: 1 - read,
        }
