"""Training and held-out examples share no prompt."""

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dpojax.data import reviews
from dpojax.data.records import DataError, Record
from dpojax.launch.data import hold_out, load


def record(prompt, response="yes", id="f:1"):
    return Record(id, prompt, (response,))


@given(st.lists(st.integers(0, 30), min_size=2, max_size=60), st.floats(0.05, 0.9))
def test_all_records_of_a_prompt_fall_on_one_side_and_none_is_lost(prompts, share):
    train, test = hold_out([record(f"prompt {p}", str(i)) for i, p in enumerate(prompts)], share)
    assert not {r.prompt for r in train} & {r.prompt for r in test}
    assert len(train) + len(test) == len(prompts)
    assert test


def test_a_prompt_falls_on_the_same_side_whatever_else_is_in_the_data():
    everything = [record(f"prompt {i}") for i in range(200)]
    held = {r.prompt for r in hold_out(everything, 0.1)[1]}
    half = {r.prompt for r in hold_out(everything[::2], 0.1)[1]}
    assert half == held & {r.prompt for r in everything[::2]}
    assert 8 < len(held) < 35


def test_texts_without_a_prompt_are_held_out_one_by_one():
    train, test = hold_out([record("", f"text {i}") for i in range(1000)], 0.1)
    assert 60 < len(test) < 140
    assert len(train) + len(test) == 1000


def test_the_embedded_task_gives_one_response_to_sft_and_two_to_dpo(tiny):
    config, tokenizer = tiny(), reviews.tokenizer()
    sft = load(config.sft.data, config.tokens, tokenizer, best_only=True, seed=0)
    dpo = load(config.dpo.data, config.tokens, tokenizer, best_only=False, seed=0)
    assert {len(e.responses) for e in sft.examples} == {1}
    assert {len(e.responses) for e in dpo.examples} == {2}
    assert (len(sft.held_out), len(dpo.held_out)) == (10, 10)
    assert not dpo.reports["train"].number("noted", "boundary_merge")


def test_a_file_with_one_prompt_cannot_be_split_and_says_so(tiny, tmp_path):
    path = tmp_path / "pairs.jsonl"
    path.write_text('{"prompt": "the", "chosen": " film", "rejected": " plot"}\n' * 3)
    config = tiny(**{"dpo.data.source": str(path)})
    with pytest.raises(DataError, match=r"pairs\.jsonl: 0 examples to train on and 3 held out"):
        load(config.dpo.data, config.tokens, reviews.tokenizer(), best_only=False, seed=0)


def test_sft_on_preference_data_takes_the_best_response(tiny, tmp_path):
    path = tmp_path / "pairs.jsonl"
    rows = [
        f'{{"prompt": "the {word}", "chosen": " was good", "rejected": " was bad"}}'
        for word in ("film", "plot", "acting", "music", "cast", "story")
    ]
    path.write_text("\n".join(rows))
    config, tokenizer = tiny(**{"sft.data.source": str(path)}), reviews.tokenizer()
    data = load(config.sft.data, config.tokens, tokenizer, best_only=True, seed=0)
    texts = {tokenizer.decode(e.responses[0], skip_special_tokens=True) for e in data.examples}
    assert texts == {"was good"}


def write(path, rows):
    path.write_text("\n".join(json.dumps(row) for row in rows))
    return str(path)


def preference(i, **changes):
    return {"prompt": f"the film {i}", "chosen": " was good", "rejected": " was bad"} | changes


def load_pairs(tiny, **changes):
    config = tiny(**{f"dpo.data.{key}": value for key, value in changes.items()})
    return load(config.dpo.data, config.tokens, reviews.tokenizer(), best_only=False, seed=0)


def test_separate_files_to_train_and_to_evaluate_are_read_whole(tiny, tmp_path):
    train = write(tmp_path / "train.jsonl", [preference(i) for i in range(5)])
    test = write(tmp_path / "test.jsonl", [preference(i) for i in range(3)])
    data = load_pairs(tiny, source=train, eval_source=test)
    assert [e.id for e in data.examples] == [f"train.jsonl:{i}" for i in range(1, 6)] + [
        f"test.jsonl:{i}" for i in range(1, 4)
    ]
    assert data.train == 5


def test_every_record_is_accounted_for(tiny, tmp_path):
    rows = [preference(i) for i in range(40)]
    rows[3] = {"prompt": "the film", "completion": " was good", "label": True}
    data = load_pairs(
        tiny, source=write(tmp_path / "p.jsonl", rows), limit=30, eval_share=0.5, eval_limit=5
    )
    report = data.reports["train and eval"]
    dropped = {cause: tally.count for cause, tally in report.tallies["dropped"].items()}
    assert dropped["one_response"] == 1
    assert dropped["beyond_limit"] == 9
    assert report.kept == len(data.examples)
    assert report.read == 40 == report.kept + sum(dropped.values())
    assert len(data.held_out) == 5


def test_preference_training_on_single_responses_says_what_is_missing(tiny, tmp_path):
    rows = [{"text": f"the film {i} was good"} for i in range(5)]
    with pytest.raises(DataError, match="one response alone states no preference"):
        load_pairs(tiny, source=write(tmp_path / "texts.jsonl", rows))


def test_undesirable_completions_are_not_imitated(tiny, tmp_path):
    rows = [
        {"prompt": f"the film {i}", "completion": " was good", "label": i % 2 == 0}
        for i in range(40)
    ]
    path = write(tmp_path / "unpaired.jsonl", rows)
    config = tiny(**{"sft.data.source": path, "sft.data.eval_share": 0.3})
    data = load(config.sft.data, config.tokens, reviews.tokenizer(), best_only=True, seed=0)
    assert data.reports["train and eval"].number("dropped", "undesirable") == 20
    assert len(data.examples) == 20


def test_columns_of_other_names_are_renamed(tiny, tmp_path):
    rows = [{"q": f"the film {i}", "good": " was good", "bad": " was bad"} for i in range(30)]
    columns = "prompt=q, chosen=good, rejected=bad"
    data = load_pairs(tiny, source=write(tmp_path / "p.jsonl", rows), columns=columns)
    assert len(data.examples) == 30
