"""The linter counts what was put in by hand, and what is known of the real data."""

import gzip
import json

import numpy as np
import pytest
import scipy.stats

from dpojax.data import lint, sources
from dpojax.data.records import Record

LONG = "What is the capital of Burkina Faso?"


def pair(number, prompt="p", chosen="good", rejected="bad"):
    return Record(f"f:{number}", prompt, (chosen, rejected))


def find(name, records, **options):
    (finding,) = (one for one in lint.lint(records, **options) if one.name == name)
    return finding


def counted(name, records, **options):
    finding = find(name, records, **options)
    return finding.count, finding.examples


def test_duplicates_repeat_prompt_responses_and_order():
    records = [
        pair(1),
        pair(2),  # again
        pair(3, chosen="bad", rejected="good"),  # the other order
        pair(4, prompt="q"),  # another prompt
        pair(5, prompt=" p\n", chosen="good "),  # again, but for white space
    ]
    assert counted("duplicate", records) == (2, ("f:2 / f:1", "f:5 / f:1"))
    assert counted("duplicate", records[::2]) == (1, ("f:5 / f:1",))


def test_a_contradiction_counts_both_sides():
    swapped = pair(3, chosen="bad", rejected="good")
    records = [pair(1), pair(2, prompt="q"), swapped, pair(4, chosen="good", rejected="worse")]
    assert counted("contradicting", records) == (2, ("f:1 / f:3", "f:3 / f:1"))


def test_equal_responses_contradict_nothing():
    records = [pair(1, chosen="same", rejected="same"), pair(2, chosen="same", rejected="same")]
    assert counted("contradicting", records) == (0, ())


def test_rankings_contradict_in_any_two_of_their_responses():
    one, other = Record("f:1", "p", ("a", "b", "c")), Record("f:2", "p", ("d", "c", "b"))
    assert counted("contradicting", [one, other])[0] == 2
    assert counted("contradicting", [one, Record("f:2", "p", ("a", "c"))])[0] == 0


def test_tied_responses_contradict_no_order_and_are_measured_by_none():
    tied = Record("f:1", "p", ("a", "b", "long"), rank=(0, 0, 2))
    assert counted("contradicting", [tied, pair(2, chosen="b", rejected="a")]) == (0, ())
    assert counted("contradicting", [tied, pair(2, chosen="long", rejected="a")])[0] == 2
    level = Record("f:1", "p", ("longer", "short"), rank=(0, 0))
    assert find("longer_chosen", [level, tied]).of == 1


def test_an_unpaired_response_with_both_labels_contradicts_itself():
    def unpaired(number, label, response="a"):
        return Record(f"f:{number}", "p", (response,), label)

    records = [unpaired(1, True), unpaired(2, False), unpaired(3, True, "b"), unpaired(4, True)]
    assert counted("contradicting", records) == (3, ("f:1 / f:2", "f:2 / f:1"))
    assert counted("duplicate", records) == (1, ("f:4 / f:1",))


def test_evaluation_prompts_are_found_in_the_training_data():
    evaluation = [pair(1, prompt="a"), pair(2, prompt="b\n")]
    records = [pair(7, prompt="b"), pair(8, prompt="c"), pair(9, prompt="b", chosen="x")]
    found = counted("in_evaluation", records, evaluation=evaluation)
    assert found == (2, ("f:7 / f:2", "f:9 / f:2"))
    assert "in_evaluation" not in {one.name for one in lint.lint(records)}


def test_texts_without_a_prompt_overlap_by_their_text():
    records = [Record("f:1", "", ("one",)), Record("f:2", "", ("two",))]
    evaluation = [Record("g:5", "", ("two",))]
    assert counted("in_evaluation", records, evaluation=evaluation) == (1, ("f:2 / g:5",))


def test_one_message_is_the_same_prompt_as_its_text():
    message = ({"role": "user", "content": "b"},)
    answers = tuple(({"role": "assistant", "content": text},) for text in ("good", "bad"))
    record = Record("f:1", message, answers)
    assert counted("in_evaluation", [record], evaluation=[pair(1, prompt="b")])[0] == 1
    assert counted("duplicate", [pair(0, prompt="b"), record])[0] == 1


@pytest.mark.parametrize(
    ("prompt", "response", "repeats"),
    [
        (LONG, f"{LONG} Ouagadougou.", True),
        (LONG, f" {LONG.replace(' ', '  ')}", True),
        (LONG, f"You ask: {LONG}", False),
        (LONG, "Ouagadougou", False),
        ("Hi", "Hi there", False),  # too short to tell
        (f"\n\nHuman: Hello\n\nAssistant: Yes?\n\nHuman: {LONG}\n\nAssistant:", f"{LONG} O.", True),
        (f"\n\nHuman: {LONG}\n\nAssistant: O.\n\nHuman: Why?\n\nAssistant:", LONG, False),
        (f"Below ...\n\n### Instruction:\n{LONG}\n\n### Response:\n", LONG, True),
        (({"role": "system", "content": "s"}, {"role": "user", "content": LONG}), LONG, True),
    ],
)
def test_a_response_that_begins_with_the_prompt_or_its_last_turn_repeats_it(
    prompt, response, repeats
):
    if not isinstance(prompt, str):
        response = ({"role": "assistant", "content": response},)
    record = Record("f:1", prompt, (response, response))
    assert counted("repeats_prompt", [record]) == ((1, ("f:1",)) if repeats else (0, ()))


@pytest.mark.parametrize(
    ("text", "is_fault"),
    [
        ("a<|im_end|>", True),
        ("<|eot_id|>", True),
        ("</s>", True),
        ("[/INST] yes", True),
        ("<end_of_turn>", True),
        ("<0x0A>", False),
        ("a <strong> b </span> | <s", False),
        ("<<custom>>", True),  # the tokenizer's own
        ("[INSTALL]", False),
    ],
)
def test_control_tokens_of_any_model_are_found(text, is_fault):
    records = [pair(1), pair(2, chosen=text)]
    got = counted("control_token", records, control_tokens=["<<custom>>"])
    assert got == ((1, ("f:2",)) if is_fault else (0, ()))


def test_broken_text_is_found_in_prompts_and_responses():
    half = json.loads('"\\ud83d"')  # valid JSON, but no text
    whole = json.loads('"\\ud83d\\ude00"')
    records = [pair(1, prompt="caf\ufffd"), pair(2, chosen=half), pair(3, chosen=whole + "é")]
    assert counted("broken_text", records) == (2, ("f:1", "f:2"))


def test_all_lines_that_are_not_utf8_are_listed(tmp_path):
    content = b'{"a": "x"}\n{"a": "\xff"}\n\n{"a": "\xc3\xa9"}\n{"a": "\xe9"}\n'
    (tmp_path / "a.jsonl").write_bytes(content)
    (tmp_path / "a.jsonl.gz").write_bytes(gzip.compress(content))
    assert lint.not_utf8(tmp_path / "a.jsonl") == [2, 5]
    assert lint.not_utf8(tmp_path / "a.jsonl.gz") == [2, 5]


def test_length_bias_counts_the_longer_among_unequal_pairs():
    longer = [pair(i, prompt=str(i), chosen="long", rejected="s") for i in range(13)]
    shorter = [pair(i, prompt=str(i), chosen="s", rejected="long") for i in range(20, 27)]
    equal = [pair(40, chosen="abc", rejected="xyz")]
    single = [Record("f:50", "p", ("alone",))]
    finding = find("longer_chosen", longer + shorter + equal + single)
    assert (finding.count, finding.of, finding.examples) == (13, 20, ("f:0", "f:1"))
    exact = scipy.stats.binomtest(13, 20).proportion_ci(0.95, method="wilson")
    assert f"{100 * exact.low:.1f} % to {100 * exact.high:.1f} %" in finding.note


def polite(number, swapped=False):
    """A pair that its words decide; the number keeps prompts apart."""
    kind, rude = f"Thank you , reader{number % 7}", f"Go away reader{number % 5}"
    return pair(number, f"question {number}", *((rude, kind) if swapped else (kind, rude)))


def test_swapped_labels_are_found_where_words_decide():
    swapped = {11, 42, 77}
    records = [polite(number, number in swapped) for number in range(100)]
    finding = find("words_disagree", records)
    assert (finding.count, finding.of) == (3, 100)
    assert set(finding.examples) < {"f:11", "f:42", "f:77"}
    assert "it ranks 97.0 % of held-out pairs as labelled" in finding.note


def test_of_many_pairs_an_even_part_is_looked_at(monkeypatch):
    monkeypatch.setattr(lint.label_noise, "MOST_PAIRS", 60)
    records = [pair(n, f"p {n}", f"good {n}", "bad") for n in range(200)]
    finding = find("words_disagree", records)
    assert finding.of == 50  # every fourth: every second would be 100
    assert "one pair in 4 was looked at" in finding.note


def test_few_pairs_are_not_judged_and_identical_ones_do_not_count():
    records = [polite(number) for number in range(49)]
    same = [pair(99, chosen="same", rejected="same")]
    assert "fewer than 50 pairs" in find("words_disagree", records + same).note
    assert find("words_disagree", [*records, polite(49), *same]).of == 50


def test_measures_are_no_faults_and_clean_data_have_none():
    records = [polite(number) for number in range(60)]
    findings = lint.lint(records, evaluation=[pair(0, prompt="else")])
    assert [one.name for one in findings] == list(lint.WORDS)
    assert not any(one.is_fault for one in findings)
    assert find("longer_chosen", records).count == 60


def test_each_fault_is_one():
    records = [
        pair(1),
        pair(2),
        pair(3, chosen="bad", rejected="good"),
        pair(4, prompt=LONG, chosen=LONG),
        pair(5, chosen="</s>"),
        pair(6, chosen="\ufffd"),
    ]
    findings = lint.lint(records, evaluation=[pair(9)])
    faults = {one.name for one in findings if one.is_fault}
    assert faults == set(lint.WORDS) - set(lint.MEASURES)


def test_the_table_is_aligned_and_shows_two_examples():
    lines = lint.table(lint.lint([pair(n) for n in range(4)])).splitlines()
    assert lines[0].split() == ["lint", "count", "of", "share"]
    assert lines[1].endswith("3   4   75.00 %")
    assert lines[2] == "      f:1 / f:0, f:2 / f:0"
    assert lines[3].index("0.00 %") == lines[1].index("75.00 %") + 1
    assert lines[-1].startswith("  words_disagree: not checked")


def raw_rows(path):
    with gzip.open(path, "rt", encoding="utf-8") as file:
        return [json.loads(line) for line in file]


@pytest.mark.slow
def test_prompts_that_recur_between_real_files_are_all_found(shared):
    folder = shared / "data/hh-rlhf/helpful-single-turn"
    held = {
        row["chosen"].rpartition("\n\nAssistant:")[0] for row in raw_rows(folder / "test.jsonl.gz")
    }
    expected = set()
    for number, row in enumerate(raw_rows(folder / "train_gt.jsonl.gz"), start=1):
        prompts = {row[name].rpartition("\n\nAssistant:")[0] for name in ("chosen", "rejected")}
        if len(prompts) == 1 and prompts <= held:
            expected.add(f"train_gt.jsonl.gz:{number}")
    train, _ = sources.load_records(folder / "train_gt.jsonl.gz")
    test, _ = sources.load_records(folder / "test.jsonl.gz")
    finding = find("in_evaluation", train, evaluation=test)
    assert 10 < finding.count == len(expected) < 34  # the three files share 34
    assert {example.split(" / ")[0] for example in finding.examples} < expected


def test_contradictions_of_real_annotators_are_all_found(shared):
    path = shared / "data/summarize-from-feedback/comparisons/batch13.json.gz"
    claims = []
    for row in raw_rows(path):
        texts = [" ".join(summary["text"].split()) for summary in row["summaries"]]
        info = row["info"]
        question = (info["subreddit"], info["title"], " ".join(info["post"].split()))
        claims.append((question, texts[row["choice"]], texts[1 - row["choice"]]))
    denied = [claim for claim in claims if (claim[0], claim[2], claim[1]) in set(claims)]
    records, _ = sources.load_records(path)
    counts = {finding.name: finding.count for finding in lint.lint(records)}
    assert counts["contradicting"] == len(denied) > 50
    assert counts["duplicate"] == len(claims) - len(set(claims)) > 50


@pytest.mark.slow
def test_texts_that_are_in_both_halves_of_imdb_are_found(shared):
    import pyarrow.parquet

    folder = shared / "data/imdb"
    train, test = (
        pyarrow.parquet.read_table(folder / f"{name}.parquet")["text"].to_pylist()
        for name in ("train", "test")
    )
    as_records = [
        [Record(f"{name}:{n}", "", (text,)) for n, text in enumerate(texts, start=1)]
        for name, texts in (("train", train), ("test", test))
    ]
    both = set(train) & set(test)
    assert len(both) == 123
    finding = find("in_evaluation", as_records[0], evaluation=as_records[1])
    assert finding.count == int(np.sum([text in both for text in train]))
