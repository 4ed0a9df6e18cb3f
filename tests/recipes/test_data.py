"""The data of a recipe: no prompt in two parts, and references by people where there are some."""

import json

import pytest

from dpojax import storage
from dpojax.config.defaults import default_config
from dpojax.data.records import DataError
from dpojax.recipes.data import make_data

from .conftest import write_lines

PARTS = ("comparisons", "held_out_comparisons", "judge")


def made(folder, **changes):
    config = default_config()
    config.recipe.update(**changes)
    counts = make_data(config, storage.as_path(folder))
    files = {
        path.stem: [json.loads(line) for line in path.read_text().splitlines()]
        for path in folder.glob("*.jsonl")
    }
    return counts, files


def post(number, *policies, choice=0):
    """A comparison of two summaries of a post."""
    info = {"id": f"t{number}", "post": f"Post {number}.", "title": "T", "subreddit": "r"}
    summaries = [{"text": f" {name} {number}", "policy": name} for name in policies]
    return {"info": info, "summaries": summaries, "choice": choice, "worker": "w"}


def test_all_comparisons_of_a_post_go_to_one_part_and_every_comparison_to_some_part(tmp_path):
    rows = [post(n % 60, f"a{n}", f"b{n}") for n in range(240)]
    source = write_lines(tmp_path / "posts.jsonl", rows)
    counts, files = made(
        tmp_path / "out", comparisons=source, test_share=0.3, judge_share=0.3, test_prompts=0
    )
    prompts = [{row["prompt"] for row in files[name]} for name in PARTS]
    assert all(prompts)
    assert sum(map(len, prompts)) == len(set.union(*prompts)) == 60
    assert sum(len(files[name]) for name in PARTS) == 240
    assert all(len(files[name]) == 4 * len(part) for name, part in zip(PARTS, prompts))
    assert {row["prompt"] for row in files["tests"]} == prompts[1]
    assert {row["prompt"] for row in files["demonstrations"]} == prompts[0]
    assert counts["records"]["judge"] == len(files["judge"])


def test_the_choice_decides_which_summary_is_chosen_and_a_summary_by_people_is_the_reference(
    tmp_path,
):
    rows = [post(n, "model", "other", choice=1) for n in range(40)]
    rows += [post(n, "model", "ref", choice=0) for n in range(20)]
    source = write_lines(tmp_path / "posts.jsonl", rows)
    counts, files = made(tmp_path / "out", comparisons=source, test_share=0.5, test_prompts=0)
    for name in PARTS[:2]:
        for row in files[name]:
            number = row["prompt"].split("Post ")[1].split(".")[0]
            pair = (row["chosen"], row["rejected"])
            models, people = (f" other {number}", f" model {number}"), f" ref {number}"
            assert pair in (models, (f" model {number}", people))
    references = {row["prompt"]: row["reference"] for row in files["tests"]}
    by_people = [text for text in references.values() if text.startswith(" ref")]
    assert 0 < len(by_people) < len(references)
    assert counts["test_references_by_people"] == len(by_people)
    assert all(text.startswith((" ref", " other")) for text in references.values())


def test_demonstrations_and_tests_of_their_own_are_used_and_no_test_is_trained_on(tmp_path):
    pairs = [{"prompt": f"q{n}", "chosen": "good", "rejected": "bad"} for n in range(50)]
    lessons = [{"prompt": f"q{n}", "completion": f" lesson {n}"} for n in range(80)]
    tests = [{"prompt": f"q{n}", "completion": f" right {n}"} for n in range(10)]
    sources = {
        name: write_lines(tmp_path / f"{name}.jsonl", rows)
        for name, rows in {
            "comparisons": pairs,
            "demonstrations": lessons,
            "tests": tests,
        }.items()
    }
    _, files = made(tmp_path / "out", **sources, test_share=0.2, test_prompts=0)
    asked = {row["prompt"]: row["reference"] for row in files["tests"]}
    assert asked == {row["prompt"]: row["completion"] for row in tests}
    trained = {row["prompt"] for name in ("comparisons", "demonstrations") for row in files[name]}
    assert not trained & asked.keys()
    held_out = {row["prompt"] for row in files["held_out_comparisons"]}
    assert asked.keys() < held_out
    assert (
        len(trained) + len(held_out | {r["prompt"] for r in files["held_out_demonstrations"]}) == 80
    )


def test_few_shot_prompts_hold_short_demonstrations_that_are_trained_on_and_then_the_prompt(
    tmp_path,
):
    long = "word " * 50
    rows = [
        {"prompt": f"q{n}?", "chosen": " yes" + long * (n > 15), "rejected": "n"} for n in range(60)
    ]
    source = write_lines(tmp_path / "pairs.jsonl", rows)
    _, files = made(
        tmp_path / "out", comparisons=source, instruction="Answer. ", shots=2, test_share=0.3
    )
    trained = {row["prompt"] for row in files["demonstrations"]}
    for row in files["tests"]:
        assert row["zero_shot"] == "Answer. " + row["prompt"]
        start, *examples, asked = row["few_shot"].removeprefix("Answer. ").split("\n\n")
        shown = [start, *examples]
        assert asked == row["prompt"]
        assert len(shown) == 2
        assert all(text.endswith(" yes") and text[: -len(" yes")] in trained for text in shown)


def test_long_prompts_are_not_judged_on_and_articles_are_the_other_domain(tmp_path):
    rows = [{"prompt": "w " * n, "chosen": "a", "rejected": "b"} for n in range(1, 41)]
    source = write_lines(tmp_path / "pairs.jsonl", rows)
    news = [{"article": "n " * 5 * n, "highlights": f"h{n}", "id": "x"} for n in range(1, 5)]
    shifted = write_lines(tmp_path / "news.jsonl", news)
    counts, files = made(
        tmp_path / "out", comparisons=source, shifted=shifted, max_words=20, test_share=0.5
    )
    assert max(len(row["prompt"].split()) for row in files["tests"]) <= 20
    assert counts["test_prompts_of_any_length"] > len(files["tests"])
    _, short = made(tmp_path / "short", comparisons=source, max_reference_words=0, test_share=0.5)
    assert len(short["tests"]) == counts["test_prompts_of_any_length"]
    wordy = [{"prompt": f"q{n}", "chosen": "w " * n, "rejected": "b"} for n in range(1, 41)]
    wordy = write_lines(tmp_path / "wordy.jsonl", wordy)
    _, files_of_short = made(
        tmp_path / "w", comparisons=wordy, max_reference_words=9, test_share=0.5
    )
    assert max(len(row["reference"].split()) for row in files_of_short["tests"]) <= 9
    assert sorted(row["reference"] for row in files["shifted"]) == [" h1", " h2", " h3"]
    assert all(row["prompt"].startswith("Article: n") for row in files["shifted"])


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([{"text": "no prompt"}], r"recipe\.comparisons = .*no record has a prompt"),
        (
            [{"messages": [{"role": r, "content": r} for r in ("user", "assistant")]}],
            r"dialogue of messages; a recipe reads prompts that are text",
        ),
        (
            [{"prompt": "w " * 9, "chosen": "a", "rejected": "b"}] * 9,
            r"no prompt is left to judge on",
        ),
    ],
)
def test_data_that_no_recipe_can_use_are_refused_in_a_sentence(tmp_path, rows, message):
    source = write_lines(tmp_path / "rows.jsonl", rows)
    with pytest.raises(DataError, match=message):
        made(tmp_path / "out", comparisons=source, max_words=3)
    assert not (tmp_path / "out").exists()


def test_a_field_summaries_of_another_meaning_is_no_reference(tmp_path):
    rows = [{"prompt": f"p{n}", "chosen": "a", "rejected": "b"} for n in range(20)]
    rows = [row | {"summaries": ["of", {"policy": "ref"}]} for row in rows]
    source = write_lines(tmp_path / "pairs.jsonl", rows)
    counts, _ = made(tmp_path / "out", comparisons=source, test_share=0.5)
    assert counts["test_references_by_people"] == 0
