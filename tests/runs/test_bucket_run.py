"""A run, its resume, a sweep, a frontier and an export on a bucket are what they are on a disk.

The bucket is that of an emulator, which speaks the protocol of Google Cloud Storage.
"""

import os
import shutil
import subprocess
import sys

import numpy as np
import pytest
from safetensors.numpy import load_file

from dpojax import storage
from dpojax.frontier import frontier, results
from dpojax.frontier.runs import Run
from dpojax.jobs.job import Job, execute
from dpojax.runs.export import export
from dpojax.runs.policy import load_policy
from dpojax.runs.run import run
from dpojax.sweeps.launched import begin_sweep
from dpojax.sweeps.plan import read_plan
from dpojax.sweeps.sweep import run_sweep
from dpojax.training.metrics import read_metrics
from tests.gcs import bucket, gcs_emulator  # noqa: F401 (fixtures)

pytestmark = pytest.mark.slow
DEVICES = 1
SPEEDS = ("perf/", "goodput/", "memory/", "time")


@pytest.fixture
def folder(bucket, tmp_path, monkeypatch):  # noqa: F811
    monkeypatch.setenv("DPOJAX_MIRROR", str(tmp_path / "mirror"))
    monkeypatch.chdir(tmp_path)
    return storage.as_path(bucket)


def measured(workdir, stage="preference"):
    """The lines of metrics.jsonl without speeds."""
    return [
        {name: x for name, x in line.items() if not name.startswith(SPEEDS)}
        for line in read_metrics(workdir / stage)
    ]


def weights(exported):
    return load_file(storage.local_copy(exported / "model.safetensors"))


def remove_end(workdir):
    """The run as it was after step 4 of 6."""
    storage.remove_folder(workdir / "preference" / "checkpoints" / "6")
    (workdir / "finished.json").unlink()


def test_a_run_a_resume_and_an_export_equal_those_on_a_disk(folder, tiny, tmp_path):
    local = storage.as_path(tmp_path / "local")
    for workdir in (local, folder / "run"):
        run(tiny(trackers=("tensorboard",)), workdir)
        export(workdir, workdir.parent / f"{workdir.name}_exported")
    assert measured(folder / "run") == measured(local)
    remove_end(folder / "run")
    run(tiny(trackers=("tensorboard",)), folder / "run")
    resumed, whole = measured(folder / "run"), measured(local)
    assert [(x["step"], x["split"]) for x in resumed] == [(x["step"], x["split"]) for x in whole]
    export(folder / "run", folder / "resumed_exported")
    for name in ("run_exported", "resumed_exported"):
        ours, theirs = weights(folder / name), weights(local.parent / "local_exported")
        assert ours.keys() == theirs.keys()
        for key in ours:
            np.testing.assert_array_equal(ours[key], theirs[key])
    policies = load_policy(f"{folder}/run:preference"), load_policy(f"{folder}/run_exported")
    assert policies[0].model.config == policies[1].model.config
    assert (folder / "run" / "preference" / "tensorboard").is_dir()
    assert not list(tmp_path.glob("gs:*"))


@pytest.mark.long
def test_a_sweep_on_a_bucket_trains_what_it_trains_on_a_disk(folder, tiny, tmp_path):
    members = [{"preference.beta": 0.1}, {"preference.beta": 3.0}]
    for workdir in (tmp_path / "sweep", folder / "sweep"):
        assert run_sweep(tiny(), members, workdir) == {}
    for name in ("beta-0.1", "beta-3"):
        ours = measured(folder / "sweep" / name)
        assert ours == measured(storage.as_path(tmp_path / "sweep" / name))
    ours, theirs = (
        (place / "sweep" / "sweep.csv").read_text() for place in (folder, storage.as_path(tmp_path))
    )
    assert ours == theirs
    plan = storage.read_json(folder / "sweep" / "sweep.json")
    assert [Job(**job).outputs for job in plan["jobs"]] == [
        [f"{folder}/sweep/{name}/finished.json" for name in ("beta-0.1", "beta-3")]
    ]


@pytest.mark.long
def test_a_frontier_goes_to_the_bucket_and_makes_no_folder_of_that_name(folder, tiny, tmp_path):
    changes = {
        "frontier.count": 12,
        "frontier.completions": 2,
        "frontier.reference_samples": 32,
        "frontier.best_of_n": (2, 4),
        "samples.count": 4,
        "samples.per_prompt": 2,
        "samples.max_new_tokens": 8,
        "frontier.truncated": "keep",
        "preference.data.eval_share": 0.3,
        "preference.data.limit": 0,
        "preference.steps": 2,
    }
    runs = [Run("dpo", "beta=0.1", {"preference.beta": 0.1})]
    made = frontier.make_frontier(tiny(**changes), runs, f"{folder}/frontier")
    assert made == folder / "frontier"
    results.write(made)
    names = {path.name for path in made.iterdir()}
    assert {"plan.json", "frontier.csv", "frontier.png", "report.md", "policy", "runs"} <= names
    assert (made / "logs" / "sft.txt").read_text()
    assert not list(tmp_path.glob("gs:*"))
    shutil.rmtree(tmp_path / "mirror")  # mirrors may go at any time
    assert results.collect(made)[0]


@pytest.mark.long
def test_the_jobs_of_a_launched_sweep_on_a_bucket_train_what_they_train_on_a_disk(
    folder, tiny, tmp_path
):
    members = [{"preference.loss": loss} for loss in ("dpo", "hinge")]  # a group each
    local = storage.as_path(tmp_path / "launched")
    for sweep in (local, folder / "launched"):
        for job in begin_sweep(tiny(), members, sweep):
            execute(job)
        assert begin_sweep(tiny(), members, sweep) == []
    for name in read_plan(local)["members"]:
        assert measured(folder / "launched" / name) == measured(local / name)


HITS = """
import jax
import jax.numpy as jnp

hits = []
jax.monitoring.register_event_listener(
    lambda event, **_: hits.append(event) if event.endswith("/cache_hits") else None
)
jax.jit(lambda x: jnp.sin(x) @ jnp.cos(x))(jnp.ones((8, 8))).block_until_ready()
print(len(hits))
"""


def test_programs_that_jax_keeps_on_a_bucket_are_read_by_another_process(folder):
    place = {"JAX_COMPILATION_CACHE_DIR": str(folder / "compiled")}
    least = {"JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0"}
    hits = []
    for _ in range(2):
        command = [sys.executable, "-W", "error", "-c", HITS]
        environment = os.environ | place | least
        ended = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60)
        assert ended.returncode == 0, ended.stderr
        hits.append(int(ended.stdout))
    assert hits[0] == 0
    assert hits[1] > 0
