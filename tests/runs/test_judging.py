"""Judging: who is compared with whom, what the report says, and what a second call does not do."""

import contextlib
import csv
import dataclasses
import functools
import json
import pathlib
import re
import subprocess
import sys

import pytest

from dpojax import storage
from dpojax.config.errors import ConfigError
from dpojax.data import reviews
from dpojax.data.records import DataError
from dpojax.evaluation.judging import open_judge
from dpojax.evaluation.judging.asking import CostReached
from dpojax.evaluation.judging.costs import Prices, Tokens
from dpojax.evaluation.judging.judge import JudgeError
from dpojax.evaluation.judging.open_judge import JudgeKind
from dpojax.evaluation.judging.verdicts import Choice, Outcome, Reply
from dpojax.evaluation.rewards import exact_reviews
from dpojax.runs import judging, responses, sides
from dpojax.runs.judging import Settings, Side, settings_from_json
from dpojax.runs.policy import load_policy
from dpojax.storage import locks

from .conftest import ROOT, environment
from .test_preferences import save_model

RECORDS = [*{x["prompt"]: x for x in reviews.preferences("eval", 60, 3)}.values()][:30]


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


@pytest.fixture
def data(tmp_path):
    """Pairs; and files of responses: of each pair the good one, and the bad one."""
    answers = {
        name: [{"prompt": x["prompt"], "response": x[key]} for x in RECORDS]
        for name, key in (("good", "chosen"), ("bad", "rejected"))
    }
    files = {name: write(tmp_path / f"{name}.jsonl", rows) for name, rows in answers.items()}
    return files | {"pairs": write(tmp_path / "pairs.jsonl", RECORDS), "out": str(tmp_path / "out")}


def samples(folder):
    return [json.loads(line) for line in (folder / "samples.jsonl").read_text().splitlines()]


def settings(data, **changes):
    values = {"out": data["out"], "prompts": data["pairs"], "judge": "exact"}
    values |= {"a": (Side(data["good"], "good"), Side(data["bad"], "bad")), "resamples": 200}
    return Settings(**values | changes)


def test_files_are_judged_against_the_references(data):
    good, bad = judging.judge(settings(data)).rows
    assert good.win_rate.counts[Outcome.TIE] == len(RECORDS)  # they are the references
    assert bad.win_rate.value == 0  # the oracle chose the others
    assert bad.win_rate.prompts == len(RECORDS)
    assert bad.cut is None


def test_the_folder_holds_the_report_the_numbers_the_figure_and_the_samples(data, tmp_path):
    judging.judge(settings(data, b=Side(data["bad"], "bad side")))
    names = {path.name for path in (tmp_path / "out").iterdir()}
    expected = {"report.md", "win_rates.csv", "win_rates.png", "win_rates.pdf", "samples.jsonl"}
    assert expected <= names
    assert "Win rates against bad side" in (tmp_path / "out/report.md").read_text()
    with open(tmp_path / "out/win_rates.csv") as file:
        rates = {row["policy"]: float(row["win_rate"]) for row in csv.DictReader(file)}
    assert rates == {"good": 1.0, "bad": 0.5}
    lines = [
        json.loads(line) for line in (tmp_path / "out/samples.jsonl").read_text().split("\n")[:-1]
    ]
    assert [line["outcome"] for line in lines] == ["win"] * len(RECORDS) + ["tie"] * len(RECORDS)
    assert lines[0]["a"] == RECORDS[0]["chosen"]


@pytest.mark.parametrize("key", ["prompt", "id"])
def test_a_file_that_lacks_a_prompt_is_an_error_that_names_it(data, tmp_path, key):
    ids = [f"pairs.jsonl:{i}" for i in range(1, len(RECORDS) + 1)]
    rows = [
        {key: record["prompt"] if key == "prompt" else id, "response": "x"}
        for record, id in zip(RECORDS, ids)
    ]
    whole = write(tmp_path / "whole.jsonl", rows)
    judging.judge(settings(data, a=(Side(whole),)))
    partly = write(tmp_path / "partly.jsonl", rows[:7] + rows[8:])
    with pytest.raises(DataError, match=r"partly\.jsonl: has no response to .* pairs\.jsonl:8"):
        judging.judge(settings(data, a=(Side(partly),)))


def test_ids_of_the_records_themselves_join_responses_to_prompts(data, tmp_path):
    pairs = write(tmp_path / "numbered.jsonl", [x | {"id": i} for i, x in enumerate(RECORDS)])
    rows = [{"id": i, "response": x["chosen"]} for i, x in enumerate(RECORDS)]
    side = Side(write(tmp_path / "by_id.jsonl", rows[::-1]))
    (row,) = judging.judge(settings(data, prompts=pairs, a=(side,), b=Side(data["bad"]))).rows
    assert row.win_rate.value == 1


@pytest.mark.parametrize(
    ("rows", "says"),
    [
        (
            [{"prompt": "p", "text": "x"}],
            r"one\.jsonl:1: a file of responses has a text",
        ),
        ([{"response": "x"}], r"one\.jsonl:1: a file of responses has"),
    ],
)
def test_a_file_of_something_else_is_named(data, tmp_path, rows, says):
    with pytest.raises(DataError, match=says):
        judging.judge(settings(data, a=(Side(write(tmp_path / "one.jsonl", rows)),)))


def test_prompts_without_references_cannot_be_compared_with_them(data, tmp_path):
    prompts = write(tmp_path / "plain.jsonl", [{"prompt": x["prompt"]} for x in RECORDS])
    with pytest.raises(DataError, match=r"plain\.jsonl:1: the prompt has no reference response"):
        judging.judge(settings(data, prompts=prompts))


class Costly:
    """Prefers the first response; every question has a price of one."""

    name, fingerprint, is_symmetric, counted_by = "costly", "costly", False, "hand"

    def __init__(self):
        self.asked, self.prices = 0, Prices(1e6, 0.0)

    def tokens(self, question):
        return Tokens(1, 0)

    def replies(self, questions):
        for index, _ in enumerate(questions):
            self.asked += 1
            yield index, Reply(Choice.FIRST, tokens_in=1)


@pytest.fixture
def costly(monkeypatch):
    judge = Costly()
    kind = JudgeKind("costly", lambda argument, options: judge, needs_argument=False)
    monkeypatch.setitem(open_judge.KINDS, "costly", kind)
    return judge


def test_a_second_call_asks_nothing(data, costly):
    first = judging.judge(settings(data, judge="costly", repeat=0.2))
    # "good" is the reference itself, of which nobody is asked.
    asked = costly.asked
    assert 2 * len(RECORDS) < asked < 3 * len(RECORDS)
    again = judging.judge(settings(data, judge="costly", repeat=0.2))
    assert costly.asked == asked
    assert again.rows == first.rows
    assert first.rows[1].win_rate.position_bias.value == 1


def test_a_dry_run_asks_nothing_and_counts_what_a_real_one_asks(data, costly):
    of_asking = judging.estimate_cost(settings(data, judge="costly"))
    assert costly.asked == 0
    judging.judge(settings(data, judge="costly"))
    assert costly.asked == of_asking.calls
    assert judging.estimate_cost(settings(data, judge="costly")).calls == 0


def test_the_cost_is_not_passed_and_a_higher_limit_goes_on(data, costly):
    with pytest.raises(CostReached):
        judging.judge(settings(data, judge="costly", max_cost=10, repeat=0))
    assert 0 < costly.asked <= 10
    judging.judge(settings(data, judge="costly", max_cost=1000, repeat=0))
    assert costly.asked == 2 * len(RECORDS)


@pytest.fixture(scope="module")
def policy(tmp_path_factory):
    return save_model(tmp_path_factory.mktemp("policy") / "model")


@pytest.fixture
def loads(monkeypatch):
    """The names of policies that are loaded, each read once in this file."""
    names = []

    def load(name):
        names.append(name)
        return known_policy(name)

    monkeypatch.setattr(sides, "load_policy", load)
    return names


known_policy = functools.cache(load_policy)


def sampled(policy, out, **changes):
    """Two temperatures and two n of best-of-n of one policy, against itself."""
    values = {"out": str(out), "prompts": "reviews", "limit": 6, "judge": "exact"}
    values |= {"a": (Side(policy, "it"),), "b": Side(policy, "itself"), "temperatures": (0.0, 1.0)}
    values |= {"samples": 2, "max_new_tokens": 9, "batch_size": 8, "resamples": 100}
    return Settings(**values | changes)


@pytest.mark.long
def test_each_temperature_and_n_of_best_of_n_is_a_row(policy, tmp_path, loads):
    changes = {"best_of": (1, 3), "best_of_reward": "reviews"}
    result = judging.judge(sampled(policy, tmp_path, **changes))
    assert [(row.temperature, row.best_of) for row in result.rows] == [
        (0.0, 1),
        (1.0, 1),
        (0.0, 3),
        (1.0, 3),
    ]
    assert len(loads) == 1  # once for all of them
    rates = {(row.temperature, row.best_of): row.win_rate for row in result.rows}
    assert rates[0.0, 1].counts[Outcome.TIE] == 6  # greedy against greedy
    assert rates[1.0, 1].comparisons == 12
    lines = samples(tmp_path)
    score = exact_reviews()
    alone, best = (
        [x for x in lines if (x["temperature"], x["best_of"]) == (1.0, n)] for n in (1, 3)
    )
    mean = lambda some: score([x["prompt"] for x in some], [x["a"] for x in some]).mean()
    assert mean(best) > mean(alone)
    assert [x["b"] for x in best] == [x["b"] for x in alone]
    assert [x["a"] for x in alone] != [x["b"] for x in alone]  # drawn with another seed


@pytest.mark.slow
def test_a_second_judge_draws_nothing_again(policy, tmp_path, loads, monkeypatch):
    shared = {"responses": str(tmp_path / "responses")}
    judging.judge(sampled(policy, tmp_path / "first", **shared))

    def refused(*arguments, **how):
        raise AssertionError("drawn again")

    monkeypatch.setattr(responses, "generate", refused)
    result = judging.judge(sampled(policy, tmp_path / "second", judge="length", **shared))
    assert result.judge == "length"


def test_a_second_command_scores_nothing_again(policy, tmp_path, loads, monkeypatch):
    changes = {"best_of": (1, 3), "best_of_reward": "reviews"}
    first = judging.judge(sampled(policy, tmp_path, **changes))

    def refused(prompts, texts):
        raise AssertionError("scored again")

    unused = dataclasses.replace(exact_reviews(), function=refused)
    monkeypatch.setattr(sides, "open_reward", lambda spec, mesh: unused)
    assert judging.judge(sampled(policy, tmp_path, **changes)).rows == first.rows


def test_what_another_process_draws_is_left_to_it_and_read_at_the_end(
    policy, tmp_path, loads, monkeypatch
):
    monkeypatch.setattr(locks, "TURN_SECONDS", 0.01)
    expected = judging.judge(sampled(policy, tmp_path / "alone"))
    greedy = sampled(policy, tmp_path / "two", temperatures=(0.0,), b=Side("references"))
    prompts, _ = sides.read_prompts(greedy)
    sides.draw_all(sides.requests_of(greedy.a[0], greedy), prompts, [], greedy, responses.silent)
    (of_other,) = (tmp_path / "two" / "responses").iterdir()
    lines, other = [], contextlib.ExitStack()

    def log(line):
        lines.append(line)
        if "waiting until it has ended" in line:
            other.close()

    other.enter_context(storage.lock(of_other))
    assert judging.judge(sampled(policy, tmp_path / "two"), log).rows == expected.rows
    assert sum("are drawn" in line for line in lines[:3]) == 3  # the other drawings
    assert f"{of_other}: in use by process" in lines[3]


def test_one_process_asks_and_the_others_find_the_replies(data, costly, monkeypatch):
    monkeypatch.setattr(locks, "TURN_SECONDS", 0.01)
    how = settings(data, judge="costly", repeat=0.0)
    lines, other = [], contextlib.ExitStack()
    (folder := pathlib.Path(how.out)).mkdir()

    def log(line):
        lines.append(line)
        if "waiting until it has ended" in line:
            assert costly.asked == 0
            other.close()
            judging.judge(how)

    other.enter_context(storage.lock(folder))
    judging.judge(how, log)
    assert f"{folder}: in use by process" in lines[0]
    assert costly.asked == 2 * len(RECORDS)


def test_a_dry_run_draws_nothing(policy, tmp_path, loads, monkeypatch):
    monkeypatch.setattr(responses, "generate", None)
    # In one order: nothing of it is drawn, so that no two responses are taken to be equal.
    expected = 6 * (1 + 2)
    assert judging.estimate_cost(sampled(policy, tmp_path, repeat=0.0)).calls == expected


def test_a_policy_reads_the_field_of_the_prompt_that_its_side_names(policy, tmp_path, loads):
    rows = [{"prompt": x["prompt"], "reference": " fine", "plain": "this is"} for x in RECORDS[:3]]
    prompts = write(tmp_path / "prompts.jsonl", rows)
    side = Side(policy, "plain", prompt_field="plain", temperatures=(0.0,))
    changes = {"prompts": prompts, "limit": 0, "a": (side,), "b": Side("references")}
    judging.judge(sampled(policy, tmp_path / "out", **changes))
    assert len({line["a"] for line in samples(tmp_path / "out")}) == 1  # all read the same text
    missing = dataclasses.replace(side, prompt_field="other")
    how = sampled(policy, tmp_path / "out", **changes | {"a": (missing,)})
    with pytest.raises(DataError, match=r"prompts\.jsonl:1: has no text in the field 'other'"):
        judging.judge(how)


def test_few_shot_prompting_shows_examples_that_are_not_judged(policy, tmp_path):
    (tmp_path / "few.txt").write_text("{prompt}")
    side = Side(policy, "few", template=str(tmp_path / "few.txt"), shots=2)
    prompts = write(tmp_path / "pairs.jsonl", RECORDS)
    how = sampled(policy, tmp_path, prompts=prompts, limit=5, a=(side,))
    read, examples = sides.read_prompts(how)
    texts = sides.texts_to_read(side, read, examples)
    shown = [x["prompt"] + x["chosen"] for x in RECORDS[5:7]]
    assert texts == ["\n\n".join([*shown, prompt.text]) for prompt in read]
    with pytest.raises(DataError, match="2 examples with a response are needed"):
        sides.read_prompts(sampled(policy, tmp_path, prompts=prompts, limit=29, a=(side,)))


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"a": ()}, "a: name at least one"),
        ({"a": ("runs/x", "other/x")}, "two sides are called x"),
        ({"temperatures": (-1.0,)}, "temperature = -1.0"),
        ({"temperatures": (1.0, 1.0)}, "each once"),
        ({"best_of": (4,)}, "best_of = 4: name the reward"),
        ({"samples": 0}, "samples = 0: must be 1 or more"),
        ({"prompts": "reviews", "limit": 0}, "never end"),
        ({"repeat": 2}, "at most 1"),
        ({"max_cost": 0}, "must be positive"),
        ({"a": ({"policy": "x", "shots": 1},)}, "shots = 1 needs a template"),
        ({"a": ({"policy": "x", "temperature": 1},)}, "a side: no setting is called temperature"),
    ],
)
def test_a_value_that_cannot_be_is_named(data, changes, says):
    with pytest.raises(ConfigError, match=re.escape(says)):
        settings(data, **changes)


def test_settings_go_through_json_and_unknown_ones_are_named(data):
    side = Side(data["good"], "good", temperatures=(0.5,), best_of=(1, 4))
    first = settings(data, a=(side,), best_of_reward="reviews", endpoint={"concurrency": 2})
    values = json.loads(json.dumps(dataclasses.asdict(first)))
    assert settings_from_json(values) == first
    with pytest.raises(ConfigError, match="no setting is called tempertures"):
        settings_from_json(values | {"tempertures": 1})
    with pytest.raises(ConfigError, match="the settings: judge is missing"):
        settings_from_json({name: x for name, x in values.items() if name != "judge"})


@pytest.mark.long
def test_the_job_writes_the_report(data, tmp_path):
    path = tmp_path / "settings.json"
    path.write_text(json.dumps(dataclasses.asdict(settings(data))))
    command = [sys.executable, "-m", "dpojax.runs.judging", f"--settings={path}"]
    subprocess.run(command, check=True, cwd=ROOT, env=environment(), capture_output=True)
    assert (tmp_path / "out" / judging.REPORT).exists()


def test_questions_go_out_as_a_batch_file_and_the_replies_come_back_without_a_server(
    data, tmp_path
):
    nobody = "openai:some-model@http://127.0.0.1:9/v1"
    how = settings(data, judge=nobody, repeat=0.0)
    (path,) = judging.export_questions(how, str(tmp_path / "batch"))
    requests = [json.loads(line) for line in path.read_text().splitlines()]
    assert len(requests) == 2 * len(RECORDS)  # "bad" in both orders; "good" is the reference
    body = {"choices": [{"message": {"content": "Preferred: A"}}]}
    replies = [
        {"custom_id": x["custom_id"], "response": {"status_code": 200, "body": body}}
        for x in requests
    ]
    answers = write(tmp_path / "replies.jsonl", replies)
    imported = judging.import_replies(how, [answers])
    assert (imported.added, imported.missing) == (len(requests), 0)
    result = judging.judge(how)  # asks nobody
    assert result.rows[1].win_rate.counts[Outcome.INCONSISTENT] == len(RECORDS)


def test_a_judge_that_cannot_be_opened_is_named_before_anything_is_drawn(
    policy, tmp_path, monkeypatch
):
    monkeypatch.setattr(responses, "generate", None)
    for spec in ("oracle", f"reward_model:{tmp_path / 'nowhere'}", f"local:{tmp_path}"):
        with pytest.raises(JudgeError, match=re.escape(spec)):
            judging.judge(sampled(policy, tmp_path, judge=spec))
    with pytest.raises(JudgeError, match="poem"):
        judging.judge(sampled(policy, tmp_path, judge=f"local:{policy}", template="poem"))


def test_the_report_names_the_prompt_of_a_judge_that_reads_one(policy, data, tmp_path):
    how = settings(data, judge=f"local:{policy}", a=(Side(data["bad"]),), template="helpful")
    assert judging._template_of(how).startswith("helpful ")
    assert judging._template_of(settings(data)) == ""
