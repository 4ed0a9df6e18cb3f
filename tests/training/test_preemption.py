"""A signal to one process of a run ends all of them, with one checkpoint of one step."""

import contextlib
import os
import signal
import socket
import subprocess
import sys
import time

import pytest

from dpojax import storage
from dpojax.stopping import listening
from dpojax.training.preemption import Preempted, StopSignal, forget_stop

START = """
import os, sys, time
import jax
from dpojax import peers, sharding
port, index, folder, line = sys.argv[1:]
os.environ |= {
    "JAX_COORDINATOR_ADDRESS": f"localhost:{port}", "JAX_NUM_PROCESSES": "2",
    "JAX_PROCESS_ID": index,
}
if line == "none":  # as where a firewall stands between the processes
    def refuse(*_):
        raise OSError
    peers.connect = refuse
    peers.CONNECT = 1.0
sharding.start_distributed()
assert (peers.current() is None) == (line == "none")
"""

TRAIN = """
import jax.numpy as jnp
import numpy as np
from typing import NamedTuple
from dpojax.training import loop
from dpojax.training.checkpoints import Checkpoints
from dpojax.training.metrics import MetricWriter
from dpojax.training.preemption import Preempted, StopSignal

class State(NamedTuple):
    step: jax.Array
    params: jax.Array

class Report(NamedTuple):
    finite: bool = True
    metrics: dict = {}

class NoSpeed:
    restart = add = lambda *_: None
    flush = dict

class Batches:
    position = 0
    def __next__(self):
        self.position += 1
    def get_state(self):
        return {"position": self.position}

loop.tokens_of = lambda rows: 0
mesh = sharding.make_mesh()
new = lambda: State(jnp.int32(0), jnp.zeros(4))
state = jax.jit(new, out_shardings=sharding.replicated(mesh))()
advance = jax.jit(lambda state: State(state.step + 1, state.params + 1))

def step(state, rows, hyper):
    if int(state.step) == 3:
        print("training", flush=True)
    time.sleep(0.02 * (1 + int(index)))  # one process is slower
    return advance(state), Report()

with StopSignal() as stop, Checkpoints(folder) as saved, MetricWriter(folder) as writer:
    run = loop.TrainLoop(
        stage="toy", step=step, batches=Batches(), to_device=lambda rows: rows,
        evaluate=lambda state: {}, speed=NoSpeed(), hyper={},
        steps=2000, every=loop.Every(log=0, evaluate=0, checkpoint=0), examples=[],
        checkpoints=saved, writer=writer, stop=stop,
    )
    try:
        run(state)
    except Preempted as stopped:
        print(stopped, "checkpoint", saved.latest, flush=True)
"""


# Its argument `folder` is how the first training ends: "normally", or "lost" with its lock.
TWO_TRAININGS = """
from dpojax import storage
from dpojax.training.preemption import Preempted, StopSignal

if folder == "lost" and index == "0":
    storage.lost_locks = lambda: ["gs://bucket/run"]
try:
    with StopSignal() as stop, stop.steps():
        for step in range(1, 2000):
            if step == 3:
                print("training", flush=True)
            time.sleep(0.02 * (1 + int(index)))
            if stop.agreed(step):
                break
        print("agreed at", step, stop.agreed(step + 1), stop.agreed(step + 2), flush=True)
    print("trains again", flush=True)
except (Preempted, storage.Locked) as error:
    print(type(error).__name__, error, flush=True)
"""


@pytest.fixture(autouse=True)
def nothing_to_stop():
    """What one test has received is no matter of the next one."""
    yield
    forget_stop()


def start(script, *arguments):
    environment = os.environ | {"XLA_FLAGS": "--xla_force_host_platform_device_count=1"}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    command = [sys.executable, "-c", START + script, *map(str, arguments)]
    return subprocess.Popen(command, env=environment, **pipes)


def outputs_after_signal(receiver, script, *arguments, number=signal.SIGTERM):
    """What two processes print, line by line, when one gets a signal at the third step."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    pair = [start(script, port, index, *arguments) for index in range(2)]
    try:
        for process in pair:
            assert "training\n" in iter(process.stdout.readline, "")
        pair[receiver].send_signal(number)
        ends = [process.communicate(timeout=120) for process in pair]
    finally:
        for process in pair:
            process.kill()
            process.communicate()
    assert [process.returncode for process in pair] == [0, 0], ends
    gloo = "[Gloo]"  # what connects the processes prints a line of its own
    return [[x for x in out.splitlines() if not x.startswith(gloo)] for out, _ in ends]


@pytest.mark.long
@pytest.mark.parametrize(
    ("receiver", "line", "number"),
    [
        (0, "stands", signal.SIGTERM),
        (1, "stands", signal.SIGINT),
        (0, "none", signal.SIGHUP),
        (1, "none", signal.SIGTERM),
    ],
)
def test_a_signal_to_one_process_saves_both_at_the_same_step(tmp_path, receiver, line, number):
    outputs = outputs_after_signal(receiver, TRAIN, tmp_path, line, number=number)
    first, second = (lines[-1] for lines in outputs)
    assert first == second
    step = int(first.split()[-1])
    assert 3 < step < 2000
    assert first == f"toy: stopped at step {step} of 2000, saved checkpoint {step}"


@pytest.mark.long
@pytest.mark.parametrize("line", ["stands", "none"])
def test_what_was_agreed_at_a_last_step_stops_all_processes_before_the_next_training(line):
    first, second = outputs_after_signal(1, TWO_TRAININGS, "normally", line)
    assert first == second
    agreed, stopped = first
    assert agreed.startswith("agreed at")
    assert agreed.endswith("True True")
    assert stopped == "Preempted stopped after the training; what is done is kept"


@pytest.mark.long
@pytest.mark.parametrize("line", ["stands", "none"])
def test_no_process_saves_once_the_first_one_has_lost_its_lock(line):
    for folder, lines in zip(
        ("gs://bucket/run", "the workdir"),
        outputs_after_signal(0, TWO_TRAININGS, "lost", line),
    ):
        assert lines == [f"Locked {folder}: another process took over; nothing more is saved"]


SIGNALS = [signal.SIGTERM, signal.SIGINT, signal.SIGHUP]


def send(number=signal.SIGTERM):
    os.kill(os.getpid(), number)
    time.sleep(0.01)


@pytest.mark.parametrize("number", SIGNALS)
def test_a_training_notes_a_signal_and_the_handler_of_before_is_restored(number):
    def train():
        with StopSignal() as stop, stop.steps():
            assert not stop.agreed(1)
            send(number)
            assert stop.agreed(2)
            assert stop.agreed(3)
            raise Preempted("saved")

    before = signal.getsignal(number)
    with pytest.raises(Preempted, match="saved"):
        train()
    assert signal.getsignal(number) is before
    with StopSignal() as stop:  # one Preempted is enough
        assert not stop.asked


@pytest.mark.parametrize("number", SIGNALS)
def test_outside_of_steps_a_signal_ends_what_is_done_at_once(number):
    def summarise():
        with StopSignal():
            send(number)
            raise AssertionError("it summarises")

    with pytest.raises(Preempted, match=f"stopped by {number.name}, what is done is kept"):
        summarise()
    with StopSignal() as stop:
        assert not stop.asked


def test_no_library_that_goes_on_after_errors_goes_on_after_a_signal():
    def read():
        with StopSignal(), contextlib.suppress(Exception):
            send()
        raise AssertionError("it is swallowed")

    with pytest.raises(Preempted):
        read()


@pytest.mark.parametrize("number", SIGNALS)
def test_a_signal_that_is_ignored_from_the_start_stays_ignored(number):
    """As SIGHUP under nohup."""
    before = signal.signal(number, signal.SIG_IGN)
    try:
        with StopSignal() as stop:
            send(number)
            assert not stop.asked
            assert signal.getsignal(number) is signal.SIG_IGN
    finally:
        signal.signal(number, before)


def test_other_signals_are_left_alone():
    received = []
    before = signal.signal(signal.SIGUSR1, lambda *_: received.append(1))
    try:
        with StopSignal() as stop:
            send(signal.SIGUSR1)
            assert not stop.asked
    finally:
        signal.signal(signal.SIGUSR1, before)
    assert received == [1]


def test_a_signal_after_the_last_step_stops_before_the_next_training():
    stop = StopSignal()
    with pytest.raises(Preempted, match="stopped after the training"), stop, stop.steps():
        send()
    with StopSignal() as stop:
        assert not stop.asked


def test_a_signal_between_two_jobs_names_their_plan():
    with pytest.raises(Preempted, match="sweep: stopped by SIGTERM"), listening("sweep"):
        send()


def test_a_signal_outlives_a_training_that_failed():
    def fail():
        with StopSignal() as stop, stop.steps():
            send()
            raise FloatingPointError("NaN")

    with pytest.raises(FloatingPointError):
        fail()
    with pytest.raises(Preempted, match="before the training began"), StopSignal():
        raise AssertionError("it trains")


def test_a_training_that_lost_its_lock_is_not_told_to_save(monkeypatch):
    def train():
        with StopSignal() as stop, stop.steps():
            assert not stop.agreed(1)  # its SIGTERM is still to come
            send()
            stop.agreed(2)

    monkeypatch.setattr(storage, "lost_locks", lambda: ["gs://bucket/run"])
    with pytest.raises(storage.Locked, match="gs://bucket/run: another process took over"):
        train()
