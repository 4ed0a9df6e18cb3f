"""A job is data: what is written as JSON runs by hand, and failures stop what needs them."""

import json
import os
import pathlib
import subprocess
import sys

import pytest

from dpojax.jobs import in_process
from dpojax.jobs.job import Job, command, execute, job_from_json, pending, plan_as_json

from ..runs.conftest import ROOT, environment
from .small_jobs import diamond, job


def test_a_job_of_several_outputs_has_ended_where_each_is_there_or_has_failed(tmp_path):
    names = ("a", "b", "c")
    group = job(tmp_path, "group")._replace(
        outputs=tuple(str(tmp_path / name) for name in names),
        failure_files=tuple(str(tmp_path / f"{name}.failed") for name in names),
    )
    after = job(tmp_path, "after", needs=("group",))
    for made in ("a", "b.failed"):
        (tmp_path / made).touch()
        assert pending([group, after]) == [group, after]
    (tmp_path / "c").touch()
    assert pending([group, after]) == []  # it has failed, and what needs it is left out
    (tmp_path / "b").touch()
    assert pending([group, after]) == [after]


def test_a_plan_comes_back_from_json_as_it_was(tmp_path):
    folder = tmp_path / "with a space"
    jobs = diamond(folder)
    jobs.append(
        job(
            folder,
            "e",
            kind="e's",
            is_part=True,
            needs_devices=False,
            failure_files=(str(folder / "e.failed"),),
        )
    )
    jobs.append(job(folder, "f", needs_devices=False))
    assert list(map(job_from_json, json.loads(json.dumps(plan_as_json(jobs))))) == jobs


def test_the_command_in_a_plan_runs_by_hand(tmp_path):
    folder = tmp_path / "with a space"
    folder.mkdir()
    (line,) = (values["command"] for values in plan_as_json([job(folder, "a", "say_hello")]))
    assert line.startswith("python -m tests.jobs.small_jobs --do=say_hello ")
    path = os.pathsep.join([str(pathlib.Path(sys.executable).parent), os.environ["PATH"]])
    done = subprocess.run(
        line,
        shell=True,
        cwd=ROOT,
        env=environment() | {"PATH": path},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert (done.returncode, done.stdout) == (0, "hello\n"), done.stderr
    assert (folder / "a").exists()


def test_options_that_say_nothing_are_left_out_of_a_command():
    assert command("m", config="c.json", step=0, stage="", out=None) == (
        *("python", "-m", "m"),
        *("--config=c.json", "--step=0"),
    )


@pytest.mark.parametrize(
    "other", [("rm", "-r", "folder"), ("python", "train.py"), ("python", "-m"), ()]
)
def test_a_command_that_is_not_of_a_python_module_is_refused(other):
    with pytest.raises(ValueError, match="job a: its command has to begin with python -m MODULE"):
        execute(Job("a", other))


def test_what_needs_a_job_that_failed_is_not_started(tmp_path):
    a, b, c, d = diamond(tmp_path)
    b = b._replace(failure_files=(str(tmp_path / "b.failed"),))
    e = job(tmp_path, "e", needs=("d",))
    jobs = [a, b, c, d, e]
    assert pending(jobs) == jobs
    (tmp_path / "a").touch()
    (tmp_path / "b.failed").touch()
    assert pending(jobs) == [c]
    (tmp_path / "b").touch()  # it was mended by hand
    assert pending(jobs) == [c, d, e]


def test_a_failure_file_lets_the_others_go_on_and_the_job_is_not_tried_again(tmp_path):
    a, b, c, d = (
        job(tmp_path, "a"),
        job(tmp_path, "b", "fail_and_say_so", failure_files=(str(tmp_path / "b.failed"),)),
        job(tmp_path, "c", needs=("a",)),
        job(tmp_path, "d", needs=("b", "c")),
    )
    for _ in range(2):
        in_process.run_jobs([a, b, c, d], tmp_path, "frontier")
        assert [one.is_done for one in (a, b, c, d)] == [True, False, True, False]
    log = (tmp_path / "logs" / "b.txt").read_text()
    assert log.count("FloatingPointError: the loss was NaN") == 1
    assert not (tmp_path / "logs" / "d.txt").exists()


def test_without_a_failure_file_the_same_failure_ends_the_plan(tmp_path):
    jobs = [job(tmp_path, "b", "fail_and_say_so"), job(tmp_path, "c")]
    with pytest.raises(FloatingPointError, match="the loss was NaN"):
        in_process.run_jobs(jobs, tmp_path, "frontier")
    assert not (tmp_path / "c").exists()


def test_a_job_that_ends_without_its_output_is_not_called_for_ever(tmp_path):
    jobs = [job(tmp_path, "a", "forget_the_output"), job(tmp_path, "b")]
    with pytest.raises(RuntimeError, match=rf"job a: .*{tmp_path}/a"):
        in_process.run_jobs(jobs, tmp_path, "frontier")
    assert (tmp_path / "a.calls").read_text() == "called\n"


def test_jobs_done_aloud_print_to_the_terminal(tmp_path, capsys):
    failing = job(tmp_path, "b", "fail_and_say_so", failure_files=(str(tmp_path / "b.failed"),))
    in_process.run_jobs_in_terminal([job(tmp_path, "a", "say_hello"), failing, job(tmp_path, "c")])
    assert capsys.readouterr().out == "hello\n"
    assert (tmp_path / "c").exists()
    assert not (tmp_path / "logs").exists()
