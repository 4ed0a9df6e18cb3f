"""Laws of `storage.turn`: of several processes that need a file, one makes it."""

import errno
import fcntl
import pathlib
import subprocess
import sys
import threading
import time

import pytest

from dpojax import storage
from dpojax.storage import locks

ROOT = pathlib.Path(__file__).resolve().parents[2]
HOLD = """
import sys, time
from dpojax import storage
with storage.turn(sys.argv[1]):
    print("held", flush=True)
    time.sleep(100)
"""


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    for name, seconds in (("TURN", 0.02), ("REFRESH", 0.1), ("STALE", 4.0), ("POLL", 0.1)):
        monkeypatch.setattr(locks, f"{name}_SECONDS", seconds)


def test_of_those_that_need_a_file_at_once_one_makes_it_and_all_find_it(folder):
    path, makers, found = folder / "tokens.arrow", [], []

    def need(name):
        with storage.turn(path):
            if not path.exists():
                makers.append(name)
                time.sleep(0.1)
                storage.write_text(path, name)
            found.append(storage.read_text(path))

    threads = [threading.Thread(target=need, args=(str(i),)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(makers) == 1
    assert found == 4 * makers
    assert [path.name for path in folder.iterdir()] == ["tokens.arrow"]  # no lock is left


def test_turns_for_other_files_do_not_wait(folder):
    with storage.turn(folder / "a"), storage.turn(folder / "b"):
        pass


def test_whoever_waits_says_for_whom(folder, caplog):
    path = folder / "a"

    def wait():
        with storage.turn(path):
            pass

    waited = threading.Thread(target=wait)
    with storage.turn(path):
        waited.start()
        until = time.monotonic() + 30
        while "waiting" not in caplog.text and time.monotonic() < until:
            time.sleep(0.02)
    waited.join()
    assert caplog.text.count("in use by process") == 1


def test_the_turn_of_a_process_that_was_killed_goes_to_the_next(tmp_path):
    path = tmp_path / "a"
    command = [sys.executable, "-c", HOLD, str(path)]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True) as other:
        assert other.stdout.readline() == "held\n"
        other.kill()
    assert [file.name for file in tmp_path.iterdir()] == [".a.lock"]
    with storage.turn(path):
        pass
    assert list(tmp_path.iterdir()) == []


def test_a_folder_without_locks_keeps_nobody_waiting(tmp_path, monkeypatch):
    def no_locks(*_):
        raise OSError(errno.ENOLCK, "no locks available")

    monkeypatch.setattr(fcntl, "flock", no_locks)
    with storage.turn(tmp_path / "a"), storage.turn(tmp_path / "a"):
        pass


def test_an_error_of_the_maker_is_its_own_and_ends_its_turn(tmp_path):
    for _ in range(2):
        with pytest.raises(OSError, match="no space left"), storage.turn(tmp_path / "a"):
            raise OSError("no space left")
