"""What became of records that users lost: each file of ../shared/cases/data, parsed.

The counts and causes are those that the files' contents ask for. Rendering is tested in
`test_dialogues.py` and `test_tokenise.py`.
"""

import pytest

from dpojax.data.parsing import ParseConfig, parse_rows
from dpojax.data.records import DataError, read_columns
from dpojax.data.report import Report
from dpojax.data.sources import load_records, read

USER = {"role": "user", "content": "What is the capital of region 0?"}
SYSTEM = {"role": "system", "content": "Answer like a pirate."}
GOOD = {"role": "assistant", "content": "It is town 0, on the river."}
BAD = {"role": "assistant", "content": "No idea about 0."}
TEXTS = (USER["content"], (GOOD["content"], BAD["content"]))
CHAT = ((USER,), ((GOOD,), (BAD,)))
WITH_SYSTEM = ((SYSTEM, USER), CHAT[1])


def call(name, content):
    function = {"name": "lookup", "arguments": {"region": "0"}}
    return GOOD | {"content": content, "tool_calls": [{"type": "function", "function": function}]}


# file: (kept of 24 or 25, causes of the others and notes, unread fields, first record or None)
CASES = {
    "good": (24, {}, {}, TEXTS),
    "good_chat": (24, {}, {}, CHAT),
    "01a_system_column_text": (24, {"made_dialogue": 24}, {"id", "source"}, WITH_SYSTEM),
    "01b_system_column_messages": (24, {}, {}, WITH_SYSTEM),
    "01d_orca_question_system": (24, {"made_dialogue": 24}, {}, WITH_SYSTEM),
    "01e_system_column_messages_full": (24, {}, {}, WITH_SYSTEM),
    "01g_initial_steps": (24, {}, {"initial_reason_steps"}, None),
    "02a_tools_column": (24, {}, {}, None),
    "02b_tool_call_empty_content": (24, {}, {}, ((USER,), ((call(0, ""),), (BAD,)))),
    "02c_tool_call_null_content": (24, {}, {}, ((USER,), ((call(0, None),), (BAD,)))),
    "02d_tool_result_in_response": (24, {}, {}, None),
    "02f_tool_calls_in_prompt_mixed": (24, {}, {}, None),
    "03_chat_template_kwargs": (24, {}, {}, CHAT),
    "05_sharegpt": (24, {}, {}, CHAT),
    "06_messages_and_dict_answers": (24, {}, {}, CHAT),
    "08b_no_prompt_answers_only": (24, {}, {}, CHAT),
    "08d_roles_capital": (24, {}, {}, CHAT),
    "09a_null_chosen": (24, {"field_null": 1}, {}, TEXTS),
    "09b_missing_rejected": (24, {"field_missing": 1}, {}, TEXTS),
    "10_content_parts": (24, {}, {}, CHAT),
    "11b_surrogate_message": (23, {"not_unicode": 1}, {}, CHAT),
    "12_nan_score": (24, {}, {"score_chosen", "score_rejected"}, TEXTS),
    "13_textual_margin": (24, {}, {"margin"}, TEXTS),
    "13b_sample_weight": (12, {"zero_weight": 12}, {}, TEXTS),
    "14a_label_int": (24, {}, {}, None),
    "15a_helpsteer3": (24, {}, {"domain", "language"}, CHAT),
    "15b_nectar": (24, {}, {"turns", "answers[].model"}, None),
    "15d_ultrafeedback_raw": (24, {}, {"source"}, TEXTS),
    "15e_output_pair": (24, {}, {}, None),
    "16_multi_turn_sft": (24, {}, {}, None),
    "18a_one_system": (24, {}, {}, CHAT),
    "18b_user_user": (24, {}, {}, CHAT),
    "19e_multi_turn_completion": (24, {}, {}, None),
    "19g_think": (24, {}, {}, None),
    "20a_collision_before": (24, {}, {"question"}, None),
    "20b_collision_after": (24, {}, {"question"}, None),
    "36_json_strings": (24, {"json_text": 24}, {}, CHAT),
}
# Files that end in an error, elsewhere in this file or in another room's tests.
ELSEWHERE = {"04_images", "07_message_metadata", "08_rejected_role_user", "24k_huge_int"}


@pytest.fixture
def cases(shared):
    return shared / "cases/data"


def parsed(path, **config):
    report = Report()
    return list(parse_rows(read(path), report, ParseConfig(**config))), report


def test_every_file_of_the_folder_has_its_place_here(cases):
    assert {path.stem for path in cases.glob("*.jsonl")} == CASES.keys() | ELSEWHERE


@pytest.mark.parametrize("name", CASES)
def test_what_becomes_of_a_file(cases, name):
    kept, causes, unread, first = CASES[name]
    records, report = parsed(cases / f"{name}.jsonl")
    assert len(records) == kept
    counts = {}
    for outcome in ("dropped", "noted"):
        counts |= {cause: tally.count for cause, tally in report.tallies[outcome].items()}
    assert counts == causes
    assert report.unread.keys() == set(unread)
    if first is not None:
        assert (records[0].prompt, records[0].responses) == first


def test_message_ids_and_times_are_no_difference(cases):
    records, _ = parsed(cases / "07_message_metadata.jsonl")
    assert len(records) == 24
    assert [(m["role"], m["content"]) for m in records[0].prompt] == [tuple(USER.values())]
    assert records[0].responses == CHAT[1]


def test_records_with_images_are_refused_unless_the_field_is_left_out(cases):
    path = cases / "04_images.jsonl"
    with pytest.raises(DataError, match=r"media(.|\n)*:1: field 'images' holds a list of 1"):
        load_records(path)
    records, report = parsed(path, columns=read_columns("-images"))
    assert (len(records), report.unread) == (24, {})


def test_an_answer_of_the_user_has_its_own_cause(cases):
    with pytest.raises(DataError, match="all 24 records were dropped") as caught:
        load_records(cases / "08_rejected_role_user.jsonl")
    assert "no_answer" in str(caught.value)
    assert "it ends with one of 'user'" in str(caught.value)
    assert "prompts_differ" not in str(caught.value)


@pytest.mark.parametrize("name", ["20a_collision_before", "20b_collision_after"])
def test_a_rename_onto_a_name_that_is_there_is_an_error(cases, name):
    path = cases / f"{name}.jsonl"
    with pytest.raises(DataError, match=rf"{name}\.jsonl:1: .*'prompt'.*'question'.*already"):
        parsed(path, columns=read_columns("prompt=question"))
    records, _ = parsed(path, columns=read_columns("prompt=question,-prompt"))
    assert (records[0].prompt, records[0].responses) == TEXTS


def test_what_the_rows_give_to_the_template_is_kept(cases):
    tools = parsed(cases / "02a_tools_column.jsonl")[0][0].tools
    assert [tool["function"]["name"] for tool in tools] == ["lookup"]
    records, _ = parsed(cases / "03_chat_template_kwargs.jsonl")
    assert records[0].template_options == {"enable_thinking": False}


def test_a_tool_s_result_and_a_user_s_turn_may_stand_inside_an_answer(cases):
    record = parsed(cases / "02d_tool_result_in_response.jsonl")[0][0]
    assert [m["role"] for m in record.responses[0]] == ["assistant", "tool", "assistant"]
    record = parsed(cases / "19e_multi_turn_completion.jsonl")[0][0]
    assert record.prompt == (USER,)
    assert [m["role"] for m in record.responses[1]] == ["assistant", "user", "assistant"]


def test_labels_of_numbers_are_read(cases):
    records, _ = parsed(cases / "14a_label_int.jsonl")
    assert [record.label for record in records] == [False, True] * 12


def test_strengths_and_ranks_order_the_answers(cases):
    records, _ = parsed(cases / "15a_helpsteer3.jsonl")
    # Strengths -3, -1, 2, 0, ...: the first, the first, the second, none.
    by_strength = {row["overall_preference"]: n for n, (row, _) in enumerate(read_rows(cases))}
    for strength, place in by_strength.items():
        record = records[place]
        assert record.all_tied is (strength == 0)
        better = record.responses[0][0]["content"]
        if strength:
            assert better.startswith("It is" if strength < 0 else "No idea")
    record = parsed(cases / "15b_nectar.jsonl")[0][0]
    assert record.prompt == f"\n\nHuman: {USER['content']}\n\nAssistant: "
    assert record.responses == TEXTS[1]


def read_rows(cases):
    return read(cases / "15a_helpsteer3.jsonl")


def test_turns_to_imitate_are_all_of_them_or_the_last(cases):
    path = cases / "16_multi_turn_sft.jsonl"
    roles = lambda messages: [message["role"] for message in messages]
    record = parsed(path)[0][0]
    assert roles(record.prompt) == ["system", "user"]
    assert roles(record.responses[0]) == ["assistant", "user", "assistant"]
    record = parsed(path, last_turn=True)[0][0]
    assert roles(record.prompt) == ["system", "user", "assistant", "user"]
    assert record.responses[0][0]["content"] == "SECOND ANSWER 0."


def test_the_same_file_is_an_error_where_malformed_records_are_not_wanted(cases):
    for name, message in (
        ("09a_null_chosen", r"jsonl:11: field 'chosen' .*null"),
        ("11b_surrogate_message", r"jsonl:6: field 'prompt', message 0 .*surrogates"),
    ):
        with pytest.raises(DataError, match=message):
            parsed(cases / f"{name}.jsonl", malformed="error")


def test_a_score_that_the_loss_needs_has_to_be_a_number(cases):
    records, report = parsed(cases / "12_nan_score.jsonl", need_scores=True)
    tally = report.tallies["dropped"]["bad_score"]
    assert (len(records), tally.count, tally.examples) == (23, 1, ["12_nan_score.jsonl:8"])


def test_an_integer_of_thousands_of_digits_names_file_and_line(cases):
    with pytest.raises(DataError, match=r"24k_huge_int\.jsonl:6: .*digits"):
        parsed(cases / "24k_huge_int.jsonl")


def test_nulls_that_arrow_invented_are_gone(cases):
    records, _ = parsed(cases / "30a_tool_args.parquet")
    given = [
        message["tool_calls"][0]["function"]["arguments"]
        for record in records[:2]
        for message in record.prompt
        if "tool_calls" in message
    ]
    assert given == [{"city": "0", "unit": "km"}, {"region": "1"}]
    lines, _ = parsed(cases / "02f_tool_calls_in_prompt_mixed.jsonl")
    assert [r.prompt for r in records[:2]] == [r.prompt for r in lines[:2]]


def test_nulls_that_json_wrote_in_a_call_stay(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text(
        '{"messages": [{"role": "user", "content": "q", "name": null}, {"role": "assistant", '
        '"content": "", "tool_calls": [{"name": "f", "arguments": {"unit": null}}]}]}'
    )
    record = parsed(path)[0][0]
    assert record.prompt == ({"role": "user", "content": "q"},)
    function = record.responses[0][0]["tool_calls"][0]["function"]
    assert function == {"name": "f", "arguments": {"unit": None}}
