"""Laws of locks, on a disk and on a bucket: one holder, and none that is dead."""

import contextlib
import json
import logging
import os
import pathlib
import signal
import subprocess
import sys
import threading
import time

import pytest

from dpojax import storage
from dpojax.storage import locks

from .folders import names

ROOT = pathlib.Path(__file__).resolve().parents[2]


HOLD = """
import sys, time
from dpojax.storage import Locked, lock, locks
locks.REFRESH_SECONDS, locks.STALE_SECONDS, locks.POLL_SECONDS = 0.1, 1e9, 0.1
try:
    with lock(sys.argv[1]):
        print("held", flush=True)
        sys.stdin.readline()
except Locked as error:
    print(error, flush=True)
"""


@pytest.fixture
def quick_locks(monkeypatch):
    """Times for tests; they are seconds."""
    for name, seconds in (("REFRESH", 0.1), ("STALE", 4.0), ("POLL", 0.1)):
        monkeypatch.setattr(locks, f"{name}_SECONDS", seconds)


@contextlib.contextmanager
def other_process(folder):
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    command = [sys.executable, "-c", HOLD, str(folder)]
    process = subprocess.Popen(command, cwd=ROOT, text=True, **pipes)
    try:
        yield process
    finally:
        process.kill()
        process.communicate()


def killed_holder(folder):
    """The id of a process that was killed while it held the lock of a folder."""
    with other_process(folder) as other:
        assert other.stdout.readline() == "held\n"
    return other.pid


@pytest.mark.slow
def test_one_process_holds_a_lock_and_the_other_is_told_who(folder, quick_locks):
    with other_process(folder) as other:
        assert other.stdout.readline() == "held\n"
        with (
            pytest.raises(storage.Locked, match=rf"in use by process {other.pid} on \w+"),
            storage.lock(folder),
        ):
            pass
        other.communicate("end\n")
    with storage.lock(folder), other_process(folder) as other:
        assert f"in use by process {os.getpid()} on" in other.stdout.readline()
    with storage.lock(folder):  # it was given back
        pass


def test_a_lock_in_turn_waits_for_its_holder_and_says_for_whom(folder, quick_locks, monkeypatch):
    monkeypatch.setattr(locks, "TURN_SECONDS", 0.05)
    told = []

    def tell_and_end_the_other(line):
        told.append(line)
        other.stdin.write("end\n")
        other.stdin.flush()

    with other_process(folder) as other:
        assert other.stdout.readline() == "held\n"
        with storage.lock_in_turn(folder, tell_and_end_the_other):
            assert other.wait(20) == 0
            with pytest.raises(storage.Locked), storage.lock(folder):
                pass
    (line,) = told
    assert f"in use by process {other.pid} on" in line
    with storage.lock(folder):  # it was given back
        pass


def test_a_local_lock_ends_with_its_process(tmp_path):
    killed_holder(tmp_path)
    with storage.lock(tmp_path):
        pass


@pytest.mark.slow
def test_a_buckets_lock_is_waited_for_until_its_holder_is_stale(
    bucket,
    quick_locks,
    caplog,
):
    folder = storage.as_path(bucket)
    pid, began = killed_holder(folder), time.monotonic()
    with storage.lock(folder):
        assert time.monotonic() - began > 1.0
        with pytest.raises(storage.Locked), storage.lock(folder):
            pass
    assert names(folder) == []
    ours = [record for record in caplog.records if record.name == locks.logger.name]
    warnings = [record.message for record in ours if str(pid) in record.message]
    assert {record.levelno for record in ours} == {logging.WARNING}
    assert f"in use by process {pid} on" in warnings[0]
    assert "s to see whether it is alive" in warnings[0]
    assert "is taken for dead; taking over its lock" in warnings[1]
    assert len(warnings) == 2


def test_a_buckets_lock_that_was_stale_before_is_taken_over_at_once(
    bucket,
    quick_locks,
    monkeypatch,
):
    killed_holder(bucket)
    monkeypatch.setattr(locks, "STALE_SECONDS", 0.5)
    time.sleep(0.6)
    monkeypatch.setattr(time, "sleep", None)
    with storage.lock(bucket):
        pass


@pytest.mark.slow
def test_of_two_that_wait_for_a_dead_holder_one_takes_over_and_the_other_is_told(
    bucket,
    quick_locks,
):
    killed_holder(bucket)
    holders, complaints, both_tried = [], [], threading.Barrier(2)

    def hold(name):
        try:
            with storage.lock(bucket):
                holders.append(name)
                both_tried.wait(20)
        except storage.Locked as error:
            complaints.append(str(error))
            both_tried.wait(20)

    threads = [threading.Thread(target=hold, args=(name,)) for name in ("first", "second")]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(holders) == 1
    (complaint,) = complaints
    assert f"in use by process {os.getpid()} on" in complaint


def test_a_lock_that_is_given_back_goes_to_who_waits_for_it(
    bucket,
    quick_locks,
    monkeypatch,
):
    monkeypatch.setattr(locks, "REFRESH_SECONDS", 1e9)
    monkeypatch.setattr(locks, "STALE_SECONDS", 1e9)
    held, end = threading.Event(), threading.Event()

    def hold():
        with storage.lock(bucket):
            held.set()
            end.wait(20)

    holder = threading.Thread(target=hold)
    holder.start()
    held.wait(20)
    threading.Timer(0.5, end.set).start()
    with storage.lock(bucket):
        assert end.is_set()
    holder.join()


@pytest.mark.slow
def test_a_living_holder_keeps_its_lock_fresh(bucket, quick_locks):
    with other_process(bucket) as other:
        assert other.stdout.readline() == "held\n"
        time.sleep(4.5)
        with pytest.raises(storage.Locked), storage.lock(bucket):
            pass


def test_no_two_writes_of_a_holder_have_the_same_bytes(bucket, quick_locks):
    """The version of an object on S3 is a hash of its bytes."""
    path = storage.as_path(bucket) / ".lock"
    with storage.lock(bucket):
        first = path.read_bytes()
        time.sleep(0.5)
        assert path.read_bytes() != first


def test_a_refresh_whose_reply_is_lost_keeps_the_lock(
    bucket,
    quick_locks,
    monkeypatch,
):
    write, left = locks._write_if, ["reply lost", "no network"]

    def failing(*arguments):
        if not left:
            return write(*arguments)
        if left.pop() == "reply lost":
            write(*arguments)
        raise OSError("no network")

    with storage.lock(bucket):
        monkeypatch.setattr(locks, "_write_if", failing)
        time.sleep(1)
        assert storage.lost_locks() == left == []
    assert names(storage.as_path(bucket)) == []


THEIRS = json.dumps({"holder": "another", "id": ""})


@pytest.mark.parametrize("body_error", [None, KeyError("in the body")])
def test_a_holder_that_lost_its_lock_gets_a_sigterm_and_leaves_the_new_one(
    bucket,
    quick_locks,
    body_error,
):
    path, stopped = storage.as_path(bucket) / ".lock", threading.Event()

    def lose():
        with storage.lock(bucket):
            storage.write_text(path, THEIRS)
            assert stopped.wait(20)
            assert storage.lost_locks() == [bucket]
            if body_error:
                raise body_error

    before = signal.signal(signal.SIGTERM, lambda *_: stopped.set())
    try:
        with pytest.raises(storage.Locked, match="another process took over") as error:
            lose()
    finally:
        signal.signal(signal.SIGTERM, before)
    assert error.value.__context__ is body_error
    assert storage.lost_locks() == []
    assert path.read_text() == THEIRS


def test_a_process_that_handles_no_sigterm_ends_with_its_lock(bucket):
    with other_process(bucket) as other:
        assert other.stdout.readline() == "held\n"
        storage.write_text(storage.as_path(bucket) / ".lock", THEIRS)
        assert other.wait(20) == -signal.SIGTERM
