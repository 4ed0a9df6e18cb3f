"""Human choices read from files, and judges held against them."""

import csv
import json

import pytest

from dpojax.data.records import DataError
from dpojax.evaluation.judging import human_study
from dpojax.evaluation.judging.agreement import cohen_kappa
from dpojax.evaluation.judging.human_study import human_agreement
from dpojax.evaluation.judging.humans import HumanChoice, read_humans
from dpojax.evaluation.judging.open_judge import open_judge
from dpojax.evaluation.judging.verdicts import Choice, Comparison
from dpojax.evaluation.rewards import exact_reviews

FIRST, SECOND, TIE = Choice.FIRST, Choice.SECOND, Choice.TIE


def write(tmp_path, *rows):
    path = tmp_path / "humans.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def summaries(first, second, choice, *, post="p1", worker="w1", policies=("x", "y"), **extra):
    """A row of Stiennon et al."""
    texts = [{"text": t, "policy": p} for t, p in zip((first, second), policies)]
    info = {"id": post, "post": f"post {post}", "title": "t", "subreddit": "s"}
    row = {"info": info, "summaries": texts, "choice": choice, "worker": worker}
    return row | {"extra": extra} if extra else row


def plain(choice, **more):
    return {"prompt": "p", "a": "one", "b": "other", "choice": choice} | more


def test_summaries_keep_their_order_and_confidence_is_the_distance_from_the_middle(tmp_path):
    rows = [summaries("one", "other", 1, confidence=9), summaries("a", "b", 0, post="p2")]
    first, second = read_humans(write(tmp_path, *rows))
    prompt = "SUBREDDIT: r/s\n\nTITLE: t\n\nPOST: post p1\n\nTL;DR:"
    assert first.comparison == Comparison("p1", prompt, "one", "other")
    assert first.choices == (HumanChoice(SECOND, "w1", 4),)
    assert second.choices == (HumanChoice(FIRST, "w1", None),)


def test_choices_of_several_workers_are_one_comparison_in_whichever_order_they_read(tmp_path):
    rows = [
        summaries("one", "other", 0, worker="w1"),
        summaries("one", "third", 1, worker="w1"),
        summaries("other", "one", 0, worker="w2"),
        summaries("one", "other", 0, post="p2", worker="w3"),
    ]
    first, *others = read_humans(write(tmp_path, *rows))
    assert [(c.worker, c.choice) for c in first.choices] == [("w1", FIRST), ("w2", SECOND)]
    assert [len(each.choices) for each in others] == [1, 1]


def test_the_authors_summary_is_the_reference_where_it_is_not_compared(tmp_path):
    rows = [
        summaries("one", "other", 0),
        summaries("by the author", "one", 0, policies=("ref", "x")),
        summaries("one", "other", 0, post="p2"),
    ]
    references = [each.comparison.reference for each in read_humans(write(tmp_path, *rows))]
    assert references == ["by the author", "", ""]


@pytest.mark.parametrize(
    ("choice", "expected"), [("a", FIRST), ("B", SECOND), (" tie ", TIE), ("A", FIRST)]
)
def test_plain_rows_name_a_b_or_tie(tmp_path, choice, expected):
    (bare,) = read_humans(write(tmp_path, plain(choice)))
    assert bare.comparison == Comparison("p", "p", "one", "other")
    assert bare.choices == (HumanChoice(expected),)
    more = {"worker": 7, "confidence": 0.5, "id": 12, "reference": "good"}
    (full,) = read_humans(write(tmp_path, plain(choice, **more)))
    assert full.comparison == Comparison("12", "p", "one", "other", "good")
    assert full.choices == (HumanChoice(expected, "7", 0.5),)


@pytest.mark.parametrize(
    ("row", "message"),
    [
        (plain("c"), r"humans.jsonl:2: field 'choice' should be \"a\", \"b\" or \"tie\", got"),
        (plain(None), "field 'choice' should be"),
        ({"prompt": "p", "a": "x", "choice": "a"}, "field 'b' is missing"),
        (plain("a", confidence="much"), "field 'confidence' should be a finite number"),
        (summaries("a", "b", 2), "field 'choice' should be 0 or 1"),
        (summaries("a", "b", True), "field 'choice' should be 0 or 1"),
        (summaries("a", None, 1), r"field 'summaries.1.text' should be text"),
        (summaries("a", "b", 0, confidence=10), "field 'extra.confidence' should be a number from"),
        (summaries("a", "b", 0, confidence=7), "is 7, which says summary 1, but the choice is 0"),
        ({"info": {}, "summaries": [], "choice": 0}, "field 'info.subreddit' is missing"),
        (plain("b", worker="w0"), "'w0' has a second choice on the comparison of humans.jsonl:1"),
    ],
)
def test_a_row_that_cannot_be_used_is_named_with_its_field(tmp_path, row, message):
    with pytest.raises(DataError, match=message):
        read_humans(write(tmp_path, plain("a", worker="w0"), row))


def test_a_file_without_rows_is_refused(tmp_path):
    with pytest.raises(DataError, match="humans"):
        read_humans(write(tmp_path))


def test_the_published_comparisons_are_read_whole(shared):
    folder = shared / "data/summarize-from-feedback/comparisons"
    humans = read_humans(str(folder / "batch13.json.gz"))
    choices = [choice for each in humans for choice in each.choices]
    assert len(choices) == 1097
    assert sum(each.comparison.a.startswith(" ") for each in humans) == len(humans)
    assert {choice.confidence for choice in choices} == {1, 2, 3, 4}


@pytest.fixture
def study(tmp_path):
    """Two judges on three comparisons: one has the choices of two workers, one is a human's tie."""
    rows = [
        {"prompt": "p0", "a": "longer one", "b": "short", "choice": "a", "confidence": 1},
        {"prompt": "p1", "a": "short", "b": "longer one", "choice": "a", "worker": "w1"},
        {"prompt": "p1", "a": "longer one", "b": "short", "choice": "a", "worker": "w2"},
        {"prompt": "p2", "a": "longer one", "b": "short", "choice": "tie", "confidence": 2},
    ]
    judges = [open_judge("length"), open_judge("length:shorter")]
    return human_agreement(judges, read_humans(write(tmp_path, *rows)), resamples=100)


def test_judges_are_held_against_each_choice(study):
    longer, shorter = study.judges
    assert (study.comparisons, study.choices) == (3, 4)
    assert (longer.agreement.right, longer.agreement.wrong) == (2, 1)
    assert (shorter.agreement.right, shorter.agreement.wrong) == (1, 2)
    assert longer.agreement.human_ties == 1
    # p0 is right; of p1 one of two humans agrees: (1 + 1/2) / 2.
    assert longer.agreement.accuracy.value == pytest.approx(0.75)
    assert longer.by_several.accuracy.value == pytest.approx(0.5)
    assert longer.by_confidence[1].accuracy.value == 1.0
    assert len(longer.judged.judgements) == 3


def test_humans_stand_beside_the_judges(study):
    assert (study.humans.comparisons, study.humans.pairs) == (1, 1)
    assert study.humans.agreement.value == 0.0
    # The two chose differently: both off-diagonal cells are 1/2.
    assert study.humans.kappa.value == pytest.approx(float(cohen_kappa([[0, 0.5], [0.5, 0]])))


def test_the_table_and_the_csv_have_the_same_numbers(study, tmp_path):
    lines = human_study.table(study)
    assert max(map(len, lines)) <= 100
    text = "\n".join(lines)
    assert "4 human choices on 3 comparisons, 1 of them with several humans" in text
    human_study.write_csv(study, tmp_path / "agreement.csv")
    with open(tmp_path / "agreement.csv") as file:
        rows = {(row["judge"], row["part"]): row for row in csv.DictReader(file)}
    assert set(rows) == {
        *((judge, part) for judge in ("length", "length:shorter") for part in PARTS),
        (human_study.HUMANS, "several humans"),
    }
    longer = study.judges[0].agreement
    row = rows["length", "all"]
    assert float(row["accuracy"]) == longer.accuracy.value
    assert (row["right"], row["wrong"], row["tie"], row["prompts"]) == ("2", "1", "0", "2")
    line = next(line for line in text.splitlines() if line.startswith("length "))
    assert f"{longer.accuracy.value:.3f} [{longer.accuracy.low:.3f}" in line


PARTS = ("all", "several humans", "confidence 1", "confidence 2")


def test_the_exact_judge_agrees_with_choices_by_the_exact_reward(tmp_path):
    """Known truth: the humans here are the oracle, with every fifth choice turned round."""
    words = ["was great", "was awful", "was fine", "was dull", "was superb"]
    pairs = [(f" {a} .", f" {b} .") for a in words for b in words if a < b]
    prompts = [f"the film {'really ' * i}" for i in range(6) for _ in pairs]
    pairs = pairs * 6
    scores = [exact_reviews("log_odds")(prompts, side) for side in zip(*pairs)]
    rows = []
    for prompt, (a, b), first, second in zip(prompts, pairs, *scores):
        if first != second:
            is_first = (first > second) != (len(rows) % 5 == 0)
            choice = "a" if is_first else "b"
            rows.append({"prompt": f"{prompt}", "a": a, "b": b, "choice": choice})
    rows = rows[: len(rows) // 5 * 5]
    assert len(rows) >= 40
    study = human_agreement([open_judge("exact", tie=0.0)], read_humans(write(tmp_path, *rows)))
    (exact,) = study.judges
    assert exact.agreement.accuracy.value == pytest.approx(0.8, abs=1e-12)
    assert study.humans is None
