"""Every form of docs/data.md parses to the record that the page says."""

import ast
import json
import pathlib
import re

import pytest

from dpojax.data import records
from dpojax.data.records import Record, parse, read_columns
from dpojax.data.report import CAUSES

ROOT = pathlib.Path(__file__).resolve().parents[2]
PAGE = (ROOT / "docs/data.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"### (\w+)\n(?:(?!###).)*?```json\n(.*?)```", PAGE, re.DOTALL)
ROWS = [(form, json.loads(line)) for form, block in BLOCKS for line in block.splitlines()]


def user(text):
    return {"role": "user", "content": text}


def assistant(text):
    return {"role": "assistant", "content": text}


def said(content):
    """The words of a content, without roles and white space."""
    text = content if isinstance(content, str) else " ".join(m["content"] for m in content)
    return text.strip()


def test_every_form_has_its_examples_on_the_page():
    assert [form for form, _ in BLOCKS] == [
        "pair",
        "hh",
        "judged",
        "comparison",
        "instruction",
        "ranked",
        "unpaired",
        "article",
        "text",
        "classified",
    ]
    assert {form for form, _ in BLOCKS} == records.FORMS.keys()


@pytest.mark.parametrize(("form", "row"), ROWS)
def test_an_example_of_the_page_has_its_form_and_parses(form, row):
    if form != "classified":
        assert records.detect(row) == form
    record = parse(row, "f:1", form)
    assert isinstance(record, Record)
    if form in ("pair", "hh", "judged"):
        assert [said(response) for response in record.responses] == ["Because.", "No."]
        assert "Why?" in said(record.prompt)
        assert record.rank == ((0, 0) if row.get("winner") == "tie" else None)
    if form == "ranked":
        assert said(record.responses[0]) == "Because."
        assert said(record.responses[-1]) == "No."
        assert record.rank is None
    if form == "article":
        info = {"article": row["article"]}
        summaries = [{"text": " Rain."}, {"text": " Sun."}]
        compared = parse({"info": info, "summaries": summaries, "choice": 0}, "f:1")
        assert (record.prompt, record.responses[0]) == (compared.prompt, compared.responses[0])
    if form == "unpaired":
        assert record.label is (said(record.responses[0]) == "Because.")


def test_scores_go_with_the_answers_that_a_verdict_orders():
    row = {"question": "q", "answer_0": "a", "answer_1": "b", "score_0": -0.5, "score_1": 0.5}
    assert parse(row, "f:1") == Record("f:1", "q", ("b", "a"), scores=(0.5, -0.5))
    row = {"prompt": "q", "response1": "a", "response2": "b", "overall_preference": 3}
    assert parse(row, "f:1") == Record("f:1", "q", ("b", "a"), scores=(3.0, 0.0))
    row = {"history": "q", "human_ref_A": "a", "human_ref_B": "b", "labels": 1}
    row |= {"score_A": 4, "score_B": 40}  # SHP: the label decides, not the votes
    assert parse(row, "f:1") == Record("f:1", "q", ("a", "b"), scores=(4.0, 40.0))


@pytest.mark.parametrize("value", [0, "tie", "Tie (bothbad)", "both_bad"])
def test_a_tie_is_two_equal_ranks(value):
    row = {"prompt": "q", "response_a": "a", "response_b": "b"}
    row |= {"overall_preference" if value == 0 else "winner": value}
    assert parse(row, "f:1").all_tied


def test_turns_of_the_chatbot_arena_are_a_dialogue():
    row = {"prompt": '["q", "r"]', "response_a": '["a", "b"]', "response_b": '["a", "c"]'}
    row |= {"winner_model_a": "0", "winner_model_b": "1", "winner_tie": "0"}  # of a CSV file
    record = parse(row, "f:1")
    assert record.prompt == (user("q"), assistant("a"), user("r"))
    assert record.responses == ((assistant("c"),), (assistant("b"),))


@pytest.mark.parametrize(
    ("names", "row"),
    [
        ("prompt=q.text, chosen=r[0], rejected=r[-1]", {"q": {"text": "q"}, "r": ["a", "x", "b"]}),
        ("prompt=r[0].c,chosen=r[1].c,rejected=r[2].c", {"r": [{"c": x} for x in "qab"]}),
        # Names change places; a column may have a dot in its name.
        (
            "chosen=rejected,rejected=chosen,prompt=a.b",
            {"chosen": "b", "rejected": "a", "a.b": "q"},
        ),
        (
            "prompt=question,-prompt",
            {"question": "q", "prompt": "old", "chosen": "a", "rejected": "b"},
        ),
        ("prompt=question", {"question": "q", "prompt": None, "chosen": "a", "rejected": "b"}),
    ],
)
def test_a_mapping_takes_fields_from_where_they_are(names, row):
    found = set()
    columns = read_columns(names)
    assert parse(columns.apply(row, "f:1", found), "f:1") == Record("f:1", "q", ("a", "b"))
    assert found == columns.paths.keys()


def test_a_slice_of_a_dialogue_is_a_dialogue():
    row = {"turns": [user("q"), assistant("a"), user("r"), assistant("b")]}
    columns = read_columns("prompt=turns[:-1],completion=turns[-1]")
    record = parse(columns.apply(row, "f:1", set()), "f:1")
    assert record == Record("f:1", tuple(row["turns"][:3]), ((assistant("b"),),))


@pytest.mark.parametrize(
    "names", ["question", "=q", "prompt=", "prompt=q,prompt=r", "prompt=[0]", "prompt=a[x]", "a=.b"]
)
def test_a_mapping_that_is_not_understood_says_how_to_write_one(names):
    with pytest.raises(records.DataError, match=r"columns: .*NAME=PATH"):
        read_columns(names)


def test_the_page_has_every_cause_that_parsing_gives():
    given = set()
    for path in (ROOT / "dpojax/data/records").glob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Constant) and node.value in CAUSES:
                given.add(node.value)
    given -= {"json_text", "made_dialogue"}  # notes
    given -= {"undesirable"}  # a word for false
    table = PAGE.split("| cause |")[1]
    assert set(re.findall(r"^\| `(\w+)` \|", table, re.MULTILINE)) == given
    for name in given:
        assert f"| `{name}` | {CAUSES[name]} |" in table
