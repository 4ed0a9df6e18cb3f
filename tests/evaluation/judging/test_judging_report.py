"""The report's numbers are those worked out by hand, and its warnings come when they are due."""

import csv
import doctest
import io
import math
import re

import numpy as np
import pytest
from PIL import Image

from dpojax.evaluation.judging import (
    agreement,
    bootstrap,
    cautions,
    figure,
    report,
    result,
    statistics,
)
from dpojax.evaluation.judging.result import Side, summarise
from dpojax.evaluation.judging.verdicts import Choice, Comparison, Judgement, Outcome, Reply

FIRST, SECOND, TIE, UNPARSED = map(Reply, Choice)
WIN, LOSS = Judgement(FIRST, SECOND), Judgement(SECOND, FIRST)
FLIP, TIED, UNREAD = Judgement(FIRST, FIRST), Judgement(TIE, TIE), Judgement(UNPARSED, FIRST)
JUDGE = dict(judge="openai:judge|x@http://localhost", fingerprint="3f", opponent="references")


def side(policy, judgements, *, longer=0, **settings):
    """A side whose response to prompt i has 20 + i % 7 + `longer` characters, B's has 23."""
    comparisons = [
        Comparison(f"p{i}", f"prompt {i}", "a" * (20 + i % 7 + longer), "b" * 23)
        for i in range(len(judgements))
    ]
    return Side(policy, comparisons, judgements, **settings)


def mixed(wins, losses, flips=0, ties=0, unread=0):
    """Judgements in an order in which lengths say nothing of them."""
    judgements = [WIN] * wins + [LOSS] * losses + [FLIP] * flips + [TIED] * ties
    judgements += [UNREAD] * unread
    return [judgements[i] for i in np.random.default_rng(0).permutation(len(judgements))]


def summary(*sides, **options):
    return summarise(sides, **{**JUDGE, "resamples": 300, **options})


def cells(text):
    """The heading and the cells of a Markdown table."""
    lines = [re.split(r"(?<!\\)\|", line.strip().strip("|")) for line in text.splitlines()]
    heading, _, *rows = [[cell.strip() for cell in line] for line in lines]
    return [dict(zip(heading, row)) for row in rows]


def rows_of(text):
    return list(csv.DictReader(io.StringIO(text)))


def test_the_table_holds_the_numbers_worked_out_by_hand():
    judged = side("DPO", mixed(100, 40, 30, 20, 10), temperature=0.5, best_of=4)
    text = report.table(summary(judged))
    (row,) = cells(text)
    assert row["policy"] == "DPO"
    assert (row["temperature"], row["best of"]) == ("0.5", "4")
    assert row["win rate"].startswith(f"{100 * (100 + 15 + 10) / 190:.1f} % (")
    shares = [row[outcome.value] for outcome in Outcome]
    assert shares == ["50.0 %", "20.0 %", "10.0 %", "15.0 %", "5.0 %"]
    assert (row["comparisons"], row["prompts"]) == ("200", "190")


def test_details_hold_the_judges_faults_and_the_lengths():
    judged = side("DPO", mixed(10, 6, 4), repeats=[(FIRST, FIRST)] * 3 + [(FIRST, TIE)], cut=0.125)
    (row,) = cells(report.details(summary(judged)))
    assert row["position bias, points"].startswith("+20.0 (+")
    assert row["flip rate"].startswith("20.0 % (")
    assert row["repeatability"] == "75.0 % (30.1 to 95.4)"  # Wilson, of 3 in 4
    length = np.mean([20 + i % 7 for i in range(20)])
    assert (row["length of A"], row["length of B"]) == (f"{length:.1f}", "23.0")
    assert row["cut"] == "12.5 %"


def test_the_csv_has_one_row_per_side_and_judge_and_the_same_numbers():
    sides = [side("DPO", mixed(30, 20, 5, 2, 1), temperature=t) for t in (0.0, 1.0)]
    results = [summary(*sides), summary(sides[0], judge="length", is_symmetric=True)]
    rows = rows_of(report.win_rates_csv(results))
    assert [(row["judge"], row["temperature"]) for row in rows] == [
        (JUDGE["judge"], "0.0"),
        (JUDGE["judge"], "1.0"),
        ("length", "0.0"),
    ]
    first = results[0].rows[0].win_rate
    measured = [float(rows[0][name]) for name in ("win_rate", "low", "high")]
    assert measured == list(first[:3])
    assert [rows[0][o.value] for o in Outcome] == ["30", "20", "2", "5", "1"]
    assert float(rows[0]["flip_rate"]) == pytest.approx(5 / 57)
    assert rows[2]["position_bias"] == rows[2]["repeatability"] == ""


def test_differences_pair_policies_at_a_temperature_and_a_policy_with_its_first_setting():
    sides = [
        side(policy, mixed(*counts), temperature=temperature)
        for policy, counts in (("DPO", (30, 10)), ("SFT", (10, 30)))
        for temperature in (0.0, 1.0)
    ]
    measured = summary(*sides)
    pairs = {(gap.first, gap.second) for gap in measured.differences}
    assert pairs == {
        ("DPO, temperature 0", "SFT, temperature 0"),
        ("DPO, temperature 1", "SFT, temperature 1"),
        ("DPO, temperature 1", "DPO, temperature 0"),
        ("SFT, temperature 1", "SFT, temperature 0"),
    }
    lines = {
        (row["win rate of"], row["minus that of"]): row
        for row in cells(report.differences(measured))
    }
    across = lines["DPO, temperature 0", "SFT, temperature 0"]
    assert across["difference, points"].startswith("+50.0 (+")
    assert across["the first is"] == "higher"
    assert lines["DPO, temperature 1", "DPO, temperature 0"]["the first is"] == "not settled"
    assert len(rows_of(report.differences_csv([measured]))) == 4


def test_of_many_differences_the_report_shows_those_of_the_first_policy():
    sides = [
        side(policy, mixed(5, 5), temperature=temperature)
        for policy in ("DPO", "SFT", "PPO", "BoN")
        for temperature in (0.0, 0.5, 1.0)
    ]
    measured = summary(*sides)
    assert len(measured.differences) == 3 * 6 + 4 * 2
    assert len(cells(report.differences(measured))) == 3 * 3 + 2
    assert "All 26 of them are in differences.csv" in report.report([measured])


@pytest.mark.parametrize(
    ("judged", "warning"),
    [
        (side("X", mixed(30, 20)), "Few prompts"),
        (side("X", mixed(60, 40, flips=50)), "contradicts itself"),
        (side("X", mixed(60, 40, flips=50)), "favours the response that it reads first"),
        (side("X", mixed(60, 40, unread=20)), "could not be read"),
        (side("X", mixed(60, 60), cut=0.3), "cut at the limit"),
        (side("X", mixed(60, 60), longer=9), "at equal lengths is not known"),
        (side("X", mixed(60, 60), longer=9), "differ much in length"),
        (side("X", mixed(60, 60), repeats=[(FIRST, SECOND)] * 9), "often makes another choice"),
    ],
)
def test_a_warning_comes_where_it_is_due_and_nowhere_else(judged, warning):
    good = side("X", mixed(60, 60), repeats=[(FIRST, FIRST)] * 9, cut=0.01)
    assert cautions.cautions(summary(good)) == []
    assert any(warning in text for text in cautions.cautions(summary(judged)))


def test_a_win_that_comes_from_length_alone_is_said_to_be_one():
    """A is longer on 100 of 140 prompts and wins 80 of these; at equal lengths it loses."""
    gaps = np.repeat([8, 8, -2, -2], [80, 20, 10, 30])
    comparisons = [
        Comparison(str(i), "p", "a" * (20 + gap), "b" * 20) for i, gap in enumerate(gaps)
    ]
    judgements = [WIN] * 80 + [LOSS] * 20 + [WIN] * 10 + [LOSS] * 30
    texts = cautions.cautions(summary(Side("X", comparisons, judgements)))
    assert any("changes when lengths are taken into account" in text for text in texts)


def test_many_sides_with_the_same_fault_are_one_sentence_that_names_the_worst():
    sides = [side(f"policy {i}", mixed(10 + i, 10)) for i in range(6)]
    (text,) = cautions.cautions(summary(*sides))
    assert "6 sides, such as policy 0: 20)" in text


def test_the_report_is_markdown_that_no_name_can_break(tmp_path):
    judged = side("a|b", mixed(9, 5), temperature=1.0)
    report.write(tmp_path, summary(judged, template="summary, version 1", facts={"file": "x|y"}))
    text = (tmp_path / "report.md").read_text()
    assert "openai:judge\\|x@http://localhost" in text
    assert "summary, version 1" in text
    assert "x\\|y" in text
    tables = re.findall(r"(?:^\|.*\n)+", text, re.M)
    assert len(tables) == 3
    for table in tables:
        assert len({len(re.findall(r"(?<!\\)\|", line)) for line in table.splitlines()}) == 1
    names = {"report.md", "samples.md", "win_rates.csv", "differences.csv"}
    assert {p.name for p in tmp_path.iterdir()} == names | {"win_rates.png", "win_rates.pdf"}


def test_samples_show_texts_as_they_are_and_one_of_each_outcome():
    judgements = [WIN] * 30 + [LOSS, FLIP]
    judged = side("DPO", judgements)
    odd = judged.comparisons[30]._replace(a="```\n# no heading\n````", prompt="z" * 5000)
    comparisons = [*judged.comparisons[:30], odd, judged.comparisons[31]]
    text = report.samples([summary(Side("DPO", comparisons, judgements))])
    assert [f"DPO: {x}" in text for x in ("win", "loss", "inconsistent")] == [True] * 3
    assert "`````text\n```\n# no heading\n````\n`````" in text
    assert "[... 3500 characters more]" in text


def test_a_symmetric_judge_has_no_columns_of_order():
    text = report.report([summary(side("DPO", mixed(9, 5)), is_symmetric=True)])
    assert "flip rate |" not in text
    assert "inconsistent |" not in text


def test_several_judges_have_a_section_and_a_panel_each():
    sides = [side("DPO", mixed(9, 5), temperature=t) for t in (0.0, 1.0)]
    results = [summary(*sides), summary(*sides, judge="length")]
    assert "## Judge: length" in report.report(results)
    assert [axes.get_title("left") for axes in figure.figure(results).axes] == [
        "openai:judge|x",
        "length",
    ]


def test_without_a_judged_side_there_is_no_report(tmp_path):
    with pytest.raises(ValueError, match="at least one side"):
        report.write(tmp_path, summary())


def test_a_side_without_any_score_is_reported_and_not_drawn(tmp_path):
    judged = [side("DPO", [UNREAD] * 5), side("SFT", mixed(5, 5))]
    report.write(tmp_path, summary(*judged))
    first, _ = cells(report.table(summary(*judged)))
    assert (first["win rate"], first["unparsed"]) == ("n/a", "100.0 %")
    (axes,) = figure.figure([summary(*judged)]).axes
    assert [label.get_text() for label in axes.get_yticklabels()] == ["SFT"]


def curves_of(axes):
    """(x, y) of each line with marks, by x."""
    return [c.lines[0].get_xydata() for c in axes.containers]


def test_the_figure_has_a_line_per_policy_over_temperature_with_its_intervals():
    temperatures = [0.0, 0.5, 1.0]
    sides = [
        side(policy, mixed(wins + int(4 * t), 20), temperature=t)
        for policy, wins in (("DPO", 40), ("SFT", 15))
        for t in reversed(temperatures)
    ]
    measured = summary(*sides)
    (axes,) = figure.figure([measured]).axes
    assert axes.get_xlabel() == "sampling temperature"
    assert [text.get_text() for text in axes.texts] == ["SFT", "DPO"]
    for policy, curve, bars in zip(("DPO", "SFT"), curves_of(axes), axes.containers):
        rates = [row.win_rate for row in reversed(measured.rows) if row.policy == policy]
        np.testing.assert_allclose(curve[:, 0], temperatures, atol=0.02)
        np.testing.assert_allclose(curve[:, 1], [rate.value for rate in rates])
        (segments,) = [line.get_segments() for line in bars.lines[2]]
        ends = [[rate.low, rate.high] for rate in rates]
        np.testing.assert_allclose([segment[:, 1] for segment in segments], ends)
    assert any(
        np.all(np.asarray(line.get_ydata()) == 0.5)
        for line in axes.lines
        if line.get_linestyle() == "--"
    )


def test_names_of_lines_that_end_at_the_same_height_do_not_overlap():
    sides = [
        side(f"policy {i}", mixed(30 + i % 2, 20), temperature=t)
        for i in range(6)
        for t in (0.0, 1.0)
    ]
    drawn = figure.figure([summary(*sides)])
    drawn.draw_without_rendering()
    boxes = [text.get_window_extent() for text in drawn.axes[0].texts]
    assert len(boxes) == 6
    for i, box in enumerate(boxes):
        assert not any(box.overlaps(other) for other in boxes[:i])
        assert box.x1 <= drawn.bbox.x1
        assert drawn.bbox.y0 <= box.y0
        assert box.y1 <= drawn.bbox.y1


def test_policies_at_one_setting_have_a_line_each_and_their_interval(tmp_path):
    measured = summary(*(side(name, mixed(wins, 20)) for name, wins in (("DPO", 40), ("SFT", 15))))
    (axes,) = figure.figure([measured]).axes
    assert [label.get_text() for label in axes.get_yticklabels()] == ["DPO", "SFT"]
    values = [curve[0, 0] for curve in curves_of(axes)]
    np.testing.assert_allclose(values, [row.win_rate.value for row in measured.rows])
    figure.draw([measured], tmp_path / "x.png", tmp_path / "x.pdf")
    with Image.open(tmp_path / "x.png") as image:
        assert image.size[0] >= 800
    assert (tmp_path / "x.pdf").read_bytes().startswith(b"%PDF")


@pytest.mark.parametrize("module", [agreement, bootstrap, cautions, figure, result, statistics])
def test_examples_in_docstrings_are_right(module):
    outcome = doctest.testmod(module)
    assert outcome.attempted > 0
    assert outcome.failed == 0


def test_a_row_of_an_empty_side_is_unknown():
    (row,) = summary(Side("nobody", [], [])).rows
    assert math.isnan(row.win_rate.value)
    assert row.length_controlled is None
