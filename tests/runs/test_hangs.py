"""Whatever a command does, it is ended where it stops getting on; slow disks are no hang."""

import contextlib
import io
import threading

import pytest

from dpojax import stopping, storage, watchdog
from dpojax.config.resolved import as_json
from dpojax.data import text_files
from dpojax.evaluation.judging import endpoint, pacing
from dpojax.evaluation.judging.asking import judge_comparisons
from dpojax.evaluation.judging.endpoint_options import EndpointOptions
from dpojax.evaluation.judging.openai_judge import OpenAIJudge
from dpojax.evaluation.judging.verdicts import Choice, Comparison, Reply
from dpojax.runs import judging, preferences
from dpojax.runs.export import export
from dpojax.runs.preferences import Settings, generate_preferences
from dpojax.runs.run import run
from dpojax.stages import data as stage_data
from dpojax.stages import wins
from dpojax.stages.trained_stage import LanguageStage
from tests.evaluation.judging.chat_server import TEMPLATE, ChatServer

MINUTES = 0.01  # 0.6 s
BLOCKS = [b'{"text": "a"}\n'] * 8


class EndedByWatchdog(Exception):
    """Stands for the end of the process."""


@pytest.fixture
def hang(monkeypatch):
    """Makes something hang until the watchdog ends the process while it does `doing`."""
    texts, changed = [], threading.Condition()

    def end_now(status, text, **_):
        with changed:
            texts.append(text)
            changed.notify_all()

    def hanging(owner, name, doing):
        def stall(*_, **__):
            with changed:
                assert changed.wait_for(lambda: texts and f"while: {doing}" in texts[-1], 20)
            raise EndedByWatchdog

        monkeypatch.setattr(owner, name, stall)

    monkeypatch.setattr(stopping, "end_now", end_now)
    return hanging


def test_a_run_whose_data_never_come_is_ended(hang, tiny, tmp_path):
    hang(stage_data, "load", "data are read")
    with pytest.raises(EndedByWatchdog):
        run(tiny(hang_minutes=MINUTES), tmp_path)


def test_an_export_that_never_ends_is_ended(hang, tiny, tmp_path):
    storage.write_json(tmp_path / "run" / "config.json", as_json(tiny(hang_minutes=MINUTES)))
    hang(LanguageStage, "export", "")
    with pytest.raises(EndedByWatchdog):
        export(tmp_path / "run", tmp_path / "out")


def test_preferences_that_nobody_draws_are_ended(hang, tmp_path):
    hang(preferences, "load_policy", "")
    settings = dict(policy="p", prompts="reviews", reward="reviews", limit=1)
    with pytest.raises(EndedByWatchdog):
        generate_preferences(Settings(**settings, out=str(tmp_path), hang_minutes=MINUTES))


@pytest.mark.parametrize("step", ["make_contests", "open_settings_judge", "_ask"])
def test_judging_that_never_ends_is_ended(step, hang, tmp_path):
    pairs = tmp_path / "pairs.jsonl"
    pairs.write_text('{"prompt": "p", "chosen": "c", "rejected": "r", "response": "r"}\n')
    hang(judging, step, "")
    settings = dict(judge="length", prompts=str(pairs), a=(str(pairs),), hang_minutes=MINUTES)
    with pytest.raises(EndedByWatchdog):
        judging.judge(judging.Settings(**settings, out=str(tmp_path)))


class SlowDisk(io.BytesIO):
    """Gives a block after a while."""

    def read1(self, size=-1):
        threading.Event().wait(0.2)
        return super().read1(len(BLOCKS[0]))


@pytest.mark.parametrize("beats", [True, False])
def test_a_slow_disk_is_no_hang_since_each_block_is_progress(beats, monkeypatch, tmp_path):
    ended = []
    monkeypatch.setattr(stopping, "end_now", lambda status, text, **_: ended.append(text))
    monkeypatch.setitem(text_files.OPENERS, ".slow", lambda path: SlowDisk(b"".join(BLOCKS)))
    if not beats:
        monkeypatch.setattr(text_files, "beat", lambda doing: None)
    file = storage.as_path(tmp_path / "texts.slow")
    file.touch()
    with watchdog.watching(MINUTES):
        assert len(list(text_files.lines(file))) == len(BLOCKS)  # takes 1.8 s
    assert bool(ended) != beats


class SlowJudge:
    """Replies to a question after a while."""

    name = fingerprint = "slow"
    is_symmetric = False

    def replies(self, questions):
        for index in range(len(questions)):
            threading.Event().wait(0.2)
            yield index, Reply(Choice.FIRST)


def test_a_judge_that_is_slow_is_no_hang_since_each_reply_is_progress(monkeypatch, tmp_path):
    ended = []
    monkeypatch.setattr(stopping, "end_now", lambda status, text, **_: ended.append(text))
    comparisons = [Comparison(f"{n}", f"prompt {n}", "a", "b") for n in range(4)]
    with watchdog.watching(MINUTES):
        judgements = wins._ask(SlowJudge(), comparisons, storage.as_path(tmp_path))  # 1.6 s
    assert len(judgements) == 4
    assert not ended


@pytest.mark.parametrize("has_time", [True, False])
def test_a_server_has_as_long_for_an_answer_as_its_timeout_says(has_time, monkeypatch):
    ended = []
    monkeypatch.setattr(stopping, "end_now", lambda status, text, **_: ended.append(text))
    if not has_time:
        monkeypatch.setattr(endpoint, "taking_up_to", contextlib.nullcontext)
    with ChatServer(delay=1.2) as server:
        judge = OpenAIJudge("tiny", server.url, TEMPLATE, EndpointOptions(timeout=20))
        with watchdog.watching(MINUTES):
            judge_comparisons(judge, [Comparison("1", "prompt", "longer", "short")], repeat=0)
    assert bool(ended) != has_time


def test_the_time_until_a_server_may_be_asked_again_is_no_hang(monkeypatch):
    ended = []
    monkeypatch.setattr(stopping, "end_now", lambda status, text, **_: ended.append(text))
    with watchdog.watching(MINUTES):
        pacing.wait(1.2, threading.Event())
    assert not ended
