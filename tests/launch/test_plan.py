"""A plan's progress: time left from what was measured, and what a stop leaves behind."""

import json
import os
import signal

import pytest

from dpojax.launch.plan import Job, carry_out, progress_line, read_seconds, seconds_left
from dpojax.training.loop import Preempted


@pytest.fixture
def jobs(tmp_path):
    """One SFT, two runs each of two methods, none of them done."""
    kinds = {"sft": "", "dpo-1": "dpo", "dpo-2": "dpo", "ppo-1": "ppo", "ppo-2": "ppo"}
    touch = lambda name: (tmp_path / name).touch
    return [Job(name, tmp_path / name, touch(name), kind) for name, kind in kinds.items()]


def test_nothing_is_said_of_the_time_left_before_a_job_is_done(jobs):
    assert seconds_left(jobs, {}) is None
    said = progress_line(jobs, {"sft": 61.2}, doing=["sft"], passed=61.2)
    assert said == "0/5 jobs  sft  1:01 passed"


def test_jobs_to_come_last_as_their_kind_did_or_else_as_all_did(jobs):
    for job in jobs[:2]:
        job.make()
    seconds = {"sft": 30.0, "dpo-1": 10.0}
    assert seconds_left(jobs, seconds) == 10 + 20 + 20  # a dpo, and two unknown of (30 + 10) / 2
    jobs[3].make()
    seconds |= {"ppo-1": 500.0}
    assert seconds_left(jobs, seconds) == 10 + 500
    seconds |= {"ppo-2": 200.0}  # under way
    assert seconds_left(jobs, seconds) == 10 + 300
    said = progress_line(jobs, seconds, doing=["ppo-2"], passed=740.0)
    assert said == "3/5 jobs  ppo-2  12:20 passed, about 5 min left"
    said = progress_line(jobs, seconds, doing=["dpo-2", "ppo-2"], passed=740.0, workers=2)
    assert said == "3/5 jobs  dpo-2  ppo-2  12:20 passed, about 3 min left"
    seconds |= {"ppo-2": 900.0}
    assert seconds_left(jobs, seconds) == 10


def test_every_job_is_done_once_and_what_it_prints_goes_to_its_log(jobs, tmp_path, capfd):
    jobs[1].make()
    first = jobs[0]._replace(make=lambda: (print("hello"), jobs[0].make()))
    carry_out([first, *jobs[1:]], tmp_path, "frontier")
    assert (tmp_path / "logs" / "sft.txt").read_text() == "hello\n"
    assert set(read_seconds(tmp_path)) == {"sft", "dpo-2", "ppo-1", "ppo-2"}
    out, err = capfd.readouterr()
    assert out == ""
    assert "frontier 2/5 jobs  dpo-2" in err
    assert "frontier 5/5 jobs" in err


def test_a_sigterm_ends_the_plan_and_the_same_call_goes_on(jobs, tmp_path):
    def stopped():
        os.kill(os.getpid(), signal.SIGTERM)

    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(Preempted, match="frontier: stopped, what is done is kept"):
        carry_out([jobs[0], jobs[1]._replace(make=stopped)], tmp_path, "frontier")
    assert signal.getsignal(signal.SIGTERM) is before
    assert jobs[0].made.exists()
    assert not jobs[1].made.exists()
    assert set(json.loads((tmp_path / "seconds.json").read_text())) == {"sft", "dpo-1"}
    carry_out(jobs, tmp_path, "frontier")
    assert all(job.made.exists() for job in jobs)
