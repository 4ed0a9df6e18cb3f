"""Every form of preference data parses to the same Record, and every fault is named."""

import gzip
import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dpojax.data.records import DataError, Record, RecordError, detect, parse


def user(text):
    return {"role": "user", "content": text}


def assistant(text):
    return {"role": "assistant", "content": text}


def json_lines(path):
    with gzip.open(path, "rt", encoding="utf-8") as file:
        return [json.loads(line) for line in file]


def test_a_pair_keeps_its_texts_as_they_are():
    row = {"prompt": "Q: ", "chosen": " good ", "rejected": "bad\n"}
    assert parse(row, "f:1") == Record("f:1", "Q: ", (" good ", "bad\n"))


def test_a_conversational_pair_keeps_its_messages():
    row = {"prompt": [user("q")], "chosen": [assistant("a")], "rejected": [assistant("b")]}
    assert parse(row, "f:1") == Record("f:1", (user("q"),), ((assistant("a"),), (assistant("b"),)))


def test_text_beside_messages_becomes_a_message():
    expected = Record("f:1", (user("q"),), ((assistant("a"),), (assistant("b"),)))
    text_answers = {"prompt": [user("q")], "chosen": "a", "rejected": "b"}
    text_prompt = {"prompt": "q", "chosen": [assistant("a")], "rejected": [assistant("b")]}
    assert parse(text_answers, "f:1") == parse(text_prompt, "f:1") == expected


def test_whole_dialogues_are_split_between_messages_and_never_inside_a_text():
    shared = [user("q"), assistant("The"), user("more")]
    row = {"chosen": [*shared, assistant("They go")], "rejected": [*shared, assistant("They stay")]}
    record = parse(row, "f:1")
    assert record.prompt == tuple(shared)
    assert record.responses == ((assistant("They go"),), (assistant("They stay"),))


def test_equal_dialogues_keep_their_last_message_as_the_response():
    row = {"chosen": [user("q"), assistant("a")], "rejected": [user("q"), assistant("a")]}
    assert parse(row, "f:1") == Record("f:1", (user("q"),), ((assistant("a"),), (assistant("a"),)))


@pytest.mark.parametrize(
    "row",
    [
        {"chosen": [user("q"), assistant("a")], "rejected": [user("r"), assistant("b")]},
        # The dialogues part before a user's turn.
        {
            "chosen": [user("q"), assistant("a"), user("x"), assistant("c")],
            "rejected": [user("q"), assistant("a"), user("y"), assistant("d")],
        },
        # One of them is a dialogue, the other one an answer.
        {
            "prompt": "q",
            "chosen": [assistant("a")],
            "rejected": [user("q"), assistant("b")],
        },
    ],
)
def test_dialogues_with_different_prompts_are_rejected_and_not_repaired(row):
    with pytest.raises(RecordError) as error:
        parse(row, "f:1")
    assert error.value.cause == "prompts_differ"


def test_a_stated_prompt_that_agrees_with_the_dialogues_is_no_fault():
    dialogues = {"chosen": [user("q"), assistant("a")], "rejected": [user("q"), assistant("b")]}
    expected = parse(dialogues, "f:1")
    assert parse({"prompt": "q", **dialogues}, "f:1") == expected
    assert parse({"prompt": [user("q")], **dialogues}, "f:1") == expected


def test_absent_message_keys_that_arrow_fills_with_none_are_taken_out():
    row = {
        "prompt": [{**user("q"), "name": None}],
        "chosen": [{**assistant("a"), "tool_calls": None}],
        "rejected": [assistant("b")],
    }
    assert parse(row, "f:1").responses[0] == (assistant("a"),)
    assert parse(row, "f:1").prompt == (user("q"),)


def test_hh_splits_at_the_last_assistant_turn():
    head = "\n\nHuman: a\n\nAssistant: b\n\nHuman: c\n\nAssistant:"
    row = {"chosen": head + " The cat", "rejected": head + " The dog"}
    assert parse(row, "f:1") == Record("f:1", head, (" The cat", " The dog"))


def test_hh_with_different_prompts_is_rejected():
    row = {"chosen": "\n\nHuman: a\n\nAssistant: x", "rejected": "\n\nHuman: b\n\nAssistant: y"}
    with pytest.raises(RecordError) as error:
        parse(row, "f:1")
    assert error.value.cause == "prompts_differ"


def test_key_order_never_matters():
    row = {"instruction": "Add.", "input": "1 1", "output": "2", "chosen": "2", "rejected": "3"}
    turned = dict(reversed(row.items()))
    assert parse(row, "f:1") == parse(turned, "f:1")
    assert parse(row, "f:1").responses == ("2", "3")


def test_an_instruction_without_input_leaves_the_input_section_out():
    with_input = parse({"instruction": "Add {this}.", "input": "1 1", "output": "2"}, "f:1")
    without = parse({"instruction": "Add {this}.", "input": "", "output": "2"}, "f:1")
    assert (
        "### Instruction:\nAdd {this}.\n\n### Input:\n1 1\n\n### Response:\n" in with_input.prompt
    )
    assert "Add {this}.\n\n### Response:\n" in without.prompt
    assert with_input.responses == without.responses == ("2",)


@pytest.mark.parametrize(
    ("order", "expected"),
    [
        ({}, ("a", "b", "c")),
        ({"ranks": [3, 1, 2]}, ("b", "c", "a")),
        ({"scores": [0.5, -1, 2]}, ("c", "a", "b")),
    ],
)
def test_ranked_responses_come_out_best_first(order, expected):
    row = {"prompt": "q", "responses": ["a", "b", "c"], **order}
    assert parse(row, "f:1").responses == expected
    assert parse(row, "f:1").rank is None


@pytest.mark.parametrize(
    ("order", "responses", "scores", "rank"),
    [
        ({"ranks": [2, 1, 1]}, ("b", "c", "a"), None, (0, 0, 2)),
        ({"scores": [1, 1, 2]}, ("c", "a", "b"), (2.0, 1.0, 1.0), (0, 1, 1)),
        ({"scores": [3, 3, 3.0]}, ("a", "b", "c"), (3.0, 3.0, 3.0), (0, 0, 0)),
        # Ranks order, scores go along.
        ({"ranks": [2, 1, 3], "scores": [9, 9, 7]}, ("b", "a", "c"), (9.0, 9.0, 7.0), None),
    ],
)
def test_tied_responses_keep_the_order_of_the_file(order, responses, scores, rank):
    row = {"prompt": "q", "responses": ["a", "b", "c"], **order}
    assert parse(row, "f:1") == Record("f:1", "q", responses, scores=scores, rank=rank)


@given(st.lists(st.integers(-2, 2), min_size=1, max_size=7), st.booleans())
def test_scores_go_with_their_responses_and_rank_counts_the_better_ones(numbers, as_ranks):
    texts = [f"answer {i}" for i in range(len(numbers))]
    row = {"prompt": "q", "responses": texts, "ranks" if as_ranks else "scores": numbers}
    record = parse(row, "f:1")
    worth = {text: -n if as_ranks else n for text, n in zip(texts, numbers)}
    scores = tuple(worth[text] for text in record.responses)
    assert record.scores == (None if as_ranks else scores)  # places are no scores
    assert record.places == tuple(
        sum(other > worth[text] for other in worth.values()) for text in record.responses
    )
    assert sorted(record.responses) == texts
    assert record.all_tied == (len(numbers) > 1 and len(set(numbers)) == 1)


HEAD = "\n\nHuman: q\n\nAssistant:"


@pytest.mark.parametrize(
    "row",
    [
        {"prompt": "q", "chosen": "a", "rejected": "b"},
        {"prompt": [user("q")], "chosen": [assistant("a")], "rejected": [assistant("b")]},
        {"chosen": [user("q"), assistant("a")], "rejected": [user("q"), assistant("b")]},
        {"chosen": HEAD + "a", "rejected": HEAD + "b"},
        {"instruction": "q", "chosen": "a", "rejected": "b"},
    ],
)
@pytest.mark.parametrize(
    ("given_scores", "expected"),
    [
        ({}, None),
        ({"score_chosen": "8", "score_rejected": " 6.5"}, (8.0, 6.5)),  # of a CSV file
        ({"score_chosen": None, "score_rejected": None, "margin": None}, None),
        ({"score_chosen": 8, "score_rejected": 6.5}, (8.0, 6.5)),
        ({"chosen_reward": 0.25, "rejected_reward": 0.75}, (0.25, 0.75)),
        ({"score_chosen": 5, "score_rejected": 5}, (5.0, 5.0)),
        ({"margin": 1.5}, (1.5, 0.0)),
    ],
)
def test_scores_of_a_pair_go_along_and_leave_the_stated_choice(row, given_scores, expected):
    record, bare = parse({**row, **given_scores}, "f:1"), parse(row, "f:1")
    assert (record.scores, record.rank) == (expected, None)
    assert (record.responses, record.prompt) == (bare.responses, bare.prompt)


def test_half_of_a_surrogate_pair_is_an_error_that_names_the_field():
    row = {"prompt": "q", "chosen": "\ud83d", "rejected": "b"}
    with pytest.raises(DataError, match=r"f:1.*'chosen'.*surrogates"):
        parse(row, "f:1")


def test_unpaired_data_carries_its_label():
    row = {"prompt": "q", "completion": "a", "label": False}
    assert parse(row, "f:1") == Record("f:1", "q", ("a",), False)


@pytest.mark.parametrize("choice", [0, 1])
def test_a_comparison_puts_the_chosen_summary_first(choice):
    row = {
        "info": {"subreddit": "tea", "title": "Green", "post": "Or black?"},
        "summaries": [{"text": " zero"}, {"text": " one"}],
        "choice": choice,
    }
    record = parse(row, "f:1")
    assert record.prompt == "SUBREDDIT: r/tea\n\nTITLE: Green\n\nPOST: Or black?\n\nTL;DR:"
    assert record.responses == ((" zero", " one") if choice == 0 else (" one", " zero"))


def test_a_comparison_of_news_takes_the_article():
    row = {"info": {"article": "News."}, "summaries": [{"text": "a"}, {"text": "b"}], "choice": 1}
    assert parse(row, "f:1").prompt == "Article: News.\n\nTL;DR:"


@pytest.mark.parametrize(
    ("row", "expected"),
    [
        ({"text": "hello", "label": 1}, Record("f:1", "", ("hello",))),
        ({"prompt": "p", "completion": "c"}, Record("f:1", "p", ("c",))),
        (
            {"messages": [user("q"), assistant("a")]},
            Record("f:1", (user("q"),), ((assistant("a"),),)),
        ),
    ],
)
def test_text_for_fine_tuning_has_one_response(row, expected):
    assert parse(row, "f:1") == expected


PAIR = {"prompt": "p", "chosen": "a", "rejected": "b"}
STIENNON = {
    "info": {"subreddit": "s", "title": "t", "post": "p"},
    "summaries": [{"text": "a"}, {"text": "b"}],
    "choice": 0,
}


@pytest.mark.parametrize(
    ("row", "form", "parts"),
    [
        ({"question": "q", "answer": "a"}, "auto", ["answer, question", "pair: prompt", "hh:"]),
        ({**PAIR, "rejected": None}, "auto", ["'rejected'", "text", "null"]),
        ({**PAIR, "chosen": 3, "rejected": "b"}, "auto", ["'chosen'", "int 3"]),
        ({**PAIR, "prompt": 1.5}, "auto", ["'prompt'", "float 1.5"]),
        ({"prompt": "p", "chosen": "a"}, "pair", ["'rejected' is missing", "chosen, prompt"]),
        ({**PAIR, "rejected": [assistant("b")]}, "auto", ["'rejected'", "as in 'chosen'"]),
        ({**PAIR, "chosen": [], "rejected": []}, "auto", ["'chosen'", "list of 0"]),
        ({**PAIR, "chosen": [{"role": "user"}]}, "auto", ["message 0", "'chosen'", "'content'"]),
        ({"chosen": "a", "rejected": "b"}, "auto", ["'chosen'", "Assistant:", "'prompt'"]),
        ({"instruction": "i", "input": "", "chosen": "a"}, "auto", ["'rejected' is missing"]),
        ({"instruction": 1, "output": "o"}, "auto", ["'instruction'", "int 1"]),
        ({"prompt": "p", "responses": []}, "auto", ["'responses'", "1 or more", "list of 0"]),
        ({"prompt": "p", "responses": ["a", 2]}, "auto", ["'responses.1'", "int 2"]),
        ({"prompt": "p", "responses": ["a", "b"], "ranks": [1]}, "auto", ["'ranks'", "2 finite"]),
        (
            {"prompt": "p", "responses": ["a", "b"], "scores": [1, float("nan")]},
            "auto",
            ["'scores'", "nan"],
        ),
        (
            {"prompt": "p", "responses": ["a", "b"], "ranks": [1, True]},
            "auto",
            ["'ranks'", "finite", "True"],
        ),
        ({**PAIR, "score_chosen": 1}, "auto", ["'score_rejected' is missing", "finite number"]),
        (
            {**PAIR, "chosen_reward": "two", "rejected_reward": 1},
            "auto",
            ["'chosen_reward'", "finite number", "str 'two'"],
        ),
        ({**PAIR, "margin": float("inf")}, "auto", ["'margin'", "finite number", "inf"]),
        ({**PAIR, "margin": 10**400}, "auto", ["'margin'", "finite number"]),
        ({"prompt": "p", "completion": "c", "label": 2}, "auto", ["'label'", "true", "int 2"]),
        ({**STIENNON, "choice": 2}, "auto", ["'choice'", "0 or 1", "int 2"]),
        ({**STIENNON, "choice": True}, "auto", ["'choice'", "bool True"]),
        ({**STIENNON, "summaries": [{"text": "a"}]}, "auto", ["'summaries'", "list of 1"]),
        ({**STIENNON, "summaries": [{}, {"text": "b"}]}, "auto", ["'summaries.0.text'", "missing"]),
        ({**STIENNON, "info": {"title": "t"}}, "auto", ["'info.subreddit'", "missing"]),
        ({"text": ["a"]}, "auto", ["'text'", "list of 1"]),
        ({"messages": [user("q")]}, "auto", ["'messages'", "assistant"]),
        (["a"], "auto", ["object", "list of 1"]),
        (PAIR, "pairs", ["'pairs'", "hh", "ranked"]),
    ],
)
def test_a_fault_names_the_record_the_field_and_what_was_expected(row, form, parts):
    with pytest.raises(DataError) as caught:
        parse(row, "file.jsonl:7", form, need_scores="responses" not in row)
    message = str(caught.value)
    for part in parts + ([] if form == "pairs" else ["file.jsonl:7"]):
        assert part in message


def test_the_instruction_file_has_both_key_orders_and_six_equal_pairs(shared):
    path = shared / "data/instruction-preference/instruction-data-with-preference.json"
    rows = json.loads(path.read_text(encoding="utf-8"))
    records = [parse(row, f"{path.name}:{i}") for i, row in enumerate(rows, 1)]
    chosen_first = sum(list(row).index("chosen") < list(row).index("rejected") for row in rows)
    assert {detect(row) for row in rows} == {"instruction"}
    assert sorted((chosen_first, len(rows) - chosen_first)) == [544, 556]
    assert sum(record.responses[0] == record.responses[1] for record in records) == 6
    assert sum("### Input:" not in record.prompt for record in records) == 775
    for row, record in zip(rows, records):
        assert record.responses == (row["chosen"], row["rejected"])


# prompts that differ, equal answers, white-space answers: counts of data/README.md
HH = {
    "harmless-base/test": (2312, 5, 0, 4),
    "helpful-single-turn/train_gt": (4000, 10, 1, 2),
    "helpful-single-turn/train_w2s": (4000, 9, 0, 6),
    "helpful-single-turn/test": (4000, 6, 2, 1),
}


@pytest.mark.parametrize("name", HH)
def test_hh_pairs_are_split_where_they_should_be(shared, name):
    rows = json_lines(shared / f"data/hh-rlhf/{name}.jsonl.gz")
    records, causes = {}, set()
    for i, row in enumerate(rows):
        try:
            records[i] = parse(row, str(i))
        except RecordError as error:
            causes.add(error.cause)
    assert causes <= {"prompts_differ"}
    responses = [record.responses for record in records.values()]
    equal = sum(chosen == rejected for chosen, rejected in responses)
    empty = sum(not all(text.strip() for text in pair) for pair in responses)
    assert (len(rows), len(rows) - len(records), equal, empty) == HH[name]
    for i, record in records.items():
        assert record.prompt.endswith("\n\nAssistant:")
        assert record.prompt + record.responses[0] == rows[i]["chosen"]
        assert record.prompt + record.responses[1] == rows[i]["rejected"]


@pytest.mark.parametrize(("batch", "count", "zero"), [("13", 1097, 624), ("18", 674, 350)])
def test_comparisons_follow_the_choice_and_start_with_a_space(shared, batch, count, zero):
    rows = json_lines(shared / f"data/summarize-from-feedback/comparisons/batch{batch}.json.gz")
    records = [parse(row, str(i)) for i, row in enumerate(rows)]
    assert (len(records), sum(row["choice"] == 0 for row in rows)) == (count, zero)
    for row, record in zip(rows, records):
        texts = tuple(summary["text"] for summary in row["summaries"])
        assert record.responses == (texts if row["choice"] == 0 else texts[::-1])
    assert all(text.startswith(" ") for record in records for text in record.responses)
