"""Two processes on this machine make the run that one process makes."""

import shutil
import socket
import subprocess

import numpy as np

from .conftest import command, environment, lines, train


def test_two_processes_equal_one_which_takes_up_their_checkpoint(tmp_path):
    alone = train(tmp_path / "one")
    assert alone.returncode == 0, alone.stderr
    with socket.socket() as free:
        free.bind(("localhost", 0))
        address = f"localhost:{free.getsockname()[1]}"
    processes = [
        subprocess.Popen(
            command(tmp_path / "two", **{"distributed": True, "mesh.fsdp": 2}),
            env=environment(devices=2)
            | {
                "JAX_COORDINATOR_ADDRESS": address,
                "JAX_NUM_PROCESSES": "2",
                "JAX_PROCESS_ID": str(i),
            },
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for i in range(2)
    ]
    printed = [process.communicate(timeout=240)[0] for process in processes]
    assert [process.returncode for process in processes] == [0, 0], printed
    assert "held-out pairs" in printed[0]
    assert "held-out pairs" not in printed[1]
    values = lambda folder: [
        [line.get(k, 0.0) for k in ("loss", "grad_norm", "logps/chosen", "logps/rejected")]
        for line in lines(tmp_path / folder, "dpo")
        if line["step"] <= 1
    ]
    np.testing.assert_allclose(values("two"), values("one"), rtol=1e-4)
    shutil.rmtree(tmp_path / "two" / "dpo" / "checkpoints" / "6")
    (tmp_path / "two" / "finished.json").unlink()
    resumed = train(tmp_path / "two")
    assert resumed.returncode == 0, resumed.stderr
    ours, theirs = (
        [(line["step"], line["split"]) for line in lines(tmp_path / folder, "dpo")]
        for folder in ("two", "one")
    )
    assert ours == theirs
