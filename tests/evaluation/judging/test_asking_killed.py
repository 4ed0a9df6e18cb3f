"""A process that is killed, stopped, or not alone: what was paid for is not paid for again."""

import contextlib
import signal
import subprocess
import sys
import threading
import time

import pytest

from dpojax.evaluation.judging.asking import judge_comparisons
from dpojax.evaluation.judging.cache import VerdictCache
from dpojax.evaluation.judging.verdicts import Outcome
from tests.evaluation.judging.chat_server import TEMPLATE, ChatServer, seeded_faults

CONCURRENCY = 4
COUNT = 60
ROUND = 4
# The comparisons and the judge of a process of its own, and of the test.
ASKS = f"""
import random
import sys
from dpojax.evaluation.judging import asking
from dpojax.evaluation.judging.cache import VerdictCache
from dpojax.evaluation.judging.endpoint_options import EndpointOptions
from dpojax.evaluation.judging.openai_judge import OpenAIJudge
from dpojax.evaluation.judging.templates import Template
from dpojax.evaluation.judging.verdicts import Comparison

def comparisons():
    return [Comparison(str(i), f"prompt {{i}}", "longer", "short") for i in range({COUNT})]

def judge(url):
    options = EndpointOptions(concurrency={CONCURRENCY}, backoff=0.002, max_retries=30)
    return OpenAIJudge("tiny", url, Template("test", {TEMPLATE.text!r}), options)

if __name__ == "__main__":
    url, folder, seed = sys.argv[1:]
    random.seed(seed)
    asking.ROUND = {ROUND}
    with VerdictCache(folder) as cache:
        judged = asking.judge_comparisons(judge(url), comparisons(), cache=cache, repeat=0)
    print(judged.asked)
"""
HERE = {"__name__": "here"}
exec(ASKS, HERE)


@contextlib.contextmanager
def running(server, folder, seed=0):
    command = [sys.executable, "-c", ASKS, server.url, str(folder), str(seed)]
    pipe = subprocess.PIPE
    with subprocess.Popen(command, stdout=pipe, stderr=pipe, text=True) as process:
        try:
            yield process
        finally:
            process.kill()


def wait_for_answers(server, count):
    deadline = time.monotonic() + 30
    while server.answers.total() < count:
        assert time.monotonic() < deadline, "the judge asks nothing"
        time.sleep(0.002)


def finish(server, folder):
    with VerdictCache(folder) as cache:
        return judge_comparisons(
            HERE["judge"](server.url), HERE["comparisons"](), cache=cache, repeat=0
        )


@pytest.mark.parametrize("answers", [1, 40, 90])
def test_after_a_kill_only_questions_that_were_under_way_are_answered_again(tmp_path, answers):
    with ChatServer(seeded_faults(answers, 0.2), delay=0.003) as server:
        with running(server, tmp_path) as process:
            wait_for_answers(server, answers)
            process.send_signal(signal.SIGKILL)
            process.communicate()
        judged = finish(server, tmp_path)
    assert [x.outcome for x in judged.judgements] == [Outcome.WIN] * COUNT
    assert len(server.answers) == 2 * COUNT
    twice = [text for text, count in server.answers.items() if count > 1]
    assert len(twice) <= CONCURRENCY
    assert judged.cached >= answers - CONCURRENCY


def test_ctrl_c_ends_quickly_though_answers_are_slow_and_keeps_what_came(tmp_path):
    gate = threading.Event()

    def slow_after_twenty(text, attempt):
        if server.requests.total() > 20:
            gate.wait(20)

    with ChatServer(slow_after_twenty) as server, running(server, tmp_path) as process:
        wait_for_answers(server, 16)  # some of the first twenty may see that others came
        time.sleep(0.2)
        answered = server.answers.total()
        began = time.monotonic()
        process.send_signal(signal.SIGINT)
        errors = process.communicate(timeout=20)[1]
        assert time.monotonic() - began < 10
        gate.set()
    assert "KeyboardInterrupt" in errors
    assert len(VerdictCache(tmp_path)) == answered


def test_two_processes_at_once_share_the_work(tmp_path):
    """They ask in different places, and each looks at times what the other has got."""
    both = threading.Event()

    def wait_for_both(text, attempt):
        if server.requests.total() > CONCURRENCY:
            both.set()
        both.wait(20)

    with ChatServer(wait_for_both, delay=0.005) as server:
        with running(server, tmp_path, 0) as first, running(server, tmp_path, 1) as second:
            asked = [int(process.communicate()[0]) for process in (first, second)]
        answered = server.answers.total()
        judged = finish(server, tmp_path)
        assert server.answers.total() == answered == sum(asked)  # nothing was left to ask
    assert (judged.asked, judged.cached) == (0, 2 * COUNT)
    assert answered <= 1.5 * 2 * COUNT
    assert min(asked) > ROUND
