"""Two processes on this machine make the run that one process makes."""

import runpy
import shutil
import socket
import subprocess

import numpy as np
import pytest

from dpojax.runs import run

from .conftest import ROOT, TINY, command, environment, lines

DEVICES = 8


def tiny_reviews():
    """The config that `command` gives to scripts/train.py."""
    config = runpy.run_path(str(ROOT / "configs" / "reviews.py"))["get_config"]()
    config.update_from_flattened_dict(TINY)
    return config


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    """The run in one process: this one, on eight devices."""
    workdir = tmp_path_factory.mktemp("alone") / "run"
    run.run(tiny_reviews(), str(workdir))
    return workdir


def in_two_processes(arguments: list[str]) -> list[tuple[int, str]]:
    """Exit status and output of both, of two devices each."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        address = f"localhost:{free.getsockname()[1]}"
    joined = {"JAX_COORDINATOR_ADDRESS": address, "JAX_NUM_PROCESSES": "2"}
    processes = [
        subprocess.Popen(
            arguments,
            env=environment(devices=2) | joined | {"JAX_PROCESS_ID": str(i)},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for i in range(2)
    ]
    printed = [process.communicate(timeout=240)[0] for process in processes]
    return [(process.returncode, text) for process, text in zip(processes, printed)]


@pytest.mark.slow
def test_two_processes_equal_one_which_takes_up_their_checkpoint(tmp_path, alone, capsys):
    ended = in_two_processes(
        command(tmp_path / "two", **{"distributed": True, "mesh.fsdp": 2, "max_buckets": 2})
    )
    assert [code for code, _ in ended] == [0, 0], ended
    printed = [text for _, text in ended]
    assert "held-out pairs" in printed[0]
    assert "held-out pairs" not in printed[1]
    values = lambda folder: [
        [line.get(k, 0.0) for k in ("loss", "grad_norm", "logps/chosen", "logps/rejected")]
        for line in lines(folder, "preference")
        if line["step"] <= 1
    ]
    np.testing.assert_allclose(values(tmp_path / "two"), values(alone), rtol=1e-4)
    shutil.rmtree(tmp_path / "two" / "preference" / "checkpoints" / "6")
    (tmp_path / "two" / "finished.json").unlink()
    capsys.readouterr()
    run.run(tiny_reviews(), str(tmp_path / "two"))
    assert capsys.readouterr().out.count(f"tokens read from {tmp_path / 'two' / 'tokens'}") == 2
    ours, theirs = (
        [(line["step"], line["split"]) for line in lines(folder, "preference")]
        for folder in (tmp_path / "two", alone)
    )
    assert ours == theirs


@pytest.mark.long
def test_many_evaluation_batches_do_not_hang_two_processes_of_two_devices(tmp_path):
    """Each batch is a program with collectives that needs nothing of the one before it."""
    changes = {"preference.data.limit": 600, "preference.data.eval_limit": 499}
    changes |= {"distributed": True, "mesh.fsdp": 2, "preference.steps": 3, "hang_minutes": 3.0}
    ended = in_two_processes(command(tmp_path / "two", **changes))
    assert [code for code, _ in ended] == [0, 0], ended
    evaluated = [
        line["step"] for line in lines(tmp_path / "two", "preference") if line["split"] == "eval"
    ]
    assert evaluated == [0, 3]


@pytest.mark.long
def test_two_processes_sweep_what_one_trains(tmp_path, alone):
    """Each process has a member; both read the same batches."""
    config = tmp_path / "config.py"
    of_run = (ROOT / "configs" / "reviews.py").read_text()
    betas = "def sweep():\n    return [{'preference.beta': 0.1}, {'preference.beta': 3.0}]\n"
    config.write_text(f"{of_run}\n\n{betas}")
    arguments = command(tmp_path / "two", **{"distributed": True, "sweep.axis": 2})
    arguments[1:3] = [str(ROOT / "scripts" / "sweep.py"), f"--config={config}"]
    ended = in_two_processes(arguments)
    assert [code for code, _ in ended] == [0, 0], ended
    assert "on a sweep axis of 2" in ended[0][1]
    losses = lambda folder, split: [
        line["loss"] for line in lines(folder, "preference") if line["split"] == split
    ]
    for split in ("train", "eval"):
        got = losses(tmp_path / "two" / "beta-0.1", split)
        np.testing.assert_allclose(got, losses(alone, split), rtol=1e-4)
    other = losses(tmp_path / "two" / "beta-3", "eval")
    assert other[0] == pytest.approx(np.log(2), abs=1e-6)
    assert abs(other[-1] - got[-1]) > 0.01
