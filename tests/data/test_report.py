"""The report counts all, shows two examples per cause, and says the same as text and as JSON."""

import ast
import json
import pathlib

import numpy as np
import pytest

import dpojax
from dpojax.data.records import DataError
from dpojax.data.report import CAUSES, OUTCOMES, Report


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
    with pytest.raises(KeyError, match=r"'no such cause' has no explanation: .* report.CAUSES"):
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
    assert [lines[lines.index(line) + 1].strip() for line in causes] == ["f:19, f:20", "f:3"]
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
    table = r"all 3 records were dropped:(.|\n)*too_long.*\n *f:19, f:20"
    with pytest.raises(DataError, match=table):
        report.require_some()


def test_an_empty_report_prints_its_first_line_alone():
    assert str(Report()) == "0 records read, 0 kept, 0 dropped"


@pytest.mark.parametrize("outcome", OUTCOMES)
@pytest.mark.parametrize("cause", CAUSES)
def test_every_cause_can_be_counted_and_is_printed_with_its_words(cause, outcome):
    report = Report()
    report.read = 1
    report.count(outcome, cause, "f:1")
    assert f"{cause}: {CAUSES[cause]}" in str(report)


@pytest.mark.parametrize("outcome", OUTCOMES)
@pytest.mark.parametrize("cause", CAUSES)
def test_a_table_of_causes_fits_a_terminal_of_100_columns(cause, outcome):
    report = Report()
    report.read = 10_000_000
    ids = [f"train-00000-of-00012-{'ab12' * 8}.parquet:{number}" for number in (1, 2)]
    for id in ids:
        report.count(outcome, cause, id)
    lines = str(report).splitlines()
    assert max(map(len, lines)) <= 100
    assert [line.strip() for line in lines[-2:]] == ids


def test_a_text_of_one_token_is_counted_and_explained():
    report = Report()
    report.read = 2
    report.count("dropped", "one_token", "f:2")
    assert "  one_token: the text has one token, and the tokenizer puts no" in str(report)


def named_causes(trees: list[ast.Module]) -> set[str]:
    """Every string that code passes to a parameter `cause`, or returns to a variable `cause`."""
    nodes = [node for tree in trees for node in ast.walk(tree)]
    positions, sources, causes = {}, set(), []
    for node in nodes:
        if isinstance(node, ast.ClassDef):
            fields = [x.target.id for x in node.body if isinstance(x, ast.AnnAssign)]
            functions = [x for x in node.body if isinstance(x, ast.FunctionDef)]
            init = next((x for x in functions if x.name == "__init__"), None)
            names = [x.arg for x in init.args.args[1:]] if init else fields
        elif isinstance(node, ast.FunctionDef):
            names = [x.arg for x in node.args.args if x.arg != "self"]
        elif isinstance(node, ast.Assign) and getattr(node.targets[0], "id", "") == "cause":
            sources.add(getattr(node.value, "func", None) and called(node.value))
            continue
        else:
            continue
        if "cause" in names:
            positions[node.name] = names.index("cause")
    for node in nodes:
        if isinstance(node, ast.Call) and called(node) in positions:
            place = positions[called(node)]
            keywords = [x.value for x in node.keywords if x.arg == "cause"]
            causes += [*node.args[place : place + 1], *keywords]
        elif isinstance(node, ast.FunctionDef) and node.name in sources:
            causes += [x.value for x in ast.walk(node) if isinstance(x, ast.Return)]
    return {text for cause in causes for text in strings(cause)}


def called(node: ast.Call) -> str:
    return getattr(node.func, "id", getattr(node.func, "attr", ""))


def strings(node: ast.expr | None) -> set[str]:
    if isinstance(node, ast.IfExp):
        return strings(node.body) | strings(node.orelse)
    return {node.value} if isinstance(getattr(node, "value", None), str) else set()


def test_causes_are_found_wherever_they_are_named():
    code = """
class Reject:
    id: str
    cause: str
class Drop(Exception):
    def __init__(self, cause): ...
def count(self, outcome, cause, id): ...
def why(x):
    return "a" if x else "b"
cause = why(1)
report.count("dropped", "c", id)
report.count("dropped", cause="d", id=id)
raise Drop("e" if x else "f")
Reject("id", "g")
"""
    assert named_causes([ast.parse(code)]) == set("abcdefg")


def test_the_report_explains_every_cause_that_the_code_names():
    """Else counting it would end a run, at the first record that has it."""
    files = pathlib.Path(dpojax.__file__).parent.rglob("*.py")
    causes = named_causes([ast.parse(path.read_text(encoding="utf-8")) for path in files])
    assert causes <= CAUSES.keys()
    # So many are known to be named; fewer would mean that the search has gone blind.
    assert {"too_long", "prompts_differ", "one_token", "all_tied", "beyond_limit"} <= causes


def test_two_reports_add_up_to_the_report_on_all(report):
    other, whole = Report(), Report()
    other.read, other.kept = 4, 1
    other.lengths["prompt"].update([2, 40])
    other.starts[1], other.ends["without EOS"] = 1, 2
    for id in ("g:1", "g:2", "g:3"):
        other.count("dropped", "too_long", id)
        other.count_field("images", id)
    other.count("noted", "boundary_merge", "g:4")
    whole.add(report)
    whole.add(other)
    assert (whole.read, whole.kept, whole.dropped) == (25, 19, 6)
    tallies = whole.tallies["dropped"]["too_long"], whole.tallies["noted"]["boundary_merge"]
    assert [tally.count for tally in tallies] == [6, 2]
    assert [tally.examples for tally in tallies] == [["f:19", "f:20"], ["f:3", "g:4"]]
    assert (whole.unread["images"].count, whole.unread["images"].examples) == (3, ["g:1", "g:2"])
    assert (whole.lengths["prompt"][2], whole.lengths["prompt"][40]) == (2, 1)
    assert (whole.starts, whole.ends) == ({1: 19}, {"with EOS": 36, "without EOS": 2})
    assert report.number("dropped", "too_long") == 3  # the part is as it was


def test_fields_that_were_not_read_have_a_table_of_their_own(report):
    assert "not read" not in str(report)
    for number in range(1, 4):
        report.count_field("images", f"f:{number}")
    report.count_field("source", "f:9")
    table = str(report).split("fields that were not read")[1].split("\n\n")[0].splitlines()
    assert [line.split() for line in table[1:]] == [
        ["images", "3", "14.29", "%", "f:1,", "f:2"],
        ["source", "1", "4.76", "%", "f:9"],
    ]
    assert json.loads(report.to_json())["fields not read"]["images"]["count"] == 3
    assert Report.from_content(report.to_content()).unread == report.unread
