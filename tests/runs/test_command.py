"""Commands end soon and with the right status, whatever stops them."""

import re
import signal
import subprocess
import sys
import time

import pytest

from dpojax.runs.command import FAILED, exit_status
from dpojax.sampling.sampler import SamplingError
from dpojax.stopping import STOPPED, Preempted

BEGIN = """
import ctypes, sys, threading, time
from dpojax import stopping
from dpojax.runs import command
stopping.RESPONSE = command.LINGER = 0.5
def begin():
    print("begun", flush=True)
"""
SLEEP = "def main():\n    begin()\n    time.sleep(100)\n"
TRAIN = """
def main():
    with stopping.noted():
        begin()
        while not stopping.received():
            time.sleep(0.01)
        print("saving", flush=True)
        time.sleep(100)
"""
# What a finaliser raises, Python drops.
FINALISE = """
class Library:
    def __del__(self):
        begin()
        time.sleep(100)
def main():
    Library()
    time.sleep(100)
"""
# A library in C, while it is imported, makes another error of it.
IMPORT = """
def main():
    try:
        begin()
        time.sleep(100)
    except BaseException:
        raise ImportError("Encountered an error while initializing the extension.") from None
"""
# Nothing of Python runs in the main thread, as while XLA compiles: a mutex that is locked twice.
COMPUTE = """
def main():
    begin()
    mutex = ctypes.create_string_buffer(64)
    ctypes.CDLL(None).pthread_mutex_lock(mutex)
    ctypes.CDLL(None).pthread_mutex_lock(mutex)
"""
FAIL = """
def main():
    begin()
    threading.Thread(target=time.sleep, args=(100,)).start()  # of a library
    raise OSError(28, "No space left on device", "run/checkpoints")
"""


def start(main: str) -> subprocess.Popen:
    """A command that runs `main`, once it has begun."""
    process = subprocess.Popen(
        [sys.executable, "-c", f"{BEGIN}\n{main}\ncommand.run_command(main)"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stdout.readline() == "begun\n"
    return process


@pytest.mark.parametrize(
    "main",
    [SLEEP, FINALISE, IMPORT, COMPUTE],
    ids=["python", "finaliser", "import", "outside of python"],
)
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
def test_a_signal_before_the_training_is_told_and_ends_with_the_status_to_start_again(main, number):
    process = start(main)
    process.send_signal(number)
    _, errors = process.communicate(timeout=20)
    assert process.returncode == STOPPED == 143
    told, stopped, *again = filter(None, errors.splitlines())
    assert told == f"{number.name}: the run stops"
    assert stopped == f"stopped by {number.name}, what is done is kept; the same command goes on:"
    assert re.match(r"    python\S* -c ", again[0])
    assert again[-1].startswith("command.run_command(main)")


def test_a_second_ctrl_c_ends_at_once_and_one_that_a_launcher_repeats_does_not():
    process = start(TRAIN)
    process.send_signal(signal.SIGINT)
    process.send_signal(signal.SIGINT)
    assert process.stdout.readline() == "saving\n"
    time.sleep(0.3)
    assert process.poll() is None
    time.sleep(1.0)
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=20)
    assert process.returncode == STOPPED
    assert "SIGINT: the run stops after this step, and saves" in errors
    assert "Ctrl-C again: ended at once, without saving; the same command goes on" in errors
    assert "Traceback" not in errors


@pytest.mark.slow
def test_a_failed_command_does_not_wait_for_threads_of_libraries():
    began = time.monotonic()
    process = start(FAIL)
    _, errors = process.communicate(timeout=90)
    assert time.monotonic() - began < 80  # the thread sleeps for 100 seconds
    assert process.returncode == FAILED
    assert "OSError: [Errno 28] No space left on device: 'run/checkpoints'" in errors


def test_the_status_says_how_a_command_ended(capsys):
    def stop():
        raise Preempted("sft: stopped at step 3 of 6, saved")

    def refuse():
        raise FileNotFoundError(2, "No such file or directory", "data.jsonl")

    def draw():
        raise SamplingError("top_p: 3 is too high")

    def fail():
        raise KeyError("a bug")

    assert exit_status(lambda: None) == 0
    assert exit_status(lambda: 5) == 5
    assert exit_status(stop) == STOPPED
    assert "sft: stopped at step 3 of 6, saved; the same command" in capsys.readouterr().err
    assert exit_status(refuse) == FAILED
    assert "Traceback" not in capsys.readouterr().err
    assert exit_status(draw) == FAILED
    assert capsys.readouterr().err == "\nSamplingError: top_p: 3 is too high\n"
    assert exit_status(fail) == FAILED
    assert "Traceback" in capsys.readouterr().err


def test_a_command_ends_with_the_code_for_stops_that_is_in_use():
    process = start(SLEEP.replace("    begin()", "    stopping.use_stop_code(85)\n    begin()"))
    process.send_signal(signal.SIGTERM)
    process.communicate(timeout=20)
    assert process.returncode == 85
