"""A plan's progress: time left from what was measured, and what a stop leaves behind."""

import os
import signal

import pytest

from dpojax.jobs.plan import (
    Job,
    Seconds,
    carry_out,
    progress_line,
    read_seconds,
    seconds_left,
)
from dpojax.training.loop import Preempted


@pytest.fixture
def jobs(tmp_path):
    """One SFT, two runs each of two methods, none of them done."""
    kinds = {"sft": "", "dpo-1": "dpo", "dpo-2": "dpo", "ppo-1": "ppo", "ppo-2": "ppo"}
    touch = lambda name: (tmp_path / name).touch
    return [Job(name, tmp_path / name, touch(name), kind) for name, kind in kinds.items()]


def test_nothing_is_said_of_the_time_left_before_a_job_is_done(jobs):
    assert seconds_left(jobs, {}) is None
    said = progress_line(jobs, Seconds(61.2, {"sft": 61.2}), doing=["sft"])
    assert said == "0/5 jobs  sft  1:01 passed"


def test_jobs_to_come_last_as_their_kind_did_or_else_as_all_did(jobs):
    for job in jobs[:2]:
        job.make()
    seconds = {"sft": 30.0, "dpo-1": 10.0}
    assert seconds_left(jobs, seconds) == 10 + 20 + 20  # a dpo, and two unknown of (30 + 10) / 2
    assert seconds_left(jobs, seconds, workers=2) == 25
    jobs[3].make()
    seconds |= {"ppo-1": 500.0}
    assert seconds_left(jobs, seconds) == 10 + 500
    seconds |= {"ppo-2": 200.0}  # under way
    assert seconds_left(jobs, seconds) == 10 + 300
    said = progress_line(jobs, Seconds(740.0, seconds), doing=["ppo-2"])
    assert said == "3/5 jobs  ppo-2  12:20 passed, about 5 min left"
    assert seconds_left(jobs, seconds, workers=2) == 300  # the longer of the two
    seconds |= {"ppo-2": 900.0}
    assert seconds_left(jobs, seconds) == 10


def test_every_job_is_done_once_and_what_it_prints_goes_to_its_log(jobs, tmp_path, capfd):
    jobs[1].make()
    first = jobs[0]._replace(make=lambda: (print("hello"), jobs[0].make()))
    carry_out([first, *jobs[1:]], tmp_path, "frontier")
    assert (tmp_path / "logs" / "sft.txt").read_text() == "hello\n"
    assert set(read_seconds(tmp_path).jobs) == {"sft", "dpo-2", "ppo-1", "ppo-2"}
    out, err = capfd.readouterr()
    assert out == ""
    assert "frontier 2/5 jobs  dpo-2" in err
    assert "frontier 5/5 jobs" in err


def test_what_a_job_raises_is_in_its_log_as_well(jobs, tmp_path):
    def broken():
        raise ValueError("no such film")

    with pytest.raises(ValueError, match="no such film"):
        carry_out([jobs[0]._replace(make=broken)], tmp_path, "frontier")
    assert "ValueError: no such film" in (tmp_path / "logs" / "sft.txt").read_text()


def test_a_sigterm_ends_the_plan_and_the_same_call_goes_on(jobs, tmp_path):
    def stopped():
        os.kill(os.getpid(), signal.SIGTERM)

    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(Preempted, match="frontier: stopped, what is done is kept"):
        carry_out([jobs[0], jobs[1]._replace(make=stopped)], tmp_path, "frontier")
    assert signal.getsignal(signal.SIGTERM) is before
    assert jobs[0].made.exists()
    assert not jobs[1].made.exists()
    passed, seconds = read_seconds(tmp_path)
    assert set(seconds) == {"sft", "dpo-1"}
    assert passed >= sum(seconds.values())
    carry_out(jobs, tmp_path, "frontier")
    assert read_seconds(tmp_path).passed > passed
    assert all(job.made.exists() for job in jobs)
