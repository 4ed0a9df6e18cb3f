"""The report of agreement shows the study's numbers, humans on humans beside judges."""

import csv
import math

import numpy as np
import pytest
from PIL import Image

from dpojax.evaluation.judging import human_report, human_study
from dpojax.evaluation.judging.human_study import HumanStudy
from dpojax.evaluation.judging.humans import HumanChoice, HumanComparison
from dpojax.evaluation.judging.verdicts import Choice, Comparison
from tests.simulated_judge import SimulatedJudge

PROMPTS = 120
JUDGES = {"good": {"noise": 0.05}, "biased": {"position_bias": 0.6, "unparsed": 0.1}}


def comparisons(levels=(1.0, 2.0, 3.0), humans=1):
    """A is the better one on even prompts; humans are wrong on every tenth."""
    sides = [Choice.FIRST, Choice.SECOND]
    return [
        HumanComparison(
            Comparison(str(i), f"prompt {i}", f"a {i}", f"b {i}"),
            tuple(
                HumanChoice(sides[(i + (i % 10 == human)) % 2], str(human), levels[i % len(levels)])
                for human in range(humans)
            ),
        )
        for i in range(PROMPTS)
    ]


def a_is_better(question):
    side, number = question.first.split()
    return (side == "a") == (int(number) % 2 == 0)


def study(**options):
    judges = [SimulatedJudge(a_is_better, name=name, **faults) for name, faults in JUDGES.items()]
    return human_study.human_agreement(judges, comparisons(**options), resamples=300)


@pytest.fixture(scope="module")
def several():
    return study(humans=3)


def cells(table):
    lines = [[cell.strip() for cell in row.strip("|").split("|")] for row in table.splitlines()]
    return [dict(zip(lines[0], line)) for line in lines[2:]]


def test_the_table_has_every_judge_with_its_outcomes_in_percent(several):
    good, biased = cells(human_report.table(several))
    assert [good["judge"], biased["judge"]] == list(JUDGES)
    for row, judge in zip((good, biased), several.judges):
        value = judge.agreement.accuracy.value
        assert row["accuracy"].startswith(f"{100 * value:.1f} % (")
        shares = [row[name] for name in ("right", "wrong", "tie", "inconsistent", "unparsed")]
        assert sum(float(cell.rstrip(" %")) for cell in shares) == pytest.approx(100, abs=0.3)
        assert row["choices"] == str(3 * PROMPTS)
    assert float(biased["inconsistent"].rstrip(" %")) > 30


def test_humans_on_humans_are_a_line_of_their_own(several):
    """Each human is wrong on a tenth of its own: two of them agree on 80 %."""
    *_, last = cells(human_report.among_humans(several))
    assert last[""] == "another human"
    assert last["accuracy"].startswith("80.0 % (")
    assert last["kappa"].startswith("0.60 (")


def test_the_figure_orders_judges_and_shows_accuracy_by_confidence(several):
    overall, confident = human_report.figure(several).axes
    names = [label.get_text() for label in overall.get_yticklabels()]
    assert names == ["good", "biased", "another human"]
    assert {text.get_text() for text in confident.texts} == {"good", "biased"}
    accuracy = [each.accuracy.value for each in several.judges[0].by_confidence.values()]
    np.testing.assert_allclose(confident.containers[0].lines[0].get_ydata(), accuracy)


def test_without_confidence_and_with_one_human_there_is_one_panel():
    (axes,) = human_report.figure(study(levels=(None,))).axes
    assert [label.get_text() for label in axes.get_yticklabels()] == ["good", "biased"]


def test_all_files_are_written_and_the_csv_has_the_same_numbers(several, tmp_path):
    human_report.write(tmp_path, several, {"file": "comparisons|1.jsonl"})
    names = {"agreement.md", "agreement.csv", "agreement.png", "agreement.pdf"}
    assert {path.name for path in tmp_path.iterdir()} == names
    text = (tmp_path / "agreement.md").read_text()
    assert "comparisons\\|1.jsonl" in text
    assert "360 pairs" in text
    with open(tmp_path / "agreement.csv") as file:
        rows = list(csv.DictReader(file))
    assert float(rows[0]["kappa"]) == pytest.approx(several.judges[0].agreement.kappa.value, 1e-5)
    with Image.open(tmp_path / "agreement.png") as image:
        assert image.size[0] >= 1000


def test_a_study_without_a_human_choice_says_that_nothing_is_known(tmp_path):
    judges = [SimulatedJudge(a_is_better)]
    empty = human_study.human_agreement(judges, [], resamples=50)
    assert math.isnan(empty.judges[0].agreement.accuracy.value)
    human_report.write(tmp_path, empty)
    assert "n/a" in (tmp_path / "agreement.md").read_text()


def test_without_a_judge_there_is_no_report(tmp_path):
    with pytest.raises(ValueError, match="at least one judge"):
        human_report.write(tmp_path, HumanStudy([], None, 0, 0))
