"""Batch files: what is exported comes back, whatever the order and whatever is wrong with it."""

import json
import random

import pytest

from dpojax.evaluation.judging.asking import judge_comparisons
from dpojax.evaluation.judging.batches import Imported, export_batch, import_batch
from dpojax.evaluation.judging.cache import VerdictCache
from dpojax.evaluation.judging.endpoint_options import EndpointOptions
from dpojax.evaluation.judging.judge import JudgeError
from dpojax.evaluation.judging.openai_judge import OpenAIJudge
from dpojax.evaluation.judging.verdicts import Comparison, Outcome
from tests.evaluation.judging.chat_server import TEMPLATE, ChatServer, longer_wins

NOTHING = Imported(0, 0, 0, 0, 0, 0, 0)


def judge_of(model="tiny", url="http://localhost:1/v1"):
    return OpenAIJudge(model, url, TEMPLATE, EndpointOptions(max_tokens=50))


def comparisons_of(count):
    return [Comparison(f"{i}", f"prompt {i} \u2028", "longer", "short") for i in range(count)]


def requests_in(paths):
    return [json.loads(line) for path in paths for line in path.read_text().splitlines()]


def result(request):
    """What a server's result file says of one request."""
    text = request["body"]["messages"][0]["content"]
    body = {
        "choices": [{"message": {"role": "assistant", "content": longer_wins(text)}}],
        "usage": {"prompt_tokens": 11, "completion_tokens": 3},
    }
    response = {"status_code": 200, "request_id": "r", "body": body}
    return {
        "id": "b",
        "custom_id": request["custom_id"],
        "response": response,
        "error": None,
    }


def write(path, records):
    path.write_text("\n".join(x if isinstance(x, str) else json.dumps(x) for x in records))
    return path


def test_a_request_is_that_which_the_judge_would_send(tmp_path):
    [comparison] = comparisons_of(1)
    with ChatServer() as server:
        judge = judge_of(url=server.url)
        requests = requests_in(export_batch(judge, [comparison], tmp_path, repeat=0))
        judge_comparisons(judge, [comparison], repeat=0)
    assert [x["body"] for x in requests] == sorted(server.bodies, key=str)
    assert {(x["method"], x["url"]) for x in requests} == {("POST", "/v1/chat/completions")}
    assert all(len(x["custom_id"]) <= 64 for x in requests)


def test_results_in_any_order_answer_all_that_was_exported(tmp_path):
    judge, comparisons = judge_of(), comparisons_of(20)
    requests = requests_in(export_batch(judge, comparisons, tmp_path / "batch", repeat=0.3))
    results = [result(x) for x in requests]
    random.Random(0).shuffle(results)
    files = [write(tmp_path / "1.jsonl", results[:9]), write(tmp_path / "2.jsonl", results[9:])]
    with VerdictCache(tmp_path / "cache") as cache:
        imported = import_batch(judge, comparisons, files, cache, repeat=0.3)
        assert imported == NOTHING._replace(added=len(requests))
        again = import_batch(judge, comparisons, files, cache, repeat=0.3)
        assert again == NOTHING._replace(known=len(requests))
    with VerdictCache(tmp_path / "cache") as cache:  # nobody listens at the judge's address
        judged = judge_comparisons(judge, comparisons, cache=cache, repeat=0.3)
    assert [x.outcome for x in judged.judgements] == [Outcome.WIN] * 20
    assert judged.asked == 0
    assert len(requests) == 40 + len(judged.repeats) > 40
    assert judged.judgements[0].a_first.tokens_in == 11


def test_what_is_wrong_with_results_is_counted_and_the_rest_is_used(tmp_path, caplog):
    judge, comparisons = judge_of(), comparisons_of(5)
    requests = requests_in(export_batch(judge, comparisons, tmp_path / "batch", repeat=0))
    good = [result(x) for x in requests]
    refused = {**good[2], "response": {"status_code": 400, "body": {"error": "too long"}}}
    expired = {**good[3], "response": None, "error": {"code": "batch_expired"}}
    no_choices = {**good[4], "response": {"status_code": 200, "body": {"choices": []}}}
    lines = [
        good[0],
        good[1],
        good[0],
        refused,
        expired,
        no_choices,
        {**good[5], "custom_id": "another"},
        {**good[5], "custom_id": 7},
        "",
        "no JSON",
        "[1]",
        "{}",
        json.dumps(good[9])[:-5],
    ]
    with VerdictCache() as cache:
        file = write(tmp_path / "results.jsonl", lines)
        imported = import_batch(judge, comparisons, [file], cache, repeat=0)
        assert imported == Imported(
            added=2, known=0, doubled=1, failed=2, damaged=5, unknown=2, missing=8
        )
        assert "results.jsonl:4: failed: " in caplog.text
        assert "batch_expired" in caplog.text
        rest = requests_in(
            export_batch(judge, comparisons, tmp_path / "rest", cache=cache, repeat=0)
        )
        assert [x["custom_id"] for x in rest] == [x["custom_id"] for x in requests[2:]]
        file = write(tmp_path / "more.jsonl", [refused, good[2], *good[3:]])
        imported = import_batch(judge, comparisons, [file], cache, repeat=0)
        assert imported == NOTHING._replace(added=8, failed=1)


def test_files_keep_to_the_limits(tmp_path):
    judge, comparisons = judge_of(), comparisons_of(20)
    whole = requests_in(export_batch(judge, comparisons, tmp_path / "0", repeat=0))
    by_count = export_batch(judge, comparisons, tmp_path / "1", repeat=0, max_requests=15)
    assert [len(requests_in([path])) for path in by_count] == [15, 15, 10]
    by_size = export_batch(judge, comparisons, tmp_path / "2", repeat=0, max_bytes=1000)
    assert len(by_size) > 10
    assert max(len(path.read_bytes()) for path in by_size) <= 1000
    assert requests_in(by_count) == requests_in(by_size) == whole


def test_where_nothing_is_open_no_file_is_written(tmp_path):
    assert export_batch(judge_of(), [], tmp_path / "batch") == []
    assert not (tmp_path / "batch").exists()


def test_an_earlier_export_is_not_mixed_with_a_new_one(tmp_path):
    export_batch(judge_of(), comparisons_of(1), tmp_path)
    with pytest.raises(JudgeError, match=r"requests-001\.jsonl.*name another folder"):
        export_batch(judge_of(), comparisons_of(1), tmp_path)


def test_results_for_another_judge_are_not_taken(tmp_path):
    comparisons = comparisons_of(2)
    requests = requests_in(export_batch(judge_of(), comparisons, tmp_path / "batch", repeat=0))
    file = write(tmp_path / "results.jsonl", [result(x) for x in requests])
    imported = import_batch(judge_of("other"), comparisons, [file], VerdictCache(), repeat=0)
    assert imported == NOTHING._replace(unknown=4, missing=4)
    assert str(imported).endswith("4 unknown, 4 missing")


def test_a_judge_without_requests_has_no_batch_files(tmp_path):
    class Exact:
        name = "exact"

    with pytest.raises(JudgeError, match="exact: only openai:"):
        export_batch(Exact(), [], tmp_path)
