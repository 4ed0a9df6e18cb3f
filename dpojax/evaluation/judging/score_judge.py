"""A judge made of scores: the response with the higher score is better.

    judge = reward_judge(open_reward("reward_model:FOLDER"), name="reward_model:FOLDER")

Its verdict does not depend on which response stands first.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.special import expit

from dpojax.data.pairing import ROUNDING, Labels
from dpojax.data.records import DataError
from dpojax.evaluation.judging.judge import JudgeError
from dpojax.evaluation.judging.verdicts import Choice, Question, Reply
from dpojax.evaluation.rewards import Reward, RewardError

CHUNK = 512  # questions whose texts are scored together


class Text(NamedTuple):
    """What is scored: one response to a prompt.

    Attributes:
      reference: a good response to the same prompt; "" where there is none.
    """

    prompt: str
    response: str
    reference: str = ""


class ScoreJudge:
    """Compares the scores of the two responses. Each distinct text is scored once.

    Attributes:
      name, fingerprint, is_symmetric: see `Judge`.
    """

    is_symmetric = True

    def __init__(
        self,
        score: Callable[[Sequence[Text]], ArrayLike],
        *,
        name: str,
        fingerprint: str,
        tie: float = ROUNDING,
        bradley_terry: bool = False,
    ):
        """Make a judge.

        Args:
          score: n texts -> n finite numbers. A RewardError, DataError or JudgeError that it raises
            ends `replies`.
          name: see `Judge`.
          fingerprint: of the scores. The judge's fingerprint adds the margin of a tie.
          tie: responses whose scores differ by this or less are tied. With 0 only equal scores
            are, and two scores that are equal on paper may differ in their last bit.
          bradley_terry: whether sigmoid(s1 - s2) is the probability that the first response is
            better (Bradley and Terry 1952). Then it is the replies' `preference`.

        Raises:
          JudgeError: `tie` is negative or not finite.
        """
        if not 0 <= tie < math.inf:
            raise JudgeError(f"judge {name}: tie is {tie}; it must be a number, 0 or larger")
        self.name = name
        self.fingerprint = f"{fingerprint} tie={float(tie)!r}"
        self._score, self._labels, self._bradley_terry = score, Labels(tie=tie), bradley_terry
        self._known: dict[Text, float] = {}

    def replies(self, questions: Sequence[Question]) -> Iterator[tuple[int, Reply]]:
        """Yield (index, reply) in the order of the questions.

        Raises:
          JudgeError: a text cannot be scored.
        """
        for start in range(0, len(questions), CHUNK):
            chunk = questions[start : start + CHUNK]
            first = [Text(q.prompt, q.first, q.reference) for q in chunk]
            second = [Text(q.prompt, q.second, q.reference) for q in chunk]
            scores_2xn = self.scores(first + second).reshape(2, -1)
            for index, difference in enumerate(scores_2xn[0] - scores_2xn[1], start):
                yield index, self._reply(difference)

    def scores(self, texts: Sequence[Text]) -> NDArray[np.float64]:
        """The score of each text, [n].

        Raises:
          JudgeError: a text cannot be scored.
        """
        new = [text for text in dict.fromkeys(texts) if text not in self._known]
        if new:
            try:
                scores = np.asarray(self._score(new), np.float64)
            except (RewardError, DataError) as error:
                raise JudgeError(f"judge {self.name}: {error}") from error
            self._known |= zip(new, scores.tolist(), strict=True)
        return np.array([self._known[text] for text in texts], np.float64)

    def _reply(self, difference: float) -> Reply:
        """The reply where the first response's score minus the second's is `difference`."""
        preference = float(expit(difference)) if self._bradley_terry else math.nan
        return Reply(choose(self._labels, difference), preference)


def choose(labels: Labels, difference: float) -> Choice:
    """What the first response's score minus the second's says."""
    if labels.tied(difference):
        return Choice.TIE
    return Choice.FIRST if labels.first_wins(difference) else Choice.SECOND


def reward_judge(
    reward: Reward, *, name: str, tie: float = ROUNDING, bradley_terry: bool = False
) -> ScoreJudge:
    """Make a judge of a reward; see `ScoreJudge` for the arguments and errors."""

    def score(texts: Sequence[Text]) -> NDArray[np.float64]:
        return reward([text.prompt for text in texts], [text.response for text in texts])

    return ScoreJudge(
        score, name=name, fingerprint=reward.fingerprint, tie=tie, bradley_terry=bradley_terry
    )


def length_reward(*, longer: bool = True) -> Reward:
    """The number of characters of a response, without white space around it; or minus that."""
    sign = 1 if longer else -1

    def length(prompts: Sequence[str], responses: Sequence[str]) -> list[int]:
        return [sign * len(response.strip()) for response in responses]

    name = "length" if longer else "length:shorter"
    return Reward(name, length, name)
