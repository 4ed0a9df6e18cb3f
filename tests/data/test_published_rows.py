"""Rows as published data sets have them: what is read of each, and what is told of the others."""

import json

import pytest

from dpojax.data.parsing import ParseConfig, parse_rows
from dpojax.data.records import DataError, read_columns
from dpojax.data.report import Report
from dpojax.data.sources import read
from tests.data.chat_tokenizers import assistant, user

CALL = {"name": "add", "arguments": {"x": 1}}
TOOLS = [{"type": "function", "function": {"name": "add"}}]
CALLED = {"type": "function", "function": CALL}
ALPACA = (
    "Below is an instruction that describes a task. Write a response that appropriately completes "
    "the request.\n\n### Instruction:\nq\n\n### Input:\nabout\n\n### Response:\n"
)


def turns(content):
    """A prompt or response in short: its texts with the first letters of their roles."""
    if isinstance(content, str):
        return content
    return [f"{turn['role'][0]}:{turn['content']}" for turn in content]


def parsed(row, columns=""):
    report = Report()
    config = ParseConfig(columns=read_columns(columns))
    records = list(parse_rows([(row, "f:1")], report, config))
    assert report.read == len(records) + report.dropped
    return records, report


READ = {
    "dolly": (
        {"instruction": "q", "context": "about", "response": "a", "category": "qa"},
        (ALPACA, "a"),
        {"category"},
    ),
    "alpaca_farm": (
        {"instruction": "q", "input": "about", "output_1": "b", "output_2": "a", "preference": 2},
        ("q\nabout", "a", "b"),
        set(),
    ),
    "distilabel": (
        {"instruction": "q", "input": "about", "chosen_response": "a", "rejected_response": "b"},
        ("q\nabout", "a", "b"),
        set(),
    ),
    "magpie": (
        {
            "instruction": "q",
            "response": "a",
            "conversations": [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}],
        },
        (["u:q"], ["a:a"]),
        {"instruction", "response"},
    ),
    "aya": ({"inputs": "q", "targets": "a"}, ("q", "a"), set()),
    "nemotron": (
        {"input": [user("q")], "output": "a", "system_prompt": "S"},
        (["s:S", "u:q"], ["a:a"]),
        set(),
    ),
    "lima": (
        {"conversations": ["q", "a", "r", "b"]},
        (["u:q"], ["a:a", "u:r", "a:b"]),
        set(),
    ),
    "roleplay": (
        {
            "chosen": [assistant("hi"), user("q"), assistant("a")],
            "rejected": [assistant("hi"), user("q"), assistant("b")],
        },
        (["a:hi", "u:q"], ["a:a"], ["a:b"]),
        set(),
    ),
    "rewards": (
        {"prompt": "q", "responses": ["b", "a"], "rewards": [1, 2]},
        ("q", "a", "b"),
        set(),
    ),
    "rewards_inside": (
        {"prompt": "q", "responses": [{"text": "b", "reward": 1}, {"text": "a", "reward": 2}]},
        ("q", "a", "b"),
        set(),
    ),
    "sharegpt_bing": (
        {"conversations": [{"from": "human", "value": "q"}, {"from": "bing", "value": "a"}]},
        (["u:q"], ["a:a"]),
        set(),
    ),
    "numpy_printed": (
        {"messages": "[{'content': 'q', 'role': 'user'}\n {'content': 'a', 'role': 'assistant'}]"},
        (["u:q"], ["a:a"]),
        set(),
    ),
    "nested_fields": (
        {
            "instruction": "q",
            "completions": [
                {"response": "b", "overall_score": 1, "model": "m"},
                {"response": "a", "overall_score": 2, "model": "n"},
            ],
        },
        ("q", "a", "b"),
        {"completions[].model"},
    ),
    "webgpt": (
        {
            "question": {"full_text": "q", "id": "7"},
            "answer_0": "b",
            "answer_1": "a",
            "score_0": 0,
            "score_1": 1,
        },
        ("q", "a", "b"),
        {"question.id"},
    ),
}


@pytest.mark.parametrize("name", READ)
def test_a_published_form_is_read(name):
    row, expected, unread = READ[name]
    (record,), report = parsed(row)
    assert (turns(record.prompt), *map(turns, record.responses)) == expected
    assert report.unread.keys() == unread


def test_calls_that_answer_a_query_are_a_turn_with_tool_calls():
    row = {"query": "q", "answers": json.dumps([CALL]), "tools": json.dumps(TOOLS)}
    (record,), report = parsed(row)
    assert turns(record.prompt) == ["u:q"]
    assert record.responses == ((assistant("", tool_calls=[CALLED]),),)
    assert record.tools == tuple(TOOLS)
    assert not report.unread


def test_roles_of_tool_calls_and_responses_are_known():
    row = {
        "messages": [
            user("q"),
            {"role": "tool_call", "content": json.dumps(CALL)},
            {"role": "tool_response", "content": {"sum": 1}},
            assistant("a"),
        ]
    }
    (record,), _ = parsed(row)
    assert record.responses[0][0] == assistant("", tool_calls=[CALLED])
    assert turns(record.responses[0][1:]) == ['t:{"sum": 1}', "a:a"]


@pytest.mark.parametrize("tools", [[json.dumps(TOOLS[0])], json.dumps([json.dumps(TOOLS[0])])])
def test_tools_may_be_texts_of_json(tools):
    (record,), _ = parsed({"messages": [user("q"), assistant("a")], "tools": tools})
    assert record.tools == tuple(TOOLS)


def test_the_preferences_of_openai_are_read_by_a_mapping():
    row = {
        "input": {"messages": [user("q")], "tools": TOOLS},
        "preferred_output": [assistant("a")],
        "non_preferred_output": [assistant("b")],
    }
    mapping = (
        "prompt=input.messages, tools=input.tools, chosen=preferred_output, "
        "rejected=non_preferred_output"
    )
    (record,), report = parsed(row, mapping)
    assert [turns(x) for x in (record.prompt, *record.responses)] == [["u:q"], ["a:a"], ["a:b"]]
    assert record.tools == tuple(TOOLS)
    assert not report.unread


def test_a_field_inside_of_objects_can_be_left_out():
    row = READ["nested_fields"][0]
    assert not parsed(row, "-completions[].model")[1].unread


HALF = "\ud83d"
DIALOGUE = [user("q"), assistant("a")]
DROPPED = {
    "null_prompt": (
        {"prompt": None, "chosen": "a", "rejected": "b"},
        "field_null",
        "field 'prompt'",
    ),
    "null_messages": ({"messages": None}, "field_null", "a list of messages"),
    "other_prompt": (
        {"prompt": "rate this", "chosen": DIALOGUE, "rejected": [user("q"), assistant("b")]},
        "prompt_not_in_dialogue",
        "data.columns=-prompt",
    ),
    "no_prompt": (
        {"chosen": "a", "rejected": "b", "trajectory": [user("q")]},
        "no_prompt",
        "the record has chosen, rejected, trajectory",
    ),
    "numbers_beside": (
        {"prompt": "q", "responses": ["b", "a"], "helpfulness": [1, 2]},
        "no_order",
        "scores=helpfulness",
    ),
    "half_name": (
        {"messages": [{**user("q"), "name": HALF}, assistant("a")]},
        "not_unicode",
        "message 0, 'name'",
    ),
    "half_reasoning": (
        {"messages": [user("q"), assistant("a", reasoning_content=HALF)]},
        "not_unicode",
        "'reasoning_content'",
    ),
    "half_tool": ({"messages": DIALOGUE, "tools": [{HALF: 1}]}, "not_unicode", "field 'tools'"),
    "half_option": (
        {"messages": DIALOGUE, "chat_template_kwargs": {"a": [HALF]}},
        "not_unicode",
        "field 'chat_template_kwargs'",
    ),
}


@pytest.mark.parametrize("name", DROPPED)
def test_a_row_that_cannot_be_used_is_dropped_for_its_true_cause(name):
    row, cause, words = DROPPED[name]
    records, report = parsed(row)
    assert not records
    (tally,) = report.tallies["dropped"].values()
    assert report.number("dropped", cause) == 1
    assert words in tally.why


def test_half_a_surrogate_pair_in_a_name_can_be_printed_and_saved():
    _, unread = parsed({"prompt": "q", "completion": "a", HALF: 1})
    _, dropped = parsed({HALF: 1})
    for report in (unread, dropped):
        assert "\\ud83d" in str(report)
        str(report).encode()
        report.to_json().encode()


@pytest.mark.parametrize("other", [";", "|", "\t"])
def test_a_table_with_another_separator_is_one_clear_error(tmp_path, other):
    file = tmp_path / "a.csv"
    file.write_text(f"prompt{other}chosen{other}rejected\nq{other}a{other}b\n", encoding="utf-8")
    with pytest.raises(DataError, match=r"a\.csv:1: the first line has .* and no ','"):
        list(read(file))
