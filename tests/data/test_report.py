"""The report counts all, shows two examples per cause, and says the same as text and as JSON."""

import json

import numpy as np
import pytest

from dpojax.data.records import DataError
from dpojax.data.report import Report


@pytest.fixture
def report():
    """21 records of 2..22 prompt tokens, three of them dropped."""
    report = Report()
    report.read, report.kept = 21, 18
    report.lengths["prompt"].update(range(2, 23))
    report.lengths["longest"].update(range(1002, 1023))
    report.starts[1] = 18
    report.ends["with EOS"] = 36
    for number in (19, 20, 21):
        report.count("dropped", "too_long", f"f:{number}")
    report.count("noted", "boundary_merge", "f:3")
    return report


def test_examples_are_two_per_cause_and_counts_are_of_all(report):
    tally = report.tallies["dropped"]["too_long"]
    assert (tally.count, tally.examples) == (3, ["f:19", "f:20"])
    assert (report.dropped, report.number("noted", "boundary_merge")) == (3, 1)
    assert report.number("cut", "prompt_start") == 0


def test_an_unknown_cause_or_outcome_is_a_bug_and_raises(report):
    with pytest.raises(KeyError):
        report.count("dropped", "no such cause", "f:1")
    with pytest.raises(KeyError):
        report.count("lost", "too_long", "f:1")


def test_the_json_states_counts_and_lengths(report):
    content = json.loads(report.to_json())
    values = np.arange(2, 23)
    assert content["tokens"]["prompt"] == {
        "count": 21,
        "mean": values.mean(),
        "median": np.median(values),
        "p95": np.quantile(values, 0.95),
        "max": 22,
    }
    assert content["dropped"] == {"too_long": {"count": 3, "examples": ["f:19", "f:20"]}}
    assert content["cut"] == {}
    assert (content["read"], content["kept"]) == (21, 18)
    assert (content["bos"], content["eos"]) == ({"1": 18}, {"with EOS": 36})


def test_the_text_is_an_aligned_table(report):
    lines = str(report).splitlines()
    assert lines[0] == "21 records read, 18 kept, 3 dropped"
    causes = [line for line in lines if "too_long" in line or "boundary_merge" in line]
    assert [line.split()[-1] for line in causes] == ["f:20", "f:3"]
    assert causes[0].index("14.29 %") + 7 == causes[1].index("4.76 %") + 6
    lengths = [line for line in lines if line.startswith(("  prompt", "  prompt + longest"))]
    assert [line.split()[-4:] for line in lengths] == [
        ["12.0", "12.0", "21.0", "22"],
        ["1,012.0", "1,012.0", "1,021.0", "1,022"],
    ]
    assert len(lengths[0]) == len(lengths[1])


def test_all_dropped_raises_with_the_causes_and_some_kept_does_not(report):
    report.require_some()
    report.read = 3
    with pytest.raises(DataError, match=r"all 3 records were dropped:(.|\n)*too_long.*f:19, f:20"):
        report.require_some()


def test_an_empty_report_prints_its_first_line_alone():
    assert str(Report()) == "0 records read, 0 kept, 0 dropped"
