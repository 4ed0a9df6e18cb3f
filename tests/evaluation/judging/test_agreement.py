"""Agreement with humans against tables worked out by hand."""

import math

import numpy as np
import pytest

from dpojax.evaluation.judging.agreement import agreement, by_bucket, cohen_kappa, human_agreement
from dpojax.evaluation.judging.verdicts import Choice, Judgement, Outcome, Reply

FIRST, SECOND, TIE, UNPARSED = map(Reply, Choice)
A, B = Judgement(FIRST, SECOND), Judgement(SECOND, FIRST)
FLIPS, TIED, UNREAD = (
    Judgement(FIRST, FIRST),
    Judgement(TIE, TIE),
    Judgement(FIRST, UNPARSED),
)


def rows(**counts):
    """Judgements and human choices; `AB=3`: three rows where the judge says A and the human B."""
    judges = {"A": A, "B": B, "F": FLIPS, "T": TIED, "U": UNREAD}
    humans = {"A": Choice.FIRST, "B": Choice.SECOND, "T": Choice.TIE}
    names = [name for name, count in counts.items() for _ in range(count)]
    return [judges[name[0]] for name in names], [humans[name[1]] for name in names]


def test_accuracy_and_kappa_of_a_table_worked_out_by_hand():
    """20 + 15 of 50 agree. Chance: 25/50 * 30/50 + 25/50 * 20/50 = 1/2. Kappa: 0.2 / 0.5."""
    judgements, humans = rows(AA=20, AB=5, BA=10, BB=15)
    measured = agreement(judgements, humans, range(50))
    assert measured.accuracy.value == pytest.approx(0.7)
    assert measured.kappa.value == pytest.approx(0.4)
    assert (measured.right, measured.wrong, measured.choices) == (35, 15, 50)
    assert measured.kappa.low < 0.4 < measured.kappa.high


def test_undecided_judgements_are_not_right_and_are_reported():
    judgements, humans = rows(AA=6, BA=2, FA=4, TB=3, UB=5, AT=7)
    measured = agreement(judgements, humans, range(27))
    assert measured.accuracy.value == pytest.approx(6 / 20)
    assert measured.decided_accuracy.value == pytest.approx(6 / 8)
    assert measured.undecided == {Outcome.TIE: 3, Outcome.INCONSISTENT: 4, Outcome.UNPARSED: 5}
    assert (measured.human_ties, measured.prompts, measured.choices) == (7, 20, 20)


def test_the_interval_of_kappa_is_that_of_its_large_sample_error():
    """Fleiss, Cohen & Everitt 1969, eq. 13: of 2,000 comparisons, one per prompt."""
    shares = np.array([[0.4, 0.1], [0.2, 0.3]])
    judgements, humans = rows(AA=800, AB=200, BA=400, BB=600)
    measured = agreement(judgements, humans, range(2000)).kappa
    by_judge, by_human, agree = shares.sum(1), shares.sum(0), np.trace(shares)
    chance = by_judge @ by_human
    kappa = (agree - chance) / (1 - chance)
    diagonal = sum(
        shares[i, i] * (1 - (by_judge[i] + by_human[i]) * (1 - kappa)) ** 2 for i in (0, 1)
    )
    others = sum(shares[i, 1 - i] * (by_human[i] + by_judge[1 - i]) ** 2 for i in (0, 1))
    variance = diagonal + (1 - kappa) ** 2 * others - (kappa - chance * (1 - kappa)) ** 2
    error = math.sqrt(variance / 2000) / (1 - chance)
    assert measured.value == pytest.approx(kappa)
    np.testing.assert_allclose(measured.high - measured.low, 2 * 1.96 * error, rtol=0.05)


def test_kappa_is_one_in_perfect_agreement_and_unknown_where_only_one_side_is_ever_chosen():
    perfect = agreement(*rows(AA=20, BB=20), range(40))
    assert perfect.kappa.value == 1
    assert 0.7 < perfect.kappa.low < 1
    assert math.isnan(agreement(*rows(AA=40), range(40)).kappa.value)
    assert math.isnan(float(cohen_kappa([[3, 0], [0, 0]])))


def test_a_judge_that_guesses_has_a_kappa_of_zero_however_often_it_is_right():
    """Both say A in 90 % of all comparisons, independently: accuracy 0.82."""
    measured = agreement(*rows(AA=810, AB=90, BA=90, BB=10), range(1000))
    assert measured.accuracy.value == pytest.approx(0.82)
    assert measured.kappa.value == pytest.approx(0, abs=1e-12)


def test_a_comparison_with_several_humans_counts_once():
    """One comparison with three right choices, one with a wrong one."""
    judgements, humans = rows(AA=3, AB=1)
    measured = agreement(judgements, humans, ["p", "p", "p", "q"], ["x", "x", "x", "y"])
    assert measured.accuracy.value == pytest.approx(0.5)
    assert (measured.right, measured.wrong) == (3, 1)


def test_comparisons_of_one_prompt_are_one_cluster():
    """Eight comparisons of a post that are right or wrong together: as uncertain as one."""
    judgements, humans = rows(AA=200, AB=120)
    posts = np.repeat(np.arange(40), 8)
    clustered = agreement(judgements, humans, posts).accuracy
    single = agreement(*rows(AA=25, AB=15), range(40)).accuracy
    np.testing.assert_allclose(clustered, single, atol=0.02)


def test_by_bucket_splits_rows_and_keeps_numbers_in_order():
    judgements, humans = rows(AA=5, AB=5, BB=8, BA=2, TA=3)
    buckets = [1] * 10 + [10] * 10 + [None] * 3
    tables = by_bucket(judgements, humans, range(23), buckets)
    assert list(tables) == [1, 10]
    assert [table.accuracy.value for table in tables.values()] == [0.5, 0.8]


def test_humans_against_humans_by_hand():
    """x: three humans, 1 of 3 pairs agrees; y: two that agree; z: one alone; w: one calls a tie.

    The table in both orders: x gives 1/3 AA and 1/3 for each mixed cell, y gives 1 BB. It agrees in
    (1/3 + 1) / 2 = 2/3; A has (1/3 + 1/3) / 2 = 1/3, so chance is 1/9 + 4/9.
    """
    first, second, tie = Choice.FIRST, Choice.SECOND, Choice.TIE
    measured = human_agreement(
        [first, first, second, second, second, first, first, tie],
        ["p", "p", "p", "q", "q", "q", "r", "r"],
        ["x", "x", "x", "y", "y", "z", "w", "w"],
    )
    assert measured.agreement.value == pytest.approx(2 / 3)
    assert measured.kappa.value == pytest.approx((2 / 3 - 5 / 9) / (4 / 9))
    assert (measured.comparisons, measured.pairs) == (2, 4)
    assert human_agreement([first, second], ["p", "q"], ["x", "y"]) is None


def test_without_a_human_choice_nothing_is_known():
    measured = agreement(*rows(AT=3), range(3))
    assert math.isnan(measured.accuracy.value)
    assert math.isnan(measured.kappa.value)
    assert (measured.choices, measured.human_ties) == (0, 3)


def test_columns_of_different_lengths_are_refused():
    with pytest.raises(ValueError, match="one entry of each argument"):
        agreement([A], [Choice.FIRST, Choice.SECOND], ["p"])
