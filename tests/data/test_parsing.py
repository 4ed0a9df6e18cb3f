"""A record that cannot be used is counted under its true cause, an unread field by its name."""

import pytest

from dpojax.data.parsing import ParseConfig, parse_rows
from dpojax.data.records import DataError, Record, RecordError, parse, read_columns
from dpojax.data.report import Report

CALL = {"function": {"name": "f", "arguments": {"x": 1}}}
SYSTEM = {"role": "system", "content": "s"}
ARENA = {"winner_model_a": 0, "winner_model_b": 1, "winner_tie": 0}


def user(text):
    return {"role": "user", "content": text}


def assistant(text, **fields):
    return {"role": "assistant", "content": text, **fields}


PAIR = {"prompt": "q", "chosen": "a", "rejected": "b"}
CHAT = {"prompt": [user("q")], "chosen": [assistant("a")], "rejected": [assistant("b")]}
CHAT_RECORD = Record("f:1", (user("q"),), ((assistant("a"),), (assistant("b"),)))


def read(*rows, **config):
    report = Report()
    numbered = [(row, f"f:{number}") for number, row in enumerate(rows, 1)]
    return list(parse_rows(numbered, report, ParseConfig(**config))), report


@pytest.mark.parametrize(
    ("row", "cause"),
    [
        (PAIR | {"chosen": None}, "field_null"),
        (PAIR | {"chosen": float("nan")}, "field_type"),
        (PAIR | {"chosen": ["a"], "rejected": ["b"]}, "bad_message"),
        ({"prompt": "q", "chosen": "a"}, "field_missing"),
        ({"chosen": [assistant("a")], "rejected": [assistant("b")]}, "no_prompt"),
        ({"chosen": "a", "rejected": "b"}, "no_prompt"),
        (CHAT | {"rejected": [user("b")]}, "no_answer"),
        (CHAT | {"chosen": [assistant("a"), user("x")]}, "no_answer"),
        ({"messages": [user("q"), assistant("a"), user("r")]}, "no_answer"),
        ({"messages": []}, "empty_dialogue"),
        (CHAT | {"chosen": []}, "empty_dialogue"),
        (CHAT | {"chosen": [{"role": "assistant"}]}, "field_null"),
        (CHAT | {"chosen": [{"content": "a"}]}, "bad_message"),
        (CHAT | {"chosen": [assistant(3)]}, "bad_message"),
        (CHAT | {"prompt": [{"role": "narrator", "content": "q"}]}, "unknown_role"),
        (CHAT | {"system": "x", "prompt": [SYSTEM, user("q")]}, "system_differs"),
        (
            CHAT | {"chosen": [user("r"), assistant("a")], "rejected": [user("q"), assistant("b")]},
            "prompts_differ",
        ),
        (
            CHAT | {"chosen": [user("r"), assistant("a")], "rejected": [user("r"), assistant("b")]},
            "prompt_not_in_dialogue",
        ),
        (PAIR | {"rejected": "\ud83d"}, "not_unicode"),
        (CHAT | {"chosen": [assistant("", tool_calls=[{"name": "\udc00"}])]}, "not_unicode"),
        (PAIR | {"images": ["a.png"]}, "media"),
        (CHAT | {"prompt": [user([{"type": "image"}, {"type": "text", "text": "q"}])]}, "media"),
        (CHAT | {"prompt": [user("q") | {"images": ["a.png"]}]}, "media"),
        (PAIR | {"weight": "heavy"}, "bad_weight"),
        (PAIR | {"weight": -1}, "bad_weight"),
        (PAIR | {"weight": 0}, "zero_weight"),
        (PAIR | {"tools": "none", "system": "s"}, "field_type"),
        (PAIR | {"history": [["h"]]}, "field_type"),
        ({"prompt": "q", "completion": "a", "label": "maybe"}, "bad_label"),
        ({"prompt": "q", "responses": []}, "too_few_responses"),
        ({"prompt": "q", "responses": ["a", "b"], "ranks": [1]}, "bad_score"),
        ({"prompt": "q", "completions": ["a", "b"], "labels": [True, False]}, "no_order"),
        ({"prompt": "q", "response_a": "a", "response_b": "b", "winner": "nobody"}, "bad_verdict"),
        ({"prompt": "q", "response_a": "a", "response_b": "b", "winner": None}, "field_null"),
        (ARENA | {"prompt": '["q"]', "response_a": "[null]", "response_b": '["b"]'}, "field_type"),
        (
            ARENA | {"prompt": '["q", ""]', "response_a": '["a"]', "response_b": '["b"]'},
            "field_type",
        ),
        ({"prompt": "q"}, "no_form"),
        ({}, "no_form"),
        (["a"], "field_type"),
        (None, "field_type"),
    ],
)
def test_an_odd_record_is_dropped_under_its_own_cause(row, cause):
    records, report = read(PAIR, row, PAIR, row, row)
    assert [record.id for record in records] == ["f:1", "f:3"]
    (tally,) = report.tallies["dropped"].values()
    assert list(report.tallies["dropped"]) == [cause]
    assert (tally.count, tally.examples) == (3, ["f:2", "f:4"])
    assert tally.why.startswith("f:2: ")


def test_other_prompts_have_a_key_of_their_own_and_a_stated_one_that_is_not_there_is_odd():
    answers = {"chosen": [user("r"), assistant("a")], "rejected": [user("r"), assistant("b")]}
    with pytest.raises(DataError, match=r"f:2: field 'prompt' is not the start .*malformed is err"):
        read(PAIR, CHAT | answers, malformed="error")
    answers["rejected"] = [user("q"), assistant("b")]
    assert len(read(PAIR, CHAT | answers, malformed="error")[0]) == 1


def test_an_odd_record_ends_the_run_if_that_is_asked_for():
    with pytest.raises(DataError, match=r"f:2: field 'chosen' .*null.*tokens\.malformed is error"):
        read(PAIR, PAIR | {"chosen": None}, malformed="error")


def test_an_unknown_role_is_told_by_its_name():
    with pytest.raises(RecordError, match=r"f:1: .*'prompt', message 0 .*unknown role 'narrator'"):
        parse(CHAT | {"prompt": [{"role": "narrator", "content": "q"}]}, "f:1")


@pytest.mark.parametrize(
    ("asks", "answers"),
    [("Human", "gpt"), ("USER", "Assistant"), ("prompter", "MODEL"), (" user ", "bot")],
)
@pytest.mark.parametrize("keys", [("role", "content"), ("from", "value")])
def test_known_names_of_roles_are_mapped_whatever_their_case(asks, answers, keys):
    message = lambda role, text: dict(zip(keys, (role, text)))
    whole = {
        "chosen": [message(asks, "q"), message(answers, "a")],
        "rejected": [message(asks.lower(), "q"), message(answers, "b")],
    }
    split = {
        "conversations": [message(asks, "q")],
        "chosen": message(answers, "a"),
        "rejected": message(answers, "b"),
    }
    assert parse(whole, "f:1") == parse(split, "f:1") == CHAT_RECORD


def test_dialogues_that_say_the_same_are_the_same_whatever_else_their_messages_hold():
    calls = [CALL | {"id": "1"}], [{"function": {"name": "f", "arguments": '{"x": 1}'}, "id": "2"}]
    dialogues = [
        [user("q") | {"ts": i}, assistant(None, tool_calls=call), {"role": "tool", "content": "r"}]
        for i, call in enumerate(calls)
    ]
    row = {
        "chosen": [*dialogues[0], assistant("a")],
        "rejected": [*dialogues[1], assistant("b")],
    }
    record = parse(row, "f:1")
    assert [message["role"] for message in record.prompt] == ["user", "assistant", "tool"]
    assert record.responses == CHAT_RECORD.responses
    row["rejected"][1] = assistant(None, tool_calls=[{"name": "g", "arguments": {"x": 1}}])
    assert len(parse(row, "f:1").prompt) == 1  # another call: the answers part there


def test_dialogues_may_part_several_turns_before_their_end():
    row = {
        "chosen": [user("q"), assistant("a"), user("x"), assistant("c")],
        "rejected": [user("q"), assistant("b"), user("y"), assistant("d")],
    }
    record = parse(row, "f:1")
    assert record.prompt == (user("q"),)
    assert record.responses == (tuple(row["chosen"][1:]), tuple(row["rejected"][1:]))


def test_fields_that_hold_something_and_are_not_read_are_counted_by_name():
    row = PAIR | {"source": "x", "score_note": 0, "nothing": None, "images": [], "text": ""}
    records, report = read(row, PAIR, row)
    assert len(records) == 3
    assert {name: tally.count for name, tally in report.unread.items()} == {
        "source": 2,
        "score_note": 2,
    }
    _, report = read(row, columns=read_columns("-source,-score_note"))
    assert not report.unread
    turns = [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a", "weight": 0}]
    _, report = read({"conversations": turns})
    assert list(report.unread) == ["conversations[].weight"]


def test_scores_are_looked_at_only_where_the_loss_needs_them():
    rows = [PAIR | {"margin": "large"}, PAIR | {"score_chosen": 1.0, "score_rejected": None}]
    records, report = read(*rows)
    assert [record.scores for record in records] == [None, None]
    assert (report.dropped, list(report.unread)) == (0, ["margin", "score_chosen"])
    records, report = read(*rows, need_scores=True)
    assert {cause: tally.count for cause, tally in report.tallies["dropped"].items()} == {
        "bad_score": 1,
        "no_score": 1,
    }


@pytest.mark.parametrize(
    ("label", "desirable"),
    [
        (1, True),
        (0, False),
        (1.0, True),
        (-1, False),
        ("TRUE", True),
        ("false", False),
        ("0", False),
    ],
)
def test_labels_are_read_as_numbers_and_as_text(label, desirable):
    row = {"prompt": "q", "completion": "a", "label": label}
    assert parse(row, "f:1") == Record("f:1", "q", ("a",), desirable)


@pytest.mark.parametrize("empty", ["", []])
def test_a_plain_prompt_with_a_system_field_or_a_history_becomes_a_dialogue(empty):
    records, report = read(PAIR | {"system": "s"}, PAIR | {"history": [["h", "i"]]})
    assert records[0].prompt == (SYSTEM, user("q"))
    assert records[1].prompt == (user("h"), assistant("i"), user("q"))
    assert records[0].responses == records[1].responses == CHAT_RECORD.responses
    assert report.number("noted", "made_dialogue") == 2
    name = "system" if empty == "" else "history"
    assert parse(PAIR | {name: empty}, "f:1") == CHAT_RECORD
    assert parse(PAIR | {name: None}, "f:1").prompt == "q"


def test_a_weight_goes_along():
    assert parse(PAIR | {"weight": "2.5"}, "f:1").weight == 2.5
    assert parse(PAIR | {"weight": None}, "f:1").weight == 1


def test_a_path_that_no_row_has_is_an_error_and_one_that_some_have_is_not():
    columns = read_columns("weight=importance")
    with pytest.raises(DataError, match=r"f: columns takes 'weight' from 'importance', which no"):
        read(PAIR, PAIR, columns=columns)
    records, _ = read(PAIR, PAIR | {"importance": 3}, columns=columns)
    assert [record.weight for record in records] == [1, 3]
