"""A SIGTERM to one process of a run ends all of them, with one checkpoint of one step."""

import os
import signal
import socket
import subprocess
import sys
import time

import pytest

from dpojax.training.preemption import StopSignal

PROCESS = """
import sys, time
import jax
port, index, folder, service = sys.argv[1:]
jax.config.update("jax_enable_preemption_service", service == "on")
jax.distributed.initialize(f"localhost:{port}", num_processes=2, process_id=int(index))
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


def start(*arguments):
    environment = os.environ | {"XLA_FLAGS": "--xla_force_host_platform_device_count=1"}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    command = [sys.executable, "-c", PROCESS, *map(str, arguments)]
    return subprocess.Popen(command, env=environment, **pipes)


@pytest.mark.parametrize("service", ["on", "off"])
@pytest.mark.parametrize("receiver", [0, 1])
def test_a_sigterm_to_one_process_saves_both_at_the_same_step(tmp_path, receiver, service):
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    pair = [start(port, index, tmp_path, service) for index in range(2)]
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
    first, second = (out.splitlines()[-1] for out, _ in ends)
    assert first == second
    step = int(first.split()[-1])
    assert 3 < step < 2000
    assert first == f"toy: stopped at step {step} of 2000, saved checkpoint {step}"


def test_one_process_remembers_a_sigterm_and_restores_the_handler():
    before = signal.getsignal(signal.SIGTERM)
    with StopSignal() as stop:
        assert not stop.agreed(1)
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(0.01)
        assert stop.agreed(2)
        assert stop.agreed(3)
    assert signal.getsignal(signal.SIGTERM) is before
