"""A plan's progress: time left from what was measured, and what a stop leaves behind."""

import pathlib
import signal

import pytest

from dpojax.jobs.in_process import run_jobs
from dpojax.jobs.job import Job, pending
from dpojax.jobs.progress import Seconds, progress_line, read_seconds, seconds_left
from dpojax.training.preemption import Preempted

from .small_jobs import job

KINDS = {"sft": "", "dpo-1": "dpo", "dpo-2": "dpo", "ppo-1": "ppo", "ppo-2": "ppo"}


@pytest.fixture
def jobs(tmp_path) -> list[Job]:
    """One SFT, two runs each of two methods, none of them done."""
    return [job(tmp_path, name, kind=kind) for name, kind in KINDS.items()]


def finish(done: Job) -> None:
    pathlib.Path(done.outputs[0]).touch()


def test_nothing_is_said_of_the_time_left_before_a_job_is_done(jobs):
    assert seconds_left(jobs, {}, jobs, workers=1) is None
    line = progress_line(jobs, Seconds(61.2, {"sft": 61.2}), jobs, running=["sft"], workers=1)
    assert line == "0/5 jobs  sft  1:01 passed"


def test_jobs_to_come_last_as_their_kind_did_or_else_as_all_did(jobs):
    for done in jobs[:2]:
        finish(done)
    seconds = {"sft": 30.0, "dpo-1": 10.0}
    one_dpo_two_unknown = 10 + 2 * (30 + 10) / 2
    assert seconds_left(jobs, seconds, pending(jobs), workers=1) == one_dpo_two_unknown
    assert seconds_left(jobs, seconds, pending(jobs), workers=2) == 25
    finish(jobs[3])
    seconds |= {"ppo-1": 500.0}
    assert seconds_left(jobs, seconds, pending(jobs), workers=1) == 10 + 500
    seconds |= {"ppo-2": 200.0}  # under way
    assert seconds_left(jobs, seconds, pending(jobs), workers=1) == 10 + 300
    line = progress_line(jobs, Seconds(740.0, seconds), pending(jobs), running=["ppo-2"], workers=1)
    assert line == "3/5 jobs  ppo-2  12:20 passed, about 5 min left"
    assert seconds_left(jobs, seconds, pending(jobs), workers=2) == 300  # the longer of the two
    seconds |= {"ppo-2": 900.0}
    assert seconds_left(jobs, seconds, pending(jobs), workers=1) == 10


def test_every_job_is_done_once_and_what_it_prints_goes_to_its_log(jobs, tmp_path, capfd):
    finish(jobs[1])
    first = job(tmp_path, "sft", "say_hello")
    run_jobs([first, *jobs[1:]], tmp_path, "frontier")
    assert (tmp_path / "logs" / "sft.txt").read_text() == "hello\n"
    assert set(read_seconds(tmp_path).jobs) == {"sft", "dpo-2", "ppo-1", "ppo-2"}
    out, err = capfd.readouterr()
    assert out == ""
    assert "frontier 2/5 jobs  dpo-2" in err
    assert "frontier 5/5 jobs" in err


def test_what_a_job_raises_is_in_its_log_as_well(tmp_path):
    with pytest.raises(ValueError, match=r"beta = 0\.0"):
        run_jobs([job(tmp_path, "sft", "refuse")], tmp_path, "frontier")
    log = (tmp_path / "logs" / "sft.txt").read_text()
    assert "ConfigError: config.preference.beta = 0.0: must be greater than 0" in log


def test_a_sigterm_ends_the_plan_and_the_same_call_goes_on(jobs, tmp_path):
    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(Preempted, match="frontier: stopped by SIGTERM, what is done is kept"):
        run_jobs([jobs[0], job(tmp_path, "dpo-1", "stop_itself")], tmp_path, "frontier")
    assert signal.getsignal(signal.SIGTERM) is before
    assert jobs[0].is_done
    assert not jobs[1].is_done
    passed, seconds = read_seconds(tmp_path)
    assert set(seconds) == {"sft", "dpo-1"}
    assert passed >= sum(seconds.values())
    run_jobs(jobs, tmp_path, "frontier")
    assert read_seconds(tmp_path).passed > passed
    assert all(one.is_done for one in jobs)
