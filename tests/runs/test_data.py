"""Training and held-out examples share no prompt."""

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dpojax.data import reviews
from dpojax.data.records import DataError, Record
from dpojax.data.report import Report
from dpojax.stages.data import DataRequirements, load
from dpojax.stages.selection import are_held_out, hash_of, hold_out, with_some_held_out

BEST, RANKED, LABELLED = DataRequirements("best"), DataRequirements(), DataRequirements("labelled")


def record(prompt, response="yes", id="f:1"):
    return Record(id, prompt, (response,))


def sides(records, share):
    """The records to train on, and those held out: by record, and by all hashes at once."""

    def split(below):
        sided = list(hold_out(records, below, 0, Report()))
        return [
            [record for held_out, record in sided if held_out is side] for side in (False, True)
        ]

    train, test = with_some_held_out(share, split)
    at_once = are_held_out([hash_of(record) for record in records], share)
    assert [record for record, held_out in zip(records, at_once) if held_out] == test
    return train, test


@given(st.lists(st.integers(0, 30), min_size=2, max_size=60), st.floats(0.05, 0.9))
def test_all_records_of_a_prompt_fall_on_one_side_and_none_is_lost(prompts, share):
    train, test = sides([record(f"prompt {p}", str(i)) for i, p in enumerate(prompts)], share)
    assert not {r.prompt for r in train} & {r.prompt for r in test}
    assert len(train) + len(test) == len(prompts)
    assert test


def test_a_prompt_falls_on_the_same_side_whatever_else_is_in_the_data():
    everything = [record(f"prompt {i}") for i in range(200)]
    held = {r.prompt for r in sides(everything, 0.1)[1]}
    half = {r.prompt for r in sides(everything[::2], 0.1)[1]}
    assert half == held & {r.prompt for r in everything[::2]}
    assert 8 < len(held) < 35


def test_texts_without_a_prompt_are_held_out_one_by_one():
    train, test = sides([record("", f"text {i}") for i in range(1000)], 0.1)
    assert 60 < len(test) < 140
    assert len(train) + len(test) == 1000


def test_the_embedded_task_gives_one_response_to_sft_and_two_to_preference_training(tiny):
    config, tokenizer = tiny(), reviews.tokenizer()
    sft = load(config.sft.data, config.tokens, tokenizer, requirements=BEST, seed=0)
    dpo = load(config.preference.data, config.tokens, tokenizer, requirements=RANKED, seed=0)
    assert {len(e.responses) for e in sft.examples} == {1}
    assert {len(e.responses) for e in dpo.examples} == {2}
    assert (len(sft.held_out), len(dpo.held_out)) == (10, 10)
    assert not dpo.reports["train"].number("noted", "boundary_merge")


def test_a_file_with_one_prompt_cannot_be_split_and_says_so(tiny, tmp_path):
    path = tmp_path / "pairs.jsonl"
    path.write_text('{"prompt": "the", "chosen": " film", "rejected": " plot"}\n' * 3)
    config = tiny(**{"preference.data.source": str(path)})
    with pytest.raises(DataError, match=r"pairs\.jsonl: 0 examples to train on and 3 held out"):
        load(
            config.preference.data, config.tokens, reviews.tokenizer(), requirements=RANKED, seed=0
        )


def test_sft_on_preference_data_takes_the_best_response(tiny, tmp_path):
    path = tmp_path / "pairs.jsonl"
    rows = [
        f'{{"prompt": "the {word}", "chosen": " was good", "rejected": " was bad"}}'
        for word in ("film", "plot", "acting", "music", "cast", "story")
    ]
    path.write_text("\n".join(rows))
    config, tokenizer = tiny(**{"sft.data.source": str(path)}), reviews.tokenizer()
    data = load(config.sft.data, config.tokens, tokenizer, requirements=BEST, seed=0)
    texts = {tokenizer.decode(e.responses[0], skip_special_tokens=True) for e in data.examples}
    assert texts == {"was good"}


def test_what_imitates_the_best_response_trains_on_it_alone_and_is_judged_on_all(tiny, tmp_path):
    rows = [
        {"prompt": f"the {word}", "responses": [" was good", " was slow", " was bad"]}
        for word in ("film", "plot", "acting", "music", "cast", "story")
    ]
    config = tiny(**{"preference.data.source": write(tmp_path / "ranked.jsonl", rows)})
    source = config.preference.data, config.tokens, reviews.tokenizer()
    data = load(*source, requirements=DataRequirements(best_only=True), seed=0)
    ranked = load(*source, requirements=RANKED, seed=0)
    for i, (one, whole) in enumerate(zip(data.examples, ranked.examples, strict=True)):
        count = 1 if i in data.training else 3
        assert [list(x) for x in one.responses] == [list(x) for x in whole.responses[:count]]
        assert len(one.cut) == count


def write(path, rows):
    path.write_text("\n".join(json.dumps(row) for row in rows))
    return str(path)


def preference(i, **changes):
    return {"prompt": f"the film {i}", "chosen": " was good", "rejected": " was bad"} | changes


def load_pairs(tiny, requirements=RANKED, malformed="drop", **changes):
    config = tiny(**{f"preference.data.{key}": value for key, value in changes.items()})
    config.tokens.malformed = malformed
    return load(
        config.preference.data,
        config.tokens,
        reviews.tokenizer(),
        requirements=requirements,
        seed=0,
    )


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
    assert report.read == 31  # 30 usable ones and one that is not; what follows is not read
    assert report.remarks == ["p: reading stopped at limit=30; what follows was not read"]
    assert report.kept == len(data.examples)
    assert report.read == report.kept + sum(dropped.values())
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
    data = load(config.sft.data, config.tokens, reviews.tokenizer(), requirements=BEST, seed=0)
    assert data.reports["train and eval"].number("dropped", "undesirable") == 20
    assert len(data.examples) == 20


def test_columns_of_other_names_are_renamed(tiny, tmp_path):
    rows = [{"q": f"the film {i}", "good": " was good", "bad": " was bad"} for i in range(30)]
    columns = "prompt=q, chosen=good, rejected=bad"
    data = load_pairs(tiny, source=write(tmp_path / "p.jsonl", rows), columns=columns)
    assert len(data.examples) == 30


def test_the_embedded_pairs_carry_the_rewards_that_made_the_choice(tiny):
    data = load_pairs(tiny, DataRequirements(scores=True), source="reviews")
    config = tiny()
    rows = reviews.preferences("train", config.preference.data.limit, 0)
    assert [e.scores for e in data.examples[: data.train]] == [
        (row["chosen_reward"], row["rejected_reward"]) for row in rows
    ]
    assert all(chosen > rejected for chosen, rejected in (e.scores for e in data.examples))


def test_a_record_without_the_scores_that_are_wanted_is_named(tiny, tmp_path):
    rows = [preference(i, margin=1.0) for i in range(20)]
    source = write(tmp_path / "p.jsonl", rows)
    data = load_pairs(tiny, DataRequirements(scores=True), source=source)
    assert {e.scores for e in data.examples} == {(1.0, 0.0)}
    del rows[4]["margin"]
    source = write(tmp_path / "p.jsonl", rows)
    data = load_pairs(tiny, DataRequirements(scores=True), source=source)
    tally = data.reports["train and eval"].tallies["dropped"]["no_score"]
    assert (tally.count, tally.examples, len(data.examples)) == (1, ["p.jsonl:5"], 19)
    with pytest.raises(DataError, match=r"p\.jsonl:5: .*score_chosen and score_rejected"):
        load_pairs(tiny, DataRequirements(scores=True), source=source, malformed="error")
    assert len(load_pairs(tiny, source=source).examples) == 20
    rows = [preference(i) for i in range(20)]
    with pytest.raises(
        DataError, match=r"all 20 records were dropped:(.|\n)*p\.jsonl:1: this loss"
    ):
        load_pairs(tiny, DataRequirements(scores=True), source=write(tmp_path / "p.jsonl", rows))


def test_scores_that_differ_by_more_than_the_loss_takes_are_named(tiny, tmp_path):
    needs = DataRequirements(scores=True, unit_gaps=True)
    rows = [preference(i, score_chosen=0.9, score_rejected=0.2) for i in range(20)]
    rows[3] |= {"score_chosen": 0.1, "score_rejected": 1.1}  # a label that the scores contradict
    source = write(tmp_path / "p.jsonl", rows)
    assert len(load_pairs(tiny, needs, source=source).examples) == 20
    rows[4] |= {"score_chosen": 8.0, "score_rejected": 6.5}
    source = write(tmp_path / "p.jsonl", rows)
    with pytest.raises(DataError, match=r"p\.jsonl:5: its scores differ by 1\.5.* into \[0, 1\]"):
        load_pairs(tiny, needs, source=source)
    assert len(load_pairs(tiny, DataRequirements(scores=True), source=source).examples) == 20


def ranking(i, scores):
    words = ("good", "bad", "great")[: len(scores)]
    return {
        "prompt": f"the film {i}",
        "responses": [f" was {word}" for word in words],
        "scores": scores,
    }


@pytest.mark.parametrize(
    ("requirements", "kept", "rank"),
    [
        (RANKED, 30, {None, (0, 0, 2)}),
        (DataRequirements(ties=True), 40, {None, (0, 0, 2), (0, 0)}),
        (BEST, 30, {None}),
    ],
)
def test_rankings_that_are_all_tied_are_dropped_unless_ties_are_wanted(
    tiny, tmp_path, requirements, kept, rank
):
    kinds = ([3, 2, 1], [2, 2, 1], [1, 1], [2, 1])
    rows = [ranking(i, kinds[i % 4]) for i in range(40)]
    data = load_pairs(tiny, requirements, source=write(tmp_path / "r.jsonl", rows))
    report = data.reports["train and eval"]
    assert report.number("dropped", "all_tied") == 40 - kept
    assert len(data.examples) == report.kept == kept
    assert {e.rank for e in data.examples} == rank
    if requirements.form == "best":
        assert {len(e.responses) for e in data.examples} == {1}
        assert {e.scores for e in data.examples} == {(3.0,), (2.0,)}


def test_labelled_data_come_from_pairs_rankings_and_labels_alike(tiny, tmp_path):
    rows = [preference(i) for i in range(10)]
    rows += [ranking(i, [2, 1, 3]) for i in range(10, 20)]
    rows += [
        {"prompt": f"the film {i}", "completion": " was fine", "label": i % 2 == 0}
        for i in range(20, 30)
    ]
    rows += [{"prompt": "the film", "completion": " was fine"}, ranking(31, [1, 1])]
    rows += [preference(32, rejected=" was good")]
    source = write(tmp_path / "m.jsonl", rows)
    data = load_pairs(tiny, LABELLED, source=source, form="auto")
    tokenizer = reviews.tokenizer()
    texts = {
        e.id: (tokenizer.decode(e.responses[0], skip_special_tokens=True), e.label)
        for e in data.examples
    }
    expected = {f"m.jsonl:{i + 1}:chosen": ("was good", True) for i in range(10)}
    expected |= {f"m.jsonl:{i + 1}:rejected": ("was bad", False) for i in range(20)}
    expected |= {f"m.jsonl:{i + 1}:chosen": ("was great", True) for i in range(10, 20)}
    expected |= {f"m.jsonl:{i + 1}": ("was fine", i % 2 == 0) for i in range(20, 30)}
    assert texts == expected
    report = data.reports["train and eval"]
    dropped = {cause: tally.count for cause, tally in report.tallies["dropped"].items()}
    assert dropped == {"no_label": 1, "all_tied": 1, "identical": 1}
    assert report.number("noted", "between_best_and_worst") == 10
    assert report.number("noted", "split_in_two") == 20
    assert report.read == 33 + 20 == report.kept + sum(dropped.values())
    assert "between_best_and_worst" in str(report)
    lines = lambda part: {data.examples[i].id.split(":")[1] for i in part}
    assert not lines(data.training) & lines(data.held_out)


@pytest.mark.parametrize("policy", ["drop", "keep", "error"])
def test_a_pair_of_equal_responses_follows_the_policy_before_it_is_split(tiny, tmp_path, policy):
    rows = [preference(i) for i in range(9)] + [preference(9, rejected=" was good")]
    config = tiny(
        **{"preference.data.source": write(tmp_path / "p.jsonl", rows), "tokens.identical": policy}
    )
    source = (config.preference.data, config.tokens, reviews.tokenizer())
    if policy == "error":
        with pytest.raises(DataError, match=r"p\.jsonl:10: identical"):
            load(*source, requirements=LABELLED, seed=0)
        return
    data = load(*source, requirements=LABELLED, seed=0)
    outcome = "noted" if policy == "keep" else "dropped"
    assert data.reports["train and eval"].number(outcome, "identical") == 1
    assert len(data.examples) == (20 if policy == "keep" else 18)


def test_half_of_a_pair_that_is_too_long_leaves_the_other_half(tiny, tmp_path):
    rows = [preference(i, rejected=" was bad" * 60) for i in range(10)]
    rows += [preference(i) for i in range(10, 20)]
    data = load_pairs(tiny, LABELLED, source=write(tmp_path / "p.jsonl", rows))
    assert sum(e.label for e in data.examples) == 20
    assert sum(not e.label for e in data.examples) == 10
    assert data.reports["train and eval"].number("dropped", "too_long") == 10


def test_the_limits_of_labelled_data_count_records(tiny, tmp_path):
    rows = [preference(i) for i in range(40)]
    data = load_pairs(
        tiny,
        LABELLED,
        source=write(tmp_path / "p.jsonl", rows),
        limit=30,
        eval_share=0.5,
        eval_limit=5,
    )
    report = data.reports["train and eval"]
    assert len(data.held_out) == 10
    assert (
        report.kept
        == len(data.examples)
        == 2 * (30 - report.number("dropped", "beyond_eval_limit"))
    )


@pytest.mark.parametrize(("label", "kind"), [(True, "desirable"), (False, "undesirable")])
def test_labels_of_one_kind_are_refused(tiny, tmp_path, label, kind):
    rows = [
        {"prompt": f"the film {i}", "completion": " was fine", "label": label} for i in range(20)
    ]
    source = write(tmp_path / "l.jsonl", rows)
    with pytest.raises(DataError, match=rf"l\.jsonl: all \d+ examples .* are {kind};"):
        load_pairs(tiny, LABELLED, source=source)


@pytest.mark.slow
def test_mismatched_responses_stay_on_their_side_of_the_split(tiny):
    requirements = DataRequirements("labelled", mismatched=True)
    data = load_pairs(tiny, requirements, source="reviews")
    plain = load_pairs(tiny, LABELLED, source="reviews")
    assert {len(e.responses) for e in data.examples} == {2}
    for part in (data.training, data.held_out):
        prompts_of = {}
        for i in part:
            example = plain.examples[i]
            prompts_of.setdefault(example.responses[0].tobytes(), set()).add(
                example.prompt.tobytes()
            )
            assert data.examples[i].responses[0].tolist() == example.responses[0].tolist()
        for i in part:
            example = data.examples[i]
            assert not example.cut[1]
            assert prompts_of[example.responses[1].tobytes()] - {example.prompt.tobytes()}
