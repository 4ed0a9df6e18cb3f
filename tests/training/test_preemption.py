"""A SIGTERM to one process of a run ends all of them, with one checkpoint of one step."""

import os
import signal
import socket
import subprocess
import sys
import time

import pytest

from dpojax import storage
from dpojax.jobs.job import stoppable
from dpojax.training.preemption import Preempted, StopSignal, forget_stop

START = """
import sys, time
import jax
port, index, folder, service = sys.argv[1:]
jax.config.update("jax_enable_preemption_service", service == "on")
jax.distributed.initialize(f"localhost:{port}", num_processes=2, process_id=int(index))
"""

TRAIN = """
import jax.numpy as jnp
import numpy as np
from typing import NamedTuple
from dpojax import sharding
from dpojax.training import loop
from dpojax.training.checkpoints import Checkpoints
from dpojax.training.metrics import MetricWriter
from dpojax.training.preemption import Preempted, StopSignal

class State(NamedTuple):
    step: jax.Array
    params: jax.Array

class Report(NamedTuple):
    finite: bool = True

class Idle:
    restart = add = lambda *_: None
    flush = dict

class Batches:
    position = 0
    def __next__(self):
        self.position += 1
    def get_state(self):
        return {"position": self.position}

loop._Pace = lambda *_: Idle()
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
        evaluate=lambda state: {}, flops=lambda rows: 0.0, ceiling=lambda: 1.0, hyper={},
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
    with StopSignal() as stop:
        for step in range(1, 2000):
            if step == 3:
                print("training", flush=True)
            time.sleep(0.02 * (1 + int(index)))
            if stop.agreed(step):
                break
        print("agreed at", step, stop.agreed(step + 1), stop.agreed(step + 2), flush=True)
    with StopSignal():
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


def outputs_after_sigterm(receiver, script, *arguments):
    """What two processes print, line by line, when one gets a SIGTERM at the third step."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    pair = [start(script, port, index, *arguments) for index in range(2)]
    try:
        for process in pair:
            assert "training\n" in iter(process.stdout.readline, "")
        pair[receiver].send_signal(signal.SIGTERM)
        ends = [process.communicate(timeout=120) for process in pair]
    finally:
        for process in pair:
            process.kill()
            process.communicate()
    assert [process.returncode for process in pair] == [0, 0], ends
    gloo = "[Gloo]"  # what connects the processes prints a line of its own
    return [[x for x in out.splitlines() if not x.startswith(gloo)] for out, _ in ends]


@pytest.mark.parametrize("service", ["on", "off"])
@pytest.mark.parametrize("receiver", [0, 1])
def test_a_sigterm_to_one_process_saves_both_at_the_same_step(tmp_path, receiver, service):
    outputs = outputs_after_sigterm(receiver, TRAIN, tmp_path, service)
    first, second = (lines[-1] for lines in outputs)
    assert first == second
    step = int(first.split()[-1])
    assert 3 < step < 2000
    assert first == f"toy: stopped at step {step} of 2000, saved checkpoint {step}"


@pytest.mark.parametrize("service", ["on", "off"])
def test_what_was_agreed_at_a_last_step_stops_the_next_training_of_all_processes(service):
    first, second = outputs_after_sigterm(1, TWO_TRAININGS, "normally", service)
    assert first == second
    agreed, stopped = first
    assert agreed.startswith("agreed at")
    assert agreed.endswith("True True")
    assert stopped == "Preempted stopped before the training began; what is done is kept"


@pytest.mark.parametrize("service", ["on", "off"])
def test_no_process_saves_once_the_first_one_has_lost_its_lock(service):
    for folder, lines in zip(
        ("gs://bucket/run", "the workdir"),
        outputs_after_sigterm(0, TWO_TRAININGS, "lost", service),
    ):
        assert lines == [f"Locked {folder}: another process took over; nothing more is saved"]


def test_one_process_remembers_a_sigterm_and_restores_the_handler():
    before = signal.getsignal(signal.SIGTERM)
    with StopSignal() as stop:
        assert not stop.agreed(1)
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(0.01)
        assert stop.agreed(2)
        assert stop.agreed(3)
    assert signal.getsignal(signal.SIGTERM) is before


def sigterm():
    os.kill(os.getpid(), signal.SIGTERM)
    time.sleep(0.01)


def test_a_sigterm_at_a_last_step_stops_before_the_next_training():
    before = signal.getsignal(signal.SIGTERM)
    with StopSignal() as stop:
        sigterm()
        assert stop.agreed(2)
    for _ in range(2):
        with pytest.raises(Preempted, match="before the training began"), StopSignal():
            raise AssertionError("it trains")
        assert signal.getsignal(signal.SIGTERM) is before
        with StopSignal() as stop:  # that a Preempted was raised is enough
            assert not stop.asked
            sigterm()  # after the last step


def test_a_sigterm_that_a_training_did_not_obey_goes_to_the_handler_of_before():
    with (
        stoppable("sweep"),  # raises while the sweep is under way, so between two jobs
        pytest.raises(Preempted, match="sweep: stopped"),
        StopSignal(),
    ):
        sigterm()
    with StopSignal() as stop:
        assert not stop.agreed()


def test_a_sigterm_outlives_a_training_that_failed():
    def fail():
        with stoppable("sweep"), StopSignal():
            sigterm()
            raise FloatingPointError("NaN")

    with pytest.raises(FloatingPointError):
        fail()
    with pytest.raises(Preempted), StopSignal():
        pass


def test_a_training_that_obeyed_leaves_nothing_to_stop():
    def obey():
        with StopSignal() as stop:
            sigterm()
            if stop.agreed():
                raise Preempted("saved")

    with pytest.raises(Preempted, match="saved"):
        obey()
    with StopSignal() as stop:
        assert not stop.agreed()


def test_a_training_that_lost_its_lock_is_not_told_to_save(monkeypatch):
    with StopSignal() as stop:
        monkeypatch.setattr(storage, "lost_locks", lambda: ["gs://bucket/run"])
        assert not stop.agreed(1)  # its SIGTERM is still to come
        sigterm()
        for _ in range(2):
            with pytest.raises(storage.Locked, match="gs://bucket/run: another process took over"):
                stop.agreed(2)
