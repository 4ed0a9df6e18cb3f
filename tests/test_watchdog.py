"""A run that makes no progress ends; one that gets on, however slowly, does not."""

import re
import subprocess
import sys
import threading
import time

import pytest

from dpojax import stopping, watchdog

HANG = """
import threading, time
from dpojax.watchdog import beat, watching
with watching(0.02):
    beat("evaluation")
    threading.Thread(target=time.sleep, args=(100,), name="a thread").start()
    time.sleep(100)
"""


@pytest.fixture
def ended(monkeypatch):
    texts = []
    monkeypatch.setattr(stopping, "end_now", lambda status, text, **_: texts.append(text))
    return texts


def test_a_run_that_hangs_is_ended_with_what_it_did_and_all_stacks():
    began = time.monotonic()
    process = subprocess.run(
        [sys.executable, "-c", HANG], capture_output=True, text=True, timeout=60
    )
    assert time.monotonic() - began < 30
    assert process.returncode == watchdog.HUNG
    assert "No progress for 0.02 minutes (hang_minutes) while: evaluation." in process.stderr
    assert re.search(r'File "<string>", line 7 in <module>', process.stderr)
    assert process.stderr.count("most recent call first") >= 3  # main, a thread, the watchdog


def test_a_run_that_gets_on_slowly_is_left_alone(ended):
    with watchdog.watching(0.01):  # 0.6 s
        for _ in range(10):
            time.sleep(0.1)
            watchdog.beat()
    assert not ended


def test_a_download_takes_as_long_as_it_takes_and_is_watched_afterwards(ended):
    with watchdog.watching(0.005):  # 0.3 s
        with watchdog.unwatched():
            time.sleep(0.8)
        assert not ended
        time.sleep(0.8)
    assert ended


def test_what_ends_by_itself_has_its_time_and_is_watched_afterwards(ended):
    def waits(seconds):
        with watchdog.taking_up_to(seconds):
            time.sleep(0.8)

    with watchdog.watching(0.005):  # 0.3 s
        threads = [threading.Thread(target=waits, args=(seconds,)) for seconds in (2.0, 0.0)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert not ended
        waits(0.0)
    assert ended


def test_nothing_is_watched_after_the_run_or_where_the_limit_is_zero(ended):
    with watchdog.watching(0):
        time.sleep(0.1)
    with watchdog.watching(0.001):
        pass
    time.sleep(0.2)
    assert not ended


def test_time_in_which_the_process_was_suspended_does_not_count(ended, monkeypatch):
    jumps = iter([0.0, *[1000.0 + 0.01 * i for i in range(10_000)]])
    monkeypatch.setattr(watchdog.time, "monotonic", lambda: next(jumps))
    with watchdog.watching(0.01):
        time.sleep(0.2)
    assert not ended
