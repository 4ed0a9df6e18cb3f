"""Processes of a run stop at the same call, and none outlives one that has ended."""

import contextlib
import os
import signal
import socket
import subprocess
import sys
import threading
import time

import pytest

from dpojax import peers, stopping
from dpojax.stopping import STOPPED

# Two processes: the arguments are the port, the index, and what is done once they are connected.
RUN = """
import os, sys, time
from dpojax.runs.command import run_command

port, index, do = sys.argv[1:]
os.environ |= {
    "JAX_COORDINATOR_ADDRESS": f"localhost:{port}", "JAX_NUM_PROCESSES": "2",
    "JAX_PROCESS_ID": index,
}

def main():
    from dpojax import sharding
    sharding.start_distributed()
    print("connected", flush=True)
    if do == "fail" and index == "1":
        raise FileNotFoundError("the data are gone")
    while do == "wait in a collective":
        sharding.agreed(True)
    time.sleep(100)

run_command(main)
"""


@pytest.fixture
def ends(monkeypatch):
    """(status, text) of each process that a link would have ended."""
    told = []
    monkeypatch.setattr(stopping, "end_now", lambda status, text, **_: told.append((status, text)))
    monkeypatch.setattr(peers, "LAST", 0.0)
    return told


@pytest.fixture
def links(ends):
    """Links of three processes that this process plays, connected by sockets."""
    links = [peers.Link(index, 3) for index in range(3)]
    server, port, secret = peers.listen()
    accepting = threading.Thread(target=peers.accept, args=(links[0], server, secret))
    accepting.start()
    stranger = socket.create_connection(("localhost", port))
    stranger.sendall(b'{"process": 1, "secret": 0}\n')  # does not know the secret
    for link in links[1:]:
        peers.connect(link, "localhost", port, secret)
    accepting.join(10)
    stranger.close()
    yield links
    for link in links:
        link.close()
    for link in links:
        for line in link._peers.values():
            with contextlib.suppress(OSError):
                line.shutdown(socket.SHUT_RDWR)
    time.sleep(0.1)  # until the threads have noticed


def wait_for(holds, seconds=10):
    until = time.monotonic() + seconds
    while not holds() and time.monotonic() < until:
        time.sleep(0.01)
    assert holds()


@pytest.mark.parametrize("asking", [0, 1, 2])
def test_processes_at_different_steps_stop_at_the_same_one(asking, links, ends):
    stopped_at = [0, 0, 0]

    def train(index):
        for step in range(1, 2000):
            if index == asking and step == 20:
                links[index].ask_to_stop()
            if links[index].agreed():
                stopped_at[index] = step
                return
            time.sleep(0.001 * index)  # the last process is behind

    threads = [threading.Thread(target=train, args=(index,)) for index in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(20)
    assert stopped_at[0] == stopped_at[1] == stopped_at[2] >= 20
    assert all(link.agreed() and link.has_agreed for link in links)
    assert not ends


def test_a_process_that_is_gone_is_named_to_all_others(links, ends):
    links[2]._peers[0].shutdown(socket.SHUT_RDWR)  # as the system does for a killed process
    wait_for(lambda: len(ends) >= 3)
    text = "process 2 of 3 was killed, or its machine is lost; process {} ends, too"
    for index in (0, 1):
        assert any(told.startswith(text.format(index)) for _, told in ends)
    assert {status for status, _ in ends} == {peers.DEAD}


def test_a_process_that_fails_tells_its_status_and_one_that_is_done_ends_nobody(links, ends):
    links[1].close()
    links[1]._peers[0].shutdown(socket.SHUT_WR)
    time.sleep(0.2)
    assert not ends
    links[2].end(STOPPED, "was stopped by SIGHUP")
    wait_for(lambda: ends)
    assert ends[0][0] == STOPPED
    assert ends[0][1].startswith("process 2 of 3 was stopped by SIGHUP; process 0 ends, too")


@pytest.mark.long
@pytest.mark.parametrize(
    ("do", "receiver", "number", "status", "told"),
    [
        ("wait", 1, signal.SIGKILL, 1, "process 1 of 2 was killed"),
        ("wait in a collective", 0, signal.SIGKILL, 1, "process 0 of 2 was killed"),
        ("wait", 1, signal.SIGTERM, STOPPED, "process 1 of 2 was stopped by SIGTERM"),
        ("wait in a collective", 0, signal.SIGINT, STOPPED, "process 0 of 2 was stopped by SIGINT"),
        ("fail", None, None, 1, "process 1 of 2 has failed; see what it printed"),
    ],
)
def test_no_process_outlives_another_for_long(do, receiver, number, status, told):
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    pair = [
        subprocess.Popen(
            [sys.executable, "-c", RUN, str(port), str(index), do],
            env=os.environ | {"XLA_FLAGS": "--xla_force_host_platform_device_count=1"},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for index in range(2)
    ]
    try:
        for process in pair:
            assert "connected\n" in iter(process.stdout.readline, "")
        began = time.monotonic()
        if number is not None:
            pair[receiver].send_signal(number)
        errors = [process.communicate(timeout=100)[1] for process in pair]
        seconds = time.monotonic() - began
    finally:
        for process in pair:
            process.kill()
            process.communicate()
    other = 0 if receiver is None else 1 - receiver
    assert pair[other].returncode == status, errors
    assert pair[1 - other].returncode == (-number if number == signal.SIGKILL else status)
    assert told in errors[other]
    # One that fails first imports the errors that a user can mend, to tell which kind its own is.
    assert seconds < (60 if do == "fail" else 15)
    assert "stack trace" not in "".join(errors)
    assert "Traceback" not in "".join(errors)
