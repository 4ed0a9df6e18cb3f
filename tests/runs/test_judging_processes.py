"""Two processes that judge the same draw what one draws, and ask what one asks."""

import collections
import csv
import dataclasses
import json
import socket
import subprocess
import sys

import pytest

from dpojax.runs import judging
from dpojax.runs.judging import Settings, Side
from tests.evaluation.judging.chat_server import TEMPLATE, ChatServer

from .conftest import environment
from .test_preferences import save_model

pytestmark = pytest.mark.long
DEVICES = 1
RUN = """
import sys
from dpojax.runs.command import run_command

def main():
    from dpojax import sharding
    from dpojax.runs import judging
    if sys.argv.pop(1) == "joined":
        sharding.start_distributed()
    judging.main(sys.argv[1:])

run_command(main)
"""


@pytest.fixture(scope="module")
def policy(tmp_path_factory):
    return save_model(tmp_path_factory.mktemp("policy") / "model")


def settings(policy, folder, server):
    """Two temperatures and two n of best-of-n of a policy, against itself."""
    folder.mkdir()
    (folder / "template.txt").write_text(TEMPLATE.text)
    return Settings(
        out=str(folder / "out"),
        prompts="reviews",
        limit=6,
        judge=f"openai:tiny@{server.url}",
        template_file=str(folder / "template.txt"),
        a=(Side(policy, "it"),),
        b=Side(policy, "itself"),
        temperatures=(0.0, 1.0),
        best_of=(1, 3),
        best_of_reward="reviews",
        samples=2,
        max_new_tokens=9,
        batch_size=8,
        repeat=0.0,
        resamples=100,
    )


@pytest.fixture(scope="module")
def alone(policy, tmp_path_factory):
    """What one process writes."""
    folder = tmp_path_factory.mktemp("alone") / "one"
    with ChatServer() as server:
        judging.judge(settings(policy, folder, server))
    return folder / "out"


def in_two_processes(kind, how, file):
    """Exit status and output of both."""
    file.write_text(json.dumps(dataclasses.asdict(how)))
    with socket.socket() as free:
        free.bind(("localhost", 0))
        address = f"localhost:{free.getsockname()[1]}"
    joined = {"JAX_COORDINATOR_ADDRESS": address, "JAX_NUM_PROCESSES": "2"}
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", RUN, kind, f"--settings={file}"],
            env=environment() | joined | {"JAX_PROCESS_ID": str(index)},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for index in range(2)
    ]
    printed = [process.communicate(timeout=240)[0] for process in processes]
    return [(process.returncode, text) for process, text in zip(processes, printed)]


def rows_of(folder):
    """The table without the server's address."""
    with open(folder / "win_rates.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    return [{k: x for k, x in row.items() if k not in ("judge", "fingerprint")} for row in rows]


@pytest.mark.parametrize("kind", ["joined", "apart"])
def test_two_processes_make_what_one_makes_and_nothing_twice(kind, policy, alone, tmp_path):
    """Joined: they are processes of one run of JAX."""
    with ChatServer(delay=0.02) as server:
        how = settings(policy, tmp_path / "two", server)
        ended = in_two_processes(kind, how, tmp_path / "settings.json")
    assert [status for status, _ in ended] == [0, 0], ended
    out = tmp_path / "two" / "out"
    assert set(server.answers.values()) == {1}
    assert len((out / "samples.jsonl").read_text().splitlines()) == 2 * (6 + 12)
    assert (out / "samples.jsonl").read_text() == (alone / "samples.jsonl").read_text()
    assert rows_of(out) == rows_of(alone)
    drawings = sorted((out / "responses").iterdir())
    assert [x.name for x in drawings] == [x.name for x in sorted((alone / "responses").iterdir())]
    for folder in drawings:
        lines = [json.loads(x) for x in (folder / "responses.jsonl").read_text().splitlines()]
        drawn = collections.Counter((line["prompt"], line["sample"]) for line in lines)
        assert set(drawn.values()) == {1}
        for scores in folder.glob("scores-*.jsonl"):
            scored = [json.loads(line)["text"] for line in scores.read_text().splitlines()]
            assert len(scored) == len(set(scored)) > 0
