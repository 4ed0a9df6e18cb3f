"""Verdicts that were paid for stay, whatever happens to the process that got them."""

import json
import math
import signal
import subprocess
import sys

import pytest

from dpojax.evaluation.judging.cache import VerdictCache, cache_key
from dpojax.evaluation.judging.verdicts import Choice, Question, Reply
from dpojax.storage import StorageError
from tests.gcs import bucket, gcs_emulator  # noqa: F401 (fixtures)

REPLIES = {
    "plain": Reply(Choice.FIRST),
    "all fields": Reply(Choice.SECOND, 0.25, "Preferred: B", 100, 7),
    "tie": Reply(Choice.TIE, 0.5),
    "unparsed": Reply(Choice.UNPARSED, text="two\nlines\u2028\u00e9 \U0001f600 \ud800 \x00"),
}
WRITES = """
import sys
from dpojax.evaluation.judging.cache import VerdictCache
from dpojax.evaluation.judging.verdicts import Choice, Reply
folder, name, count = sys.argv[1:]
with VerdictCache(folder) as cache:
    for number in range(int(count)):
        cache.put(f"{name} {number}", Reply(Choice.FIRST, text="x" * number))
        cache.put(f"shared {number}", Reply(Choice.FIRST, text=name))
        print(number, flush=True)
"""


def start_writer(folder, name, count):
    command = [sys.executable, "-c", WRITES, str(folder), name, str(count)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, text=True)


def filled(folder):
    with VerdictCache(folder) as cache:
        for key, reply in REPLIES.items():
            cache.put(key, reply, "a judge")
    [path] = folder.iterdir()
    return path


def same(first, second):
    return repr(first) == repr(second)  # nan equals nan


def test_replies_are_read_as_they_were_written(tmp_path):
    filled(tmp_path)
    with VerdictCache(tmp_path) as cache:
        assert len(cache) == len(REPLIES)
        for key, reply in REPLIES.items():
            assert key in cache
            assert same(cache.get(key), reply)
        assert cache.get("another") is None


def test_a_line_is_json_that_people_can_read(tmp_path):
    lines = [json.loads(line) for line in filled(tmp_path).read_text().splitlines()]
    assert lines[1] == {
        "key": "all fields",
        "judge": "a judge",
        "choice": "second",
        "preference": 0.25,
        "text": "Preferred: B",
        "tokens_in": 100,
        "tokens_out": 7,
    }
    assert lines[0]["preference"] is None


def test_a_folder_is_made_with_the_first_reply_and_not_before(tmp_path):
    folder = tmp_path / "new" / "cache"
    with VerdictCache(folder):
        pass
    assert not folder.exists()
    assert filled(folder).suffix == ".jsonl"


def test_a_file_that_ends_at_any_byte_keeps_its_whole_lines_and_tells_of_the_rest(tmp_path, caplog):
    data = filled(tmp_path / "whole").read_bytes()
    path = tmp_path / "torn" / "a.jsonl"
    path.parent.mkdir()
    for size in range(len(data) + 1):
        path.write_bytes(data[:size])
        caplog.clear()
        cache = VerdictCache(path.parent)
        whole = data[:size].count(b"\n")
        assert len(cache) == whole
        assert [key in cache for key in REPLIES] == [index < whole for index in range(len(REPLIES))]
        torn = size - (data[:size].rfind(b"\n") + 1)
        assert (f"last {torn} bytes" in caplog.text) == (torn > 0)
    with VerdictCache(path.parent) as cache:
        cache.put("new", Reply(Choice.TIE))
    assert len(VerdictCache(path.parent)) == len(REPLIES) + 1


@pytest.mark.parametrize(
    "damage",
    [b"no JSON", b"[]", b'{"key": "x"}', b"\xff\xfe", b'{"key": "x", "choice": "third"}', b"null"],
)
def test_a_damaged_line_is_named_and_the_others_are_read(tmp_path, caplog, damage):
    path = filled(tmp_path)
    lines = path.read_bytes().splitlines()
    path.write_bytes(b"\n".join([lines[0], damage, *lines[2:]]) + b"\n")
    assert len(VerdictCache(tmp_path)) == len(REPLIES) - 1
    assert f"{path}:2 is damaged" in caplog.text


def test_other_files_in_the_folder_are_left_alone(tmp_path):
    (tmp_path / "README.md").write_text("hello")
    (tmp_path / "folder.jsonl").mkdir()
    assert len(VerdictCache(tmp_path)) == 0


def test_the_first_reply_to_a_question_stays(tmp_path):
    with VerdictCache(tmp_path) as cache:
        cache.put("key", Reply(Choice.FIRST))
        cache.put("key", Reply(Choice.SECOND))
        assert cache.get("key").choice is Choice.FIRST
    assert VerdictCache(tmp_path).get("key").choice is Choice.FIRST


def test_a_reply_is_seen_by_others_at_once(tmp_path):
    with VerdictCache(tmp_path) as ours, VerdictCache(tmp_path) as theirs:
        for number in range(3):
            ours.put(str(number), Reply(Choice.FIRST))
            theirs.refresh()
            assert len(theirs) == number + 1


def test_two_processes_at_once_lose_nothing(tmp_path):
    writers = [start_writer(tmp_path, name, 300) for name in ("a", "b")]
    assert [writer.communicate()[0].count("\n") for writer in writers] == [300, 300]
    cache = VerdictCache(tmp_path)
    assert len(cache) == 900
    for name in ("a", "b"):
        for number in range(300):
            assert len(cache.get(f"{name} {number}").text) == number
    assert {cache.get(f"shared {number}").text for number in range(300)} <= {"a", "b"}


def test_a_process_that_is_killed_loses_no_reply(tmp_path):
    writer = start_writer(tmp_path, "a", 10**6)
    lines = [writer.stdout.readline() for _ in range(50)]
    writer.send_signal(signal.SIGKILL)
    rest = writer.communicate()[0]
    told = len(lines) + rest.count("\n")
    cache = VerdictCache(tmp_path)
    assert [f"a {number}" in cache for number in range(told)] == [True] * told
    with cache:
        cache.put("later", Reply(Choice.TIE))
    assert len(VerdictCache(tmp_path)) == len(cache)


def test_a_key_depends_on_each_text_on_the_judge_and_on_the_repetition():
    question = Question("p", "a", "b", "r")
    keys = {
        cache_key("judge", question),
        cache_key("judge", question, 1),
        cache_key("other", question),
        cache_key("judge", question.mirrored),
        *(cache_key("judge", question._replace(**{name: "x"})) for name in Question._fields),
        cache_key("judge", Question("pa", "", "b", "r")),  # texts do not run into each other
    }
    assert len(keys) == 9
    assert cache_key("judge", Question("\ud800", "a", "b"))  # half of a pair of UTF-16


def test_a_cache_without_a_folder_is_in_memory(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with VerdictCache() as cache:
        cache.put("key", Reply(Choice.FIRST))
        cache.flush()
        cache.refresh()
        assert math.isnan(cache.get("key").preference)
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_cannot_be_named_is_refused():
    with pytest.raises(StorageError, match="the verdict cache"):
        VerdictCache("ftp://somewhere")


def test_a_cache_on_a_bucket_is_shared_and_its_files_stay_small(bucket, monkeypatch):  # noqa: F811
    monkeypatch.setattr("dpojax.evaluation.judging.cache.BUCKET_LINES", 3)
    folder = f"{bucket}/verdicts"
    with VerdictCache(folder) as cache:
        for number in range(8):
            cache.put(str(number), REPLIES["all fields"])
        cache.flush()
        other = VerdictCache(folder)
        assert len(other) == 8
        assert other.get("7") == REPLIES["all fields"]
        cache.put("8", REPLIES["plain"])
    other.refresh()
    assert "8" in other
    assert len(list(other.folder.iterdir())) == 3
