"""Ask a judge about comparisons: both orders, nothing twice, and every reply is kept."""

from __future__ import annotations

import hashlib
import random
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

from dpojax.evaluation.judging.cache import VerdictCache, cache_key
from dpojax.evaluation.judging.costs import Budget, CountsTokens, Estimate, estimate_questions
from dpojax.evaluation.judging.judge import Judge, JudgeError
from dpojax.evaluation.judging.verdicts import Choice, Comparison, Judgement, Question, Reply
from dpojax.watchdog import beat

REPEAT = 0.05  # share of questions that are asked a second time
# Questions after which the cache is read again: another process may have answered some.
ROUND = 256
ROUND_AT_NO_COST = 4096  # of judges in this process, which batch questions by their length
IDENTICAL = Reply(Choice.TIE, 0.5, "not asked: the two responses are identical")

Progress = Callable[[int, int], None]


class CostReached(JudgeError):
    """The next question might pass the limit on the cost."""


class Judged(NamedTuple):
    """What a judge says of comparisons.

    Attributes:
      judgements: one for each comparison, in their order.
      repeats: the two replies to each question that was asked twice.
      asked: replies that came in this call.
      cached: replies that were there already.
      identical: comparisons of two identical responses: ties, of which nobody was asked.
      cost: of the replies that came in this call, in the currency of the judge's prices; 0 where
        no prices were given.
    """

    judgements: list[Judgement]
    repeats: list[tuple[Reply, Reply]]
    asked: int
    cached: int
    identical: int = 0
    cost: float = 0.0


class PlannedQuestion(NamedTuple):
    """A question as it is asked.

    Attributes:
      repetition: 0, or 1 where it is asked a second time.
      key: its name in the cache.
    """

    question: Question
    repetition: int
    key: str


def judge_comparisons(
    judge: Judge,
    comparisons: Sequence[Comparison],
    *,
    cache: VerdictCache | None = None,
    repeat: float = REPEAT,
    seed: int = 0,
    max_cost: float | None = None,
    progress: Progress | None = None,
) -> Judged:
    """Ask a judge about each comparison in both orders, and keep every reply as it arrives.

    A symmetric judge is asked in one order. Identical responses are a tie, of which nobody is
    asked. Equal questions are asked once.

    Args:
      cache: holds replies of earlier calls, and gets the new ones; None for one in memory.
      repeat: share of the questions that are asked a second time, to see whether the judge says the
        same again. A question's hash decides, so the order of comparisons plays no part.
      seed: of the choice of these questions.
      max_cost: of this call, in the currency of the judge's prices. It is not passed as long as the
        judge's count of tokens is not too low by more than half.
      progress: is called with the number of answered questions and that of all.

    Raises:
      CostReached: some questions are open, and the next one might pass `max_cost`. Replies are in
        the cache, so that a call with a higher limit goes on.
      JudgeError: the judge cannot be asked any further. Replies that came before are in the cache.
    """
    cache = VerdictCache() if cache is None else cache
    planned = plan_questions(judge, comparisons, repeat=repeat, seed=seed)
    budget = Budget(judge, max_cost)
    try:
        asked = _ask_open(judge, planned, cache, budget, progress)
    finally:
        cache.flush()
    replies = {x.question: cache.get(x.key) for x in planned if not x.repetition}
    judgements = []
    for question in (comparison.question for comparison in comparisons):
        a_first = _reply_to(judge, question, replies)
        judgements.append(Judgement(a_first, _reply_to(judge, question.mirrored, replies)))
    repeats = [(replies[x.question], cache.get(x.key)) for x in planned if x.repetition]
    identical = sum(x.a == x.b for x in comparisons)
    return Judged(judgements, repeats, asked, len(planned) - asked, identical, budget.spent)


def estimate(
    judge: Judge,
    comparisons: Sequence[Comparison],
    cache: VerdictCache | None = None,
    *,
    repeat: float = REPEAT,
    seed: int = 0,
) -> Estimate:
    """Return what `judge_comparisons` would ask and pay, without asking."""
    planned = plan_questions(judge, comparisons, repeat=repeat, seed=seed)
    return estimate_questions(judge, [x.question for x in open_questions(planned, cache)])


def plan_questions(
    judge: Judge, comparisons: Sequence[Comparison], *, repeat: float = REPEAT, seed: int = 0
) -> list[PlannedQuestion]:
    """Return all different questions of comparisons, then those that are asked a second time."""
    if not 0 <= repeat <= 1:
        raise ValueError(f"repeat = {repeat}: is a share of the questions, in 0 to 1")
    questions: dict[Question, None] = {}  # a set that keeps its order
    for question in (comparison.question for comparison in comparisons):
        if question.first == question.second:
            continue
        for ordered in (question, question.mirrored):
            questions[_as_asked(judge, ordered)] = None
    fingerprint = judge.fingerprint
    planned = [PlannedQuestion(x, 0, cache_key(fingerprint, x)) for x in questions]
    again = [x for x in planned if _share_of(x.key, seed) < repeat]
    return planned + [
        PlannedQuestion(x.question, 1, cache_key(fingerprint, x.question, 1)) for x in again
    ]


def open_questions(
    planned: Sequence[PlannedQuestion], cache: VerdictCache | None
) -> list[PlannedQuestion]:
    """Return the questions whose replies are not in the cache."""
    return [x for x in planned if cache is None or x.key not in cache]


def _ask_open(
    judge: Judge,
    planned: Sequence[PlannedQuestion],
    cache: VerdictCache,
    budget: Budget,
    progress: Progress | None,
) -> int:
    """Ask round after round until every question has its reply; return how many were asked."""
    round_size = ROUND if isinstance(judge, CountsTokens) else ROUND_AT_NO_COST
    asked, total = 0, len(planned)
    unasked = open_questions(planned, cache)
    while unasked:
        if cache.folder is not None:
            # Processes that share a cache ask in different places, and so little twice.
            start = random.randrange(len(unasked))
            unasked = unasked[start:] + unasked[:start]
        count = budget.affordable([x.question for x in unasked[:round_size]])
        if not count:
            raise CostReached(
                f"{judge.name}: stopped before max_cost. {budget.spent:.4g} was spent, and "
                f"{total - len(unasked)} of {total} questions have their reply, which is kept. "
                "A higher max_cost goes on from here"
            )
        current, done = unasked[:count], total - len(unasked)
        beat(f"a judge is asked, {done} of {total}")
        for index, reply in judge.replies([x.question for x in current]):
            cache.put(current[index].key, reply, judge.name)
            budget.pay(current[index].question, reply)
            asked, done = asked + 1, done + 1
            beat(f"a judge is asked, {done} of {total}")
            if progress is not None:
                progress(done, total)
        if missing := len(open_questions(current, cache)):
            raise JudgeError(f"{judge.name}: gave no reply to {missing} of {count} questions")
        cache.refresh()
        unasked = open_questions(unasked[count:], cache)
    return asked


def _reply_to(judge: Judge, question: Question, replies: Mapping[Question, Reply]) -> Reply:
    if question.first == question.second:
        return IDENTICAL
    as_asked = _as_asked(judge, question)
    return replies[as_asked] if as_asked == question else replies[as_asked].mirrored


def _as_asked(judge: Judge, question: Question) -> Question:
    """The order in which a question is asked: a symmetric judge gets one of the two."""
    if judge.is_symmetric and question.second < question.first:
        return question.mirrored
    return question


def _share_of(key: str, seed: int) -> float:
    """A number in [0, 1) that is uniform over keys."""
    digest = hashlib.sha256(f"{seed} {key}".encode()).digest()
    return int.from_bytes(digest[:8], "big") / 2**64
