"""Groups that start together make each cache once, and begin with stages that one job trained."""

import json
import threading

import numpy as np
import pytest

from dpojax import storage
from dpojax.config.errors import ConfigError
from dpojax.jobs.job import execute, plan_as_json
from dpojax.plans.after import jobs_of, wait_and_run
from dpojax.runs.workdirs import FINISHED
from dpojax.sweeps.launched import begin_sweep
from dpojax.sweeps.plan import PLAN, read_plan
from dpojax.sweeps.sweep import run_sweep
from dpojax.training import reference

from ..jobs.small_jobs import job as small_job
from ..runs.conftest import few_devices, lines, tiny_config  # noqa: F401 (a fixture)

MEMBERS = [
    {"preference.loss": loss, "preference.beta": beta}
    for loss in ("dpo", "hinge")
    for beta in (0.1, 1.0)
]
SHORT = {"sft.steps": 2, "preference.steps": 2, "evaluate_every": 2}


@pytest.fixture(scope="module")
def swept(tmp_path_factory):
    """A sweep's folder, whose jobs were executed in turn; and what was trained, and made."""
    folder, made = tmp_path_factory.mktemp("launched") / "sweep", []
    jobs = begin_sweep(tiny_config(**SHORT), MEMBERS, str(folder))
    compute = reference.compute

    def noted(*arguments):
        made.append("reference")
        return compute(*arguments)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(reference, "compute", noted)
        for job in jobs:
            execute(job)
    return folder, jobs, made


@pytest.mark.long
def test_two_groups_begin_with_one_sft(swept):
    folder, jobs, _ = swept
    assert [job.needs for job in jobs] == [
        (),
        (jobs[0].name,),
        (jobs[0].name,),
        (jobs[1].name, jobs[2].name),
    ]
    (beginning,) = (folder / "beginnings").iterdir()
    assert (beginning / FINISHED).exists()
    members = read_plan(folder)["members"]
    assert len(members) == 4
    for name in members:
        assert lines(folder / name, "sft") == lines(beginning, "sft")  # speeds are equal, too
        assert (folder / name / FINISHED).exists()


@pytest.mark.long
def test_groups_share_what_was_tokenised_and_what_the_reference_scored(swept):
    folder, _, made = swept
    assert len(list(folder.glob("tokens/*.arrow"))) == 2
    assert len(list(folder.glob("reference_logprobs/*.npy"))) == 1
    assert made == ["reference"]


@pytest.mark.long
def test_the_last_job_shows_all_members(swept):
    folder = swept[0]
    table = (folder / "sweep.csv").read_text().splitlines()
    assert [line.split(",")[0] for line in table] == ["member", *read_plan(folder)["members"]]
    assert (folder / "sweep.png").stat().st_size > 10_000


@pytest.mark.long
def test_a_sweep_that_is_done_has_no_jobs_left(swept):
    folder = swept[0]
    assert begin_sweep(tiny_config(**SHORT), MEMBERS, str(folder)) == []
    assert json.loads((folder / PLAN).read_text())["jobs"] == []


@pytest.mark.long
def test_the_weights_are_those_of_a_sweep_in_one_process(swept, tmp_path):
    run_sweep(tiny_config(**SHORT), MEMBERS[2:], str(tmp_path / "sweep"))
    for name in ("beta-0.1", "beta-1"):
        name = next(x for x in read_plan(tmp_path / "sweep")["members"] if name in x)
        ours, theirs = (
            [line["loss"] for line in lines(folder / name, "preference") if "loss" in line]
            for folder in (swept[0], tmp_path / "sweep")
        )
        np.testing.assert_allclose(ours, theirs, rtol=1e-5)


# A job that waits where the engine does not.


def test_a_job_waits_for_what_it_needs_and_says_for_whom(tmp_path, capsys):
    slow, last = small_job(tmp_path, "slow"), small_job(tmp_path, "last", needs=("slow",))
    storage.write_json(
        storage.as_path(tmp_path / "plan.json"), {"jobs": plan_as_json([slow, last])}
    )
    jobs = jobs_of(storage.as_path(tmp_path / "plan.json"))
    assert jobs == [slow, last]
    timer = threading.Timer(0.3, (tmp_path / "slow").touch)
    timer.start()
    wait_and_run(jobs, "last", seconds=0.05)
    timer.join()
    assert (tmp_path / "last").exists()
    assert capsys.readouterr().out == "last: waits for slow\n"


def test_a_job_does_not_wait_for_one_that_failed_by_itself(tmp_path):
    failed = small_job(tmp_path, "a", failure_files=(str(tmp_path / "a.failed"),))
    (tmp_path / "a.failed").touch()
    wait_and_run([failed, small_job(tmp_path, "last", needs=("a",))], "last")
    assert (tmp_path / "last").exists()


def test_a_job_that_the_plan_does_not_have_is_refused(tmp_path):
    with pytest.raises(ConfigError, match="no job 'b'; it has a"):
        wait_and_run([small_job(tmp_path, "a")], "b")
    with pytest.raises(ConfigError, match="no job 'c'; it has a"):
        wait_and_run([small_job(tmp_path, "a", needs=("c",))], "a")
