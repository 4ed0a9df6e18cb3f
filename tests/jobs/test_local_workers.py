"""Jobs of a plan in processes of their own: their order, their cores, and how they end."""

import fcntl
import json
import os
import pathlib
import signal
import subprocess
import sys
import time

import pytest

from dpojax.config.errors import ConfigError
from dpojax.jobs import local_workers
from dpojax.jobs.local_workers import next_job, run_jobs
from dpojax.jobs.progress import read_seconds
from dpojax.training.preemption import Preempted

from ..runs.conftest import ROOT, environment
from .small_jobs import DIAMOND, diamond, job, wait_for, wait_until


def run(folder: pathlib.Path, workers: int = 2, **do: str) -> None:
    """Carries out the diamond, where `do` says what a job does that is not `note`."""
    run_jobs(diamond(folder, **do), folder, "frontier", workers=workers)


def unlocked(path: pathlib.Path) -> bool:
    with open(path) as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
        return True


def test_jobs_run_beside_each_other_on_cores_of_their_own_and_after_what_they_need(tmp_path, capfd):
    run(tmp_path)
    notes = {name: json.loads((tmp_path / f"{name}.json").read_text()) for name in DIAMOND}
    assert notes["a"][0] == []
    assert notes["b"][0] == ["a"]  # c was under way, not done
    assert notes["d"][0] == ["a", "b", "c"]
    assert notes["b"][1] != notes["c"][1]
    assert os.getpid() not in {pid for _, pid, _ in notes.values()}
    if hasattr(os, "sched_getaffinity") and len(cores := os.sched_getaffinity(0)) > 1:
        b, c = (set(notes[name][2]) for name in "bc")
        assert b | c == cores
        assert not b & c
    assert set(read_seconds(tmp_path).jobs) == set(DIAMOND)
    assert "frontier 4/4 jobs" in capfd.readouterr().err


@pytest.mark.slow
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
    jobs = [
        job(tmp_path, name, "see_who_began", kind=kind, is_part=parts)
        for name, kind in kinds.items()
    ]
    run_jobs(jobs, tmp_path, "frontier", workers=2)
    assert all(one.is_done for one in jobs)
    others = {*kinds} - {"b1", second}
    assert all(second in (tmp_path / f"{name}.begun").read_text() for name in others)


def test_what_needs_a_job_waits_for_its_end_and_not_for_its_first_file(tmp_path):
    first = job(tmp_path, "first")
    second = job(tmp_path, "second", needs=("first",))
    (tmp_path / "first").touch()  # on a bucket a folder is there with its first file
    assert next_job([first, second], running=[first]) is None
    assert next_job([first, second], running=[]) == second


@pytest.mark.slow
def test_what_a_job_raises_comes_out_and_the_same_call_goes_on(tmp_path):
    with pytest.raises(ConfigError, match=r"beta = 0\.0"):
        run(tmp_path, b="refuse")
    assert not (tmp_path / "d").exists()
    run(tmp_path)
    assert all((tmp_path / name).exists() for name in DIAMOND)


@pytest.mark.slow
def test_a_job_that_fails_lets_the_others_save_first(tmp_path):
    with pytest.raises(ConfigError, match="b cannot be"):
        run(tmp_path, a="touch", b="fail_beside_another", c="train_until_asked_to_stop")
    assert (tmp_path / "c.saved").exists()
    assert set(read_seconds(tmp_path).jobs) == {"a", "b", "c"}


@pytest.mark.slow
def test_a_job_with_a_failure_file_lets_the_others_go_on(tmp_path):
    a, b, c, d = diamond(tmp_path, b="fail_and_say_so", c="touch")
    b = b._replace(failure_files=(str(tmp_path / "b.failed"),))
    run_jobs([a, b, c, d], tmp_path, "frontier", workers=2)
    assert [one.is_done for one in (a, b, c, d)] == [True, False, True, False]
    assert "FloatingPointError: the loss was NaN" in (tmp_path / "logs" / "b.txt").read_text()
    assert not (tmp_path / "logs" / "d.txt").exists()


def test_a_job_that_ends_without_its_output_is_an_error_that_names_both(tmp_path):
    forgetful = job(tmp_path, "a", "forget_the_output")
    with pytest.raises(RuntimeError, match=rf"job a: .*{tmp_path}/a"):
        run_jobs([forgetful], tmp_path, "frontier", workers=1)
    assert (tmp_path / "a.calls").read_text() == "called\n"


@pytest.mark.slow
def test_a_killed_process_is_told_with_all_that_was_under_way(tmp_path):
    with pytest.raises(ChildProcessError, match=r"killed.* while .*b.* under way.*--workers=1"):
        run(tmp_path, a="touch", b="die", c="touch")


@pytest.mark.slow
def test_a_sigterm_stops_the_processes_too(tmp_path):
    began = time.monotonic()
    with pytest.raises(Preempted, match="frontier: stopped by SIGTERM, what is done is kept"):
        run(tmp_path, a="stop_the_plan")
    assert time.monotonic() - began < 50
    assert not (tmp_path / "a").exists()
    assert set(read_seconds(tmp_path).jobs) == {"a"}


def test_what_a_terminal_sends_reaches_no_process_that_is_started_and_the_parent_afterwards():
    came = []
    before = signal.signal(signal.SIGHUP, lambda number, _: came.append(number))
    shows = "import signal; print(sorted(signal.pthread_sigmask(signal.SIG_BLOCK, ())))"
    try:
        with local_workers._shielded():
            signal.raise_signal(signal.SIGHUP)
            assert not came
            told = subprocess.run([sys.executable, "-c", shows], capture_output=True, text=True)
        assert came == [signal.SIGHUP]
    finally:
        signal.signal(signal.SIGHUP, before)
    assert told.stdout.count("SIGHUP") == told.stdout.count("SIGINT") == 1
    assert "SIGTERM" not in told.stdout
    assert not signal.pthread_sigmask(signal.SIG_BLOCK, ())


@pytest.mark.slow
def test_processes_end_with_a_parent_that_was_killed(tmp_path):
    plan = "import pathlib; from tests.jobs.test_local_workers import run; "
    plan += f"run(pathlib.Path({str(tmp_path)!r}), a='linger')"
    parent = subprocess.Popen([sys.executable, "-c", plan], cwd=ROOT, env=environment())
    wait_for(tmp_path / "a.begun")
    assert not unlocked(tmp_path / "lock")
    parent.kill()
    parent.wait()
    assert wait_until(lambda: unlocked(tmp_path / "lock"), 30)
