"""Prompts with references: whose response is the reference, and that each prompt is there once."""

import json

import pytest

from dpojax.data import reviews
from dpojax.data.prompting import PromptTemplate, require_place
from dpojax.data.records import DataError
from dpojax.data.references import prompt_ids, read_prompts_with_references
from tests.data.chat_tokenizers import letters

MESSAGES = [{"role": "user", "content": "i think"}]


def write(folder, *rows):
    path = folder / "data.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


@pytest.mark.parametrize(
    ("row", "reference"),
    [
        ({"prompt": "p", "chosen": " good", "rejected": " bad"}, " good"),
        ({"prompt": "p", "completion": " done"}, " done"),
        ({"prompt": "p", "completion": " done", "label": True}, " done"),
        ({"prompt": "p", "completion": " done", "label": False}, ""),
        ({"prompt": "p", "responses": [" best", " second", " third"]}, " best"),
        ({"prompt": "p"}, ""),
        ({"prompt": "p", "reference": " it"}, " it"),
        ({"prompt": "p", "few_shot": "q p", "reference": None}, ""),
    ],
)
def test_the_reference_is_the_chosen_best_or_good_response(tmp_path, row, reference):
    (prompt,) = read_prompts_with_references(write(tmp_path, row))
    assert (prompt.text, prompt.reference, prompt.id) == ("p", reference, "data.jsonl:1")


def test_a_prompt_of_several_records_is_there_once_with_its_first_reference(tmp_path):
    rows = [{"prompt": p, "chosen": y, "rejected": "n"} for p, y in [("a", "1"), ("b", "2")] * 3]
    path = write(tmp_path, *rows, {"prompt": "c", "chosen": "3", "rejected": "n"})
    prompts = read_prompts_with_references(path)
    assert [(p.text, p.reference) for p in prompts] == [("a", "1"), ("b", "2"), ("c", "3")]
    assert [p.text for p in read_prompts_with_references(path, skip=1, limit=1)] == ["b"]


def test_the_embedded_task_has_as_many_distinct_held_out_prompts_as_are_asked_for():
    prompts = read_prompts_with_references("reviews", limit=300)
    texts = [prompt.text for prompt in prompts]
    assert len(set(texts)) == len(texts) == 300
    assert texts == list(dict.fromkeys(reviews.prompts("eval", 1000, 0)))[:300]
    assert all(prompt.reference == "" for prompt in prompts)


@pytest.mark.slow
def test_messages_are_read_by_judges_as_text_and_by_policies_through_the_chat_template(tmp_path):
    good, bad = ([{"role": "assistant", "content": text}] for text in ("it is fun", "no"))
    path = write(tmp_path, {"prompt": MESSAGES, "chosen": good, "rejected": bad})
    (prompt,) = read_prompts_with_references(path)
    assert (prompt.text, prompt.reference) == ("i think", "it is fun")
    tokenizer = letters()
    (ids,) = prompt_ids([prompt], tokenizer)
    rendered = tokenizer.apply_chat_template(MESSAGES, tokenize=False, add_generation_prompt=True)
    assert ids == tokenizer(rendered, add_special_tokens=False)["input_ids"]


def test_several_messages_become_paragraphs_with_their_roles(tmp_path):
    turns = [{"role": "system", "content": "be kind"}, *MESSAGES]
    (prompt,) = read_prompts_with_references(
        write(tmp_path, {"prompt": turns, "completion": [{"role": "assistant", "content": "so"}]})
    )
    assert prompt.text == "system: be kind\n\nuser: i think"


def test_a_text_in_the_place_of_a_prompt_is_what_is_encoded(tmp_path):
    (prompt,) = read_prompts_with_references(write(tmp_path, {"prompt": "i think"}))
    tokenizer = reviews.tokenizer()
    assert prompt_ids([prompt], tokenizer, ["this is"]) == [tokenizer("this is")["input_ids"]]


@pytest.mark.parametrize(
    ("rows", "options", "says"),
    [
        ([{"text": "only a text"}], {}, "no record has a prompt"),
        ([{"prompt": "p"}], {"skip": 1}, "no prompt behind the 1 that are skipped"),
        ([{"prompt": "p", "reference": 3}], {}, "data.jsonl:1: field 'reference' should be text"),
        ([{"question": "p"}], {"columns": "prompt=title"}, "which no record has"),
        ([{"what": 1}], {}, "no known form"),
    ],
)
def test_data_without_prompts_is_named(tmp_path, rows, options, says):
    with pytest.raises(DataError, match=says):
        read_prompts_with_references(write(tmp_path, *rows), **options)


def test_columns_name_prompt_and_reference(tmp_path):
    path = write(tmp_path, {"article": "long", "highlights": "short"})
    columns = "prompt=article,completion=highlights"
    (prompt,) = read_prompts_with_references(path, columns=columns)
    assert (prompt.text, prompt.reference) == ("long", "short")


def test_posts_of_the_summaries_repeat_and_are_read_once(shared):
    path = shared / "data/summarize-from-feedback/comparisons/batch18.json.gz"
    prompts = read_prompts_with_references(str(path))
    assert len(prompts) == 110  # says ../shared/data/README.md
    assert all(prompt.reference for prompt in prompts)


def test_few_shot_prompting_puts_examples_before_the_prompt():
    template = PromptTemplate("Q: {prompt}\nA:")
    assert template.apply("x {y}") == "Q: x {y}\nA:"
    assert template.apply("b", [("a", " 1")]) == "Q: a\nA: 1\n\nQ: b\nA:"


def test_a_header_comes_once():
    template = PromptTemplate("Answer.\n---\nQ: {prompt}\nA:")
    assert template.apply("b", [("a", " 1")]) == "Answer.\n\nQ: a\nA: 1\n\nQ: b\nA:"


@pytest.mark.parametrize("text", ["no place", "{prompt}\n---\nno place below the header"])
def test_a_template_without_a_place_for_the_prompt_is_named(text):
    with pytest.raises(DataError, match="few: has no"):
        require_place(text, "few")
