"""Asking a judge: both orders, nothing twice, and nothing that was paid for is lost."""

import collections

import pytest

from dpojax.evaluation.judging.asking import (
    CostReached,
    estimate,
    judge_comparisons,
    plan_questions,
)
from dpojax.evaluation.judging.cache import VerdictCache
from dpojax.evaluation.judging.costs import Prices, Tokens
from dpojax.evaluation.judging.judge import JudgeError
from dpojax.evaluation.judging.verdicts import Choice, Comparison, Outcome, Reply


class LongerWins:
    """Prefers the longer response. It counts how often each question is asked."""

    name = "longer"

    def __init__(self, *, is_symmetric=False, fingerprint="longer", fails_after=None):
        self.is_symmetric = is_symmetric
        self.fingerprint = fingerprint
        self.counts = collections.Counter()
        self._fails_after = fails_after

    def replies(self, questions):
        for index in reversed(range(len(questions))):
            if self.counts.total() == self._fails_after:
                raise JudgeError("the endpoint is gone")
            question = questions[index]
            self.counts[question] += 1
            is_first = len(question.first) > len(question.second)
            yield index, self.reply(Choice.FIRST if is_first else Choice.SECOND)

    def reply(self, choice):
        return Reply(choice, 0.75 if choice is Choice.FIRST else 0.25)


class Paid(LongerWins):
    """Asks for 100 tokens a question; its replies have 10, and might have 50."""

    counted_by = "hand"

    def __init__(self, *, prices, counted=100, **options):
        super().__init__(**options)
        self.prices = prices
        self._counted = counted

    def tokens(self, question):
        return Tokens(self._counted, 50)

    def reply(self, choice):
        return Reply(choice, tokens_in=100, tokens_out=10)


def comparisons_of(count):
    return [Comparison(f"p{i}", f"prompt {i}", "long " * (i + 2), "short") for i in range(count)]


def test_a_judge_that_depends_on_the_order_is_asked_once_in_each():
    judge = LongerWins()
    comparisons = comparisons_of(3)
    judged = judge_comparisons(judge, comparisons, repeat=0)
    expected = {x.question for x in comparisons} | {x.question.mirrored for x in comparisons}
    assert judge.counts == dict.fromkeys(expected, 1)
    assert [x.outcome for x in judged.judgements] == [Outcome.WIN] * 3
    assert (judged.asked, judged.cached, judged.repeats) == (6, 0, [])


@pytest.mark.parametrize("swapped", [False, True])
def test_a_symmetric_judge_is_asked_in_one_order_and_the_other_follows(swapped):
    judge = LongerWins(is_symmetric=True)
    comparisons = comparisons_of(3)
    if swapped:
        comparisons = [x._replace(a=x.b, b=x.a) for x in comparisons]
    judged = judge_comparisons(judge, comparisons, repeat=0)
    assert judged.asked == judge.counts.total() == 3
    for judgement in judged.judgements:
        assert judgement.outcome is (Outcome.LOSS if swapped else Outcome.WIN)
        assert judgement.a_first.preference == (0.25 if swapped else 0.75)
        assert judgement.b_first == judgement.a_first.mirrored


def test_identical_responses_are_a_tie_of_which_nobody_is_asked():
    judge = LongerWins()
    judged = judge_comparisons(judge, [Comparison("p", "prompt", "same", "same")], repeat=1)
    assert [x.outcome for x in judged.judgements] == [Outcome.TIE]
    assert judged.judgements[0].score == 0.5
    assert "identical" in judged.judgements[0].a_first.text
    assert (judged.asked, judged.identical, judge.counts.total()) == (0, 1, 0)


def test_equal_questions_are_asked_once():
    judge = LongerWins()
    [comparison] = comparisons_of(1)
    swapped = comparison._replace(id="q", a=comparison.b, b=comparison.a)
    judged = judge_comparisons(judge, [comparison, comparison, swapped], repeat=0)
    assert judge.counts.total() == 2
    outcomes = [x.outcome for x in judged.judgements]
    assert outcomes == [Outcome.WIN, Outcome.WIN, Outcome.LOSS]


def test_a_second_call_asks_nothing_and_says_the_same(tmp_path):
    comparisons = comparisons_of(20)
    with VerdictCache(tmp_path) as cache:
        first = judge_comparisons(LongerWins(), comparisons, cache=cache, repeat=0.3)
    judge = LongerWins()
    with VerdictCache(tmp_path) as cache:
        second = judge_comparisons(judge, comparisons, cache=cache, repeat=0.3)
    assert judge.counts.total() == second.asked == 0
    assert second.cached == first.asked
    assert repr(second.judgements) == repr(first.judgements)
    assert second.repeats == first.repeats != []


def test_a_judge_with_another_fingerprint_is_asked_again():
    cache = VerdictCache()
    judge_comparisons(LongerWins(), comparisons_of(2), cache=cache, repeat=0)
    judge = LongerWins(fingerprint="other")
    assert judge_comparisons(judge, comparisons_of(2), cache=cache, repeat=0).asked == 4


def test_another_reference_is_another_question():
    cache = VerdictCache()
    comparisons = comparisons_of(2)
    judge_comparisons(LongerWins(), comparisons, cache=cache, repeat=0)
    comparisons = [x._replace(reference="a good one") for x in comparisons]
    assert judge_comparisons(LongerWins(), comparisons, cache=cache, repeat=0).asked == 4


def test_the_share_that_is_repeated_is_the_one_that_was_asked_for():
    comparisons = comparisons_of(1000)
    planned = plan_questions(LongerWins(), comparisons, repeat=0.1)
    repeated = sum(x.repetition for x in planned)
    assert abs(repeated - 200) < 4 * (2000 * 0.1 * 0.9) ** 0.5  # four standard deviations


def test_which_questions_are_repeated_depends_on_the_seed_and_not_on_the_order():
    comparisons = comparisons_of(200)

    def repeated(comparisons, seed):
        planned = plan_questions(LongerWins(), comparisons, repeat=0.2, seed=seed)
        return {x.question for x in planned if x.repetition}

    assert repeated(comparisons, 0) == repeated(comparisons[::-1], 0)
    assert repeated(comparisons, 0) != repeated(comparisons, 1)


def test_a_larger_share_repeats_the_same_questions_and_more():
    comparisons = comparisons_of(100)
    keys = [
        {x.key for x in plan_questions(LongerWins(), comparisons, repeat=share)}
        for share in (0.1, 0.5)
    ]
    assert keys[0] < keys[1]


def test_repeats_hold_both_replies_to_one_question():
    class Wavering(LongerWins):
        def reply(self, choice):
            return Reply(Choice.FIRST if self.counts.total() % 2 else Choice.TIE)

    judged = judge_comparisons(Wavering(), comparisons_of(1), repeat=1)
    pairs = {(first.choice, second.choice) for first, second in judged.repeats}
    assert len(judged.repeats) == 2
    assert {x for pair in pairs for x in pair} == {Choice.FIRST, Choice.TIE}


def test_what_came_before_a_judge_failed_is_kept(tmp_path):
    comparisons = comparisons_of(5)
    with VerdictCache(tmp_path) as cache, pytest.raises(JudgeError, match="gone"):
        judge_comparisons(LongerWins(fails_after=7), comparisons, cache=cache, repeat=0)
    with VerdictCache(tmp_path) as cache:
        judged = judge_comparisons(LongerWins(), comparisons, cache=cache, repeat=0)
    assert (judged.cached, judged.asked) == (7, 3)


def test_a_judge_that_leaves_questions_out_is_an_error_not_an_endless_loop():
    class Lazy(LongerWins):
        def replies(self, questions):
            yield 0, self.reply(Choice.FIRST)

    with pytest.raises(JudgeError, match="no reply to 3 of 4 questions"):
        judge_comparisons(Lazy(), comparisons_of(2), repeat=0)


def test_progress_counts_up_to_all_questions():
    cache = VerdictCache()
    judge_comparisons(LongerWins(), comparisons_of(2), cache=cache, repeat=0)
    lines = []
    judge_comparisons(
        LongerWins(),
        comparisons_of(4),
        cache=cache,
        repeat=0,
        progress=lambda done, total: lines.append((done, total)),
    )
    assert lines == [(5, 8), (6, 8), (7, 8), (8, 8)]


def test_an_estimate_counts_open_questions_alone():
    cache = VerdictCache()
    judge = Paid(prices=Prices(2.0, 10.0))
    judge_comparisons(judge, comparisons_of(3), cache=cache, repeat=0)
    cost = estimate(judge, comparisons_of(5), cache, repeat=0)
    assert (cost.calls, cost.tokens_in, cost.tokens_out) == (4, 400, 200)
    assert cost.price == pytest.approx((400 * 2 + 200 * 10) / 1e6)


def test_an_estimate_is_the_number_of_questions_that_are_then_asked():
    cost = estimate(LongerWins(), comparisons_of(30), repeat=0.3)
    assert cost == (
        judge_comparisons(LongerWins(), comparisons_of(30), repeat=0.3).asked,
        0,
        0,
        0,
        "",
    )


def test_an_estimate_is_a_sentence_for_the_terminal():
    text = str(estimate(Paid(prices=Prices(2.0, 10.0)), comparisons_of(10), repeat=0))
    assert text == (
        "20 calls with 2,000 tokens, and at most 1,000 tokens of replies, counted by hand. They "
        "cost at most 0.0140"
    )
    assert str(estimate(LongerWins(), comparisons_of(1), repeat=0)) == "2 calls, which cost nothing"


def test_without_prices_the_estimate_has_tokens_and_no_price():
    assert estimate(Paid(prices=None), comparisons_of(1), repeat=0) == (2, 200, 100, None, "hand")


@pytest.mark.parametrize("counted", [70, 100, 400])
def test_the_cost_stays_below_its_limit_and_what_was_paid_for_is_kept(counted):
    """Also where the count of tokens is wrong: it is corrected by what replies have cost."""
    cache, prices = VerdictCache(), Prices(1000.0, 1000.0)
    judge = Paid(prices=prices, counted=counted)
    comparisons = comparisons_of(200)  # 400 questions at 0.11 each: 44 in all
    with pytest.raises(CostReached, match="max_cost"):
        judge_comparisons(judge, comparisons, cache=cache, repeat=0, max_cost=20)
    asked = judge.counts.total()
    assert len(cache) == asked
    # One more might cost 0.1 * 1.1 + 0.05 at most, by a count that replies have corrected.
    assert 20 - 0.16 - 0.11 <= asked * 0.11 <= 20
    judged = judge_comparisons(judge, comparisons, cache=cache, repeat=0, max_cost=44)
    assert judged.asked == 400 - asked
    assert judged.cost == pytest.approx(0.11 * judged.asked)
    assert max(judge.counts.values()) == 1


def test_requests_that_were_refused_for_nothing_do_not_make_others_seem_free():
    class RefusesFirst(Paid):
        def reply(self, choice):
            if self.counts.total() <= 16:
                return Reply(Choice.UNPARSED)
            return super().reply(choice)

    judge = RefusesFirst(prices=Prices(1000.0, 0.0))
    with pytest.raises(CostReached):
        judge_comparisons(judge, comparisons_of(100), repeat=0, max_cost=0.5)
    assert (judge.counts.total() - 16) * 0.1 <= 0.5


def test_a_limit_on_the_cost_needs_prices():
    with pytest.raises(JudgeError, match="--price_in"):
        judge_comparisons(Paid(prices=None), comparisons_of(1), max_cost=1)


def test_a_judge_that_costs_nothing_never_reaches_a_limit():
    assert judge_comparisons(LongerWins(), comparisons_of(1), repeat=0, max_cost=0).asked == 2


def test_a_share_outside_of_zero_to_one_is_refused():
    with pytest.raises(ValueError, match="repeat = 5"):
        plan_questions(LongerWins(), comparisons_of(1), repeat=5)


def test_what_another_process_adds_meanwhile_is_not_asked_again(tmp_path, monkeypatch):
    monkeypatch.setattr("dpojax.evaluation.judging.asking.ROUND_AT_NO_COST", 2)
    comparisons = comparisons_of(3)
    with VerdictCache(tmp_path) as ours, VerdictCache(tmp_path) as theirs:

        class Interrupted(LongerWins):
            def replies(self, questions):
                judge_comparisons(LongerWins(), comparisons, cache=theirs, repeat=0)
                yield from super().replies(questions)

        judge = Interrupted()
        judged = judge_comparisons(judge, comparisons, cache=ours, repeat=0)
    assert [x.outcome for x in judged.judgements] == [Outcome.WIN] * 3
    assert judge.counts.total() == judged.asked == 2
