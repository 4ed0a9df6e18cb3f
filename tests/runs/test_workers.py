"""Jobs of a plan in processes of their own: their order, their cores, and how they end."""

import fcntl
import functools
import json
import os
import pathlib
import signal
import subprocess
import sys
import time

import pytest

from dpojax.config.checks import ConfigError
from dpojax.jobs.plan import Job, read_seconds
from dpojax.jobs.local_workers import carry_out
from dpojax.training.loop import Preempted, StopSignal

from .conftest import ROOT, environment

NEEDS = {"a": (), "b": ("a",), "c": ("a",), "d": ("b", "c")}


def jobs(folder: pathlib.Path) -> list[Job]:
    return [Job(name, folder / name, None, needs=needs) for name, needs in NEEDS.items()]


def note(folder: pathlib.Path, name: str) -> None:
    """The job: what was made before it, and where it ran; b waits until c is under way."""
    before = sorted(set(NEEDS) & set(os.listdir(folder)))
    (folder / f"{name}.begun").touch()
    if name == "b":
        wait_for(folder / "c.begun")
    cores = sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else [0]
    (folder / f"{name}.json").write_text(json.dumps([before, os.getpid(), cores]))
    (folder / name).touch()


def refuse(folder: pathlib.Path, name: str) -> None:
    if name == "b":
        raise ConfigError("config.preference.beta = 0.0: must be greater than 0")
    note(folder, name)


def die(folder: pathlib.Path, name: str) -> None:
    if name == "b":
        os.kill(os.getpid(), signal.SIGKILL)
    (folder / name).touch()


def fail_beside_one_that_saves(folder: pathlib.Path, name: str) -> None:
    """b fails while c trains, which ends in order when it is asked to."""
    if name == "b":
        wait_for(folder / "c.begun")
        raise ConfigError("b cannot be")
    if name == "c":
        with StopSignal() as stop:
            (folder / "c.begun").touch()
            while not stop.asked:
                time.sleep(0.05)
            time.sleep(0.5)
            (folder / "c.saved").touch()
            raise Preempted("c: stopped, saved")
    (folder / name).touch()


def stop_the_plan(folder: pathlib.Path, name: str) -> None:
    if name == "a":
        os.kill(os.getppid(), signal.SIGTERM)
        time.sleep(60)
    (folder / name).touch()


def linger(folder: pathlib.Path, name: str) -> None:
    """Locks a file as long as the process lives."""
    file = os.open(folder / "lock", os.O_CREAT | os.O_RDWR)
    fcntl.flock(file, fcntl.LOCK_EX)
    (folder / f"{name}.begun").touch()
    time.sleep(60)


def unlocked(path: pathlib.Path) -> bool:
    with open(path) as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
        return True


def wait_until(holds, seconds: float = 60) -> bool:
    until = time.monotonic() + seconds
    while not holds() and time.monotonic() < until:
        time.sleep(0.05)
    return holds()


def wait_for(path: pathlib.Path) -> None:
    wait_until(path.exists)


def plan(folder, run, workers=2):
    run = functools.partial(run, folder)
    carry_out(jobs(folder), folder, "frontier", run=run, workers=workers)


def test_jobs_run_beside_each_other_on_cores_of_their_own_and_after_what_they_need(tmp_path, capfd):
    plan(tmp_path, note)
    found = {name: json.loads((tmp_path / f"{name}.json").read_text()) for name in NEEDS}
    assert found["a"][0] == []
    assert found["b"][0] == ["a"]  # c was under way, not done
    assert found["d"][0] == ["a", "b", "c"]
    assert found["b"][1] != found["c"][1]
    assert os.getpid() not in {pid for _, pid, _ in found.values()}
    if hasattr(os, "sched_getaffinity") and len(own := os.sched_getaffinity(0)) > 1:
        b, c = (set(found[name][2]) for name in "bc")
        assert b | c == own
        assert not b & c
    assert set(read_seconds(tmp_path).jobs) == set(NEEDS)
    assert "frontier 4/4 jobs" in capfd.readouterr().err


def see_who_began(folder: pathlib.Path, name: str) -> None:
    """b1, the first of its kind, lasts until another job has begun."""
    begun = lambda: sorted(path.stem for path in folder.glob("*.begun"))
    (folder / f"{name}.begun").write_text(" ".join(begun()))
    if name == "b1":
        assert wait_until(lambda: len(begun()) > 1)
    (folder / name).touch()


@pytest.mark.parametrize(
    ("kinds", "parts", "second"),
    [
        ({"b1": "b", "b2": "b", "c": "c"}, False, "c"),
        ({"b1": "b", "b2": "b"}, False, "b2"),  # no core waits for a compilation
        ({"b1": "b", "b2": "b", "c": "c"}, True, "b2"),
    ],
    ids=["another kind", "no other kind", "parts of one job"],
)
def test_beside_the_first_job_of_a_kind_one_of_another_kind_goes_first(
    tmp_path, kinds, parts, second
):
    """It compiles what the others of its kind read from disk."""
    planned = [Job(x, tmp_path / x, None, kind, part=parts) for x, kind in kinds.items()]
    run = functools.partial(see_who_began, tmp_path)
    carry_out(planned, tmp_path, "frontier", run=run, workers=2)
    assert all(job.made.exists() for job in planned)
    others = {*kinds} - {"b1", second}
    assert all(second in (tmp_path / f"{name}.begun").read_text() for name in others)


def test_what_a_job_raises_comes_out_and_the_same_call_goes_on(tmp_path):
    with pytest.raises(ConfigError, match=r"beta = 0\.0"):
        plan(tmp_path, refuse)
    assert not (tmp_path / "d").exists()
    plan(tmp_path, note)
    assert all((tmp_path / name).exists() for name in NEEDS)


def test_a_job_that_fails_lets_the_others_save_first(tmp_path):
    with pytest.raises(ConfigError, match="b cannot be"):
        plan(tmp_path, fail_beside_one_that_saves)
    assert (tmp_path / "c.saved").exists()
    assert set(read_seconds(tmp_path).jobs) == {"a", "b", "c"}


def test_a_killed_process_is_told_with_all_that_was_under_way(tmp_path):
    with pytest.raises(ChildProcessError, match=r"killed.* while .*b.* under way.*--workers=1"):
        plan(tmp_path, die)


def test_a_sigterm_stops_the_processes_too(tmp_path):
    began = time.monotonic()
    with pytest.raises(Preempted, match="frontier: stopped, what is done is kept"):
        plan(tmp_path, stop_the_plan)
    assert time.monotonic() - began < 50
    assert not (tmp_path / "a").exists()
    assert set(read_seconds(tmp_path).jobs) == {"a"}


def test_processes_end_with_a_parent_that_was_killed(tmp_path):
    plan_it = "import pathlib; from tests.runs.test_workers import linger, plan; "
    plan_it += f"plan(pathlib.Path({str(tmp_path)!r}), linger)"
    parent = subprocess.Popen([sys.executable, "-c", plan_it], cwd=ROOT, env=environment())
    wait_for(tmp_path / "a.begun")
    assert not unlocked(tmp_path / "lock")
    parent.kill()
    parent.wait()
    assert wait_until(lambda: unlocked(tmp_path / "lock"), 30)
