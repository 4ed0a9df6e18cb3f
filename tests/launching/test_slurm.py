"""A real Slurm runs what scripts/launch.py writes: a stopped job comes back, a sweep ends."""

import csv
import json
import pathlib
import subprocess
import sys
import time

import numpy as np
import pytest

from dpojax.runs.workdirs import FINISHED

from ..runs.conftest import ROOT, TINY, environment, lines
from . import one_machine_slurm

SECONDS = 900  # that a job may take, on a machine that has other work
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(bool(why := one_machine_slurm.why_not()), reason=why),
]


@pytest.fixture(scope="module")
def slurm(tmp_path_factory):
    """The environment in which sbatch finds a Slurm of this test; jobs have one CPU device."""
    with one_machine_slurm.running(tmp_path_factory.mktemp("slurm")) as found:
        wanted = environment(devices=1)
        yield found | {name: wanted[name] for name in ("XLA_FLAGS", "JAX_PLATFORMS")}


def launch(slurm: dict, workdir: pathlib.Path, *words: str, **changes) -> list[str]:
    """Write and submit; return the numbers of the jobs."""
    keys = [f"--config.{key}={value}" for key, value in (TINY | changes).items()]
    config = [f"--config={ROOT / 'configs' / 'reviews.py'}"]
    config = [word for word in words if word.startswith("--config=")] or config
    words = [word for word in words if not word.startswith("--config=")]
    done = subprocess.run(
        [sys.executable, str(ROOT / "scripts" / "launch.py"), "slurm", "--submit"]
        + [*config, f"--workdir={workdir}", *words, *keys],
        env=slurm,
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=SECONDS,
    )
    assert done.returncode == 0, done.stderr
    submitted = done.stdout.split("submit it with:")[1].splitlines()[1:]
    return [next(word for word in line.split() if word.isdigit()) for line in submitted]


def state(slurm: dict, number: str) -> dict[str, str]:
    """What Slurm says of a job: {"JobState": "RUNNING", ...}."""
    shown = subprocess.run(
        ["scontrol", "show", "--oneliner", "job", number],
        env=slurm,
        capture_output=True,
        text=True,
        check=True,
    )
    return dict(word.split("=", 1) for word in shown.stdout.split() if "=" in word)


def wait_until(holds, slurm: dict, number: str, workdir: pathlib.Path) -> None:
    until = time.monotonic() + SECONDS
    while not holds():
        now = state(slurm, number)["JobState"]
        logs = "\n".join(path.read_text() for path in workdir.glob("*.out"))
        assert now not in ("FAILED", "CANCELLED", "NODE_FAIL", "TIMEOUT"), f"{now}\n{logs}"
        assert time.monotonic() < until, f"still {now}\n{logs}"
        time.sleep(0.1)


def ended(slurm: dict, number: str):
    return lambda: state(slurm, number)["JobState"] == "COMPLETED"


def losses(workdir: pathlib.Path) -> list[tuple]:
    return [
        (line["step"], line["split"], line["loss"])
        for line in lines(workdir, "preference")
        if "loss" in line
    ]


def test_a_job_of_two_tasks_that_is_stopped_comes_back_and_ends_as_if_it_had_not(slurm, tmp_path):
    """Stopped by `scancel --signal=TERM`. The folder's name has a space."""
    steps = 150  # long enough that the signal comes before the last one
    changes = {"preference.steps": steps, "evaluate_every": steps, "checkpoint_every": steps}
    changes |= {"stages": "('preference',)"}
    workdir, unbroken = tmp_path / "a run", tmp_path / "unbroken"
    (number,) = launch(slurm, workdir, "--tasks_per_node=2", **changes)
    metrics = workdir / "preference" / "metrics.jsonl"

    def is_training() -> bool:
        return metrics.exists() and metrics.read_text().count('"train"') >= 3

    wait_until(is_training, slurm, number, workdir)
    subprocess.run(["scancel", "--signal=TERM", number], env=slurm, check=True)
    wait_until(ended(slurm, number), slurm, number, workdir)
    found = state(slurm, number)
    assert (found["Restarts"], found["ExitCode"]) == ("1", "0:0")
    (log,) = workdir.glob("*.out")
    printed = log.read_text()
    assert "status 143: the job goes back into the queue" in printed
    assert "preference: stopped at step" in printed
    trained = [step for step, split, _ in losses(workdir) if split == "train"]
    assert trained == list(range(1, steps + 1))
    (number,) = launch(slurm, unbroken, "--tasks_per_node=2", **changes)
    wait_until(ended(slurm, number), slurm, number, unbroken)
    assert state(slurm, number)["Restarts"] == "0"
    assert losses(workdir) == losses(unbroken)
    finished = [json.loads((folder / FINISHED).read_text()) for folder in (workdir, unbroken)]
    assert finished[0]["preference"]["values"] == finished[1]["preference"]["values"]


@pytest.mark.long
def test_a_sweep_of_two_groups_shares_its_caches_and_ends_with_a_table(slurm, tmp_path):
    config = tmp_path / "two_losses.py"
    config.write_text(
        (ROOT / "configs" / "reviews.py").read_text() + "\n\n"
        "def sweep():\n"
        "    losses, betas = ('dpo', 'hinge'), (0.1, 1.0)\n"
        "    return [{'preference.loss': x, 'preference.beta': b} for x in losses for b in betas]\n"
    )
    workdir = tmp_path / "sweep"
    changes = {key: x for key, x in TINY.items() if key == "compilation_cache"} | {"sft.steps": 2}
    numbers = launch(slurm, workdir, f"--config={config}", "--sweep", **changes)
    assert len(numbers) == 4  # SFT, two groups, the table
    wait_until(ended(slurm, numbers[-1]), slurm, numbers[-1], workdir)
    times = [state(slurm, number) for number in numbers]
    first, *groups, last = times
    for group in groups:
        assert first["EndTime"] <= group["StartTime"]
        assert group["EndTime"] <= last["StartTime"]
    with open(workdir / "sweep.csv") as file:
        rows = list(csv.DictReader(file))
    assert {(row["preference.loss"], row["preference.beta"]) for row in rows} == {
        (loss, beta) for loss in ("dpo", "hinge") for beta in ("0.1", "1.0")
    }
    assert (workdir / "sweep.png").stat().st_size > 10_000
    held_out = [losses(workdir / row["member"])[0][2] for row in rows]
    # The policy starts at the reference: DPO costs log 2 there, the hinge 1.
    want = [np.log(2) if row["preference.loss"] == "dpo" else 1.0 for row in rows]
    np.testing.assert_allclose(held_out, want, atol=1e-5)
    assert len(list(workdir.glob("tokens/*.arrow"))) == 2  # of SFT and of preferences, each once
    assert len(list(workdir.glob("reference_logprobs/*.npy"))) == 1
    again = subprocess.run(
        [sys.executable, str(ROOT / "scripts" / "launch.py"), "slurm", "--sweep"]
        + [f"--config={config}", f"--workdir={workdir}"]
        + [f"--config.{key}={value}" for key, value in (TINY | changes).items()],
        env=slurm,
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    )
    assert "all of it is done, nothing is launched" in again.stdout
