"""scripts/launch.py writes files that their engines take, with the jobs' own commands in them."""

import argparse
import json
import pathlib
import re
import shlex
import stat
import subprocess

import pytest
import yaml

from dpojax import peers, stopping
from dpojax.config.command_line import UsageError
from dpojax.config.errors import ConfigError
from dpojax.jobs.job import Job, command
from dpojax.launching import engine, launch
from dpojax.launching.engine import Launch, dns_name, engines

from ..runs.conftest import ROOT, TINY
from .schemas import JOBSET, TASK, check

OPTIONS = {
    "slurm": ("--nodes=2", "--gpus_per_node=8", "--time=1:00:00", "--sbatch=--constraint=h100"),
    "xpk": ("--cluster=c", "--tpu_type=v5litepod-256", "--capacity=spot", "--project=p"),
    "jobset": ("--image=i", "--hosts=4", "--gpus_per_host=8", "--queue=q", "--namespace=n"),
    "tpu-vm": ("--tpu=t", "--zone=z"),
    "skypilot": ("--accelerators=H100:8", "--num_nodes=2", "--spot", "--infra=gcp"),
}
JOBSET_ON_TPUS = ("--image=i", "--hosts=4", "--slices=2", "--tpus_per_host=4")
JOBSET_ON_TPUS += ("--tpu_accelerator=tpu-v6e-slice", "--tpu_topology=4x4")
VARIANTS = [*OPTIONS.items(), ("jobset", JOBSET_ON_TPUS)]
VARIANTS += [("xpk", ("--cluster=c", "--device_type=h100-80gb-8", "--num_nodes=2"))]
CONFIG = f"--config={ROOT / 'configs' / 'reviews.py'}"
KEYS = tuple(f"--config.{key}={value}" for key, value in TINY.items())


class Written:
    """What a call wrote.

    Attributes:
      text: of the file.
      printed: by the call.
    """

    def __init__(self, text: str, printed: str):
        self.text, self.printed = text, printed


@pytest.fixture
def write(tmp_path, monkeypatch, capsys):
    """Calls scripts/launch.py's function in the root of the repository."""
    monkeypatch.chdir(ROOT)

    def call(name: str, *words: str, workdir=tmp_path / "run", config: str = CONFIG) -> Written:
        file = tmp_path / "file"
        arguments = [name, config, f"--workdir={workdir}", f"--out={file}", *words]
        assert launch.launch(arguments) == 0
        return Written(file.read_text(), capsys.readouterr().out)

    return call


def parsed(name: str, options) -> argparse.Namespace:
    return launch.parse([name, CONFIG, "--workdir=w", *options]).options


def of_jobs(name: str, options, jobs, **fields) -> str:
    """The file for jobs of a test."""
    launched = Launch("a sweep", tuple(jobs), plan="gs://b/sweep.json", **fields)
    return engines()[name].text(launched, parsed(name, options))


def diamond() -> list[Job]:
    """A beginning, two groups after it, and a last job without devices."""
    word = 'it\'s $HOME "here"; rm -rf *'
    jobs = [Job("sft", command("m", member=word))]
    jobs += [Job(x, command("m", members=x), needs=("sft",)) for x in ("dpo-beta-0.1", "hinge")]
    last = Job("table", command("m"), needs=("dpo-beta-0.1", "hinge"), needs_devices=False)
    return [*jobs, last]


def check_shell(text: str) -> None:
    done = subprocess.run(["bash", "-n"], input=text, text=True, capture_output=True)
    assert (done.returncode, done.stderr) == (0, "")


def documents(text: str) -> list[dict]:
    return list(yaml.safe_load_all(text))


# What a job's words become: they are read back as the engine's machines would.


def shell_commands(name: str, text: str) -> list[str]:
    """The shell commands that run jobs, in the file's order."""
    if name == "slurm":
        lines = [line for line in text.splitlines() if line.endswith("|| status=$?")]
        return [line.removesuffix(" || status=$?") for line in lines]
    if name == "jobset":
        pods = [
            one["spec"]["replicatedJobs"][0]["template"]["spec"]["template"]["spec"]
            for one in documents(text)
        ]
        return [pod["containers"][0]["command"][2] for pod in pods]
    if name == "skypilot":
        return [one["run"] for one in documents(text) if "run" in one]
    joined = text.replace("\\\n", "")
    calls = [shlex.split(x) for x in joined.splitlines() if x.startswith(("xpk", "gcloud"))]
    found = [word.removeprefix("--command=") for x in calls for word in x if "--command=" in word]
    return found + [x for x in joined.splitlines() if x.startswith("JAX_PLATFORMS")]


def python_words(line: str) -> list[str]:
    """The words behind `-m` that a shell gives to Python."""
    words = shlex.split(line)
    return words[words.index("-m") + 1 :]


@pytest.mark.parametrize(("name", "options"), VARIANTS)
def test_a_job_gets_its_own_words_whatever_is_in_them(name, options):
    jobs = diamond()[:1]
    text = of_jobs(name, options, jobs, setup="source env/bin/activate", code="/a folder")
    (line,) = shell_commands(name, text)
    assert python_words(line) == list(jobs[0].command[2:])


@pytest.mark.parametrize("name", ["slurm", "xpk", "tpu-vm"])
def test_scripts_are_bash(name, write):
    for options in (options for engine_name, options in VARIANTS if engine_name == name):
        check_shell(write(name, *options).text)
        check_shell(of_jobs(name, options, diamond()))


@pytest.mark.parametrize(("name", "options"), [x for x in VARIANTS if x[0] == "jobset"])
def test_jobsets_are_what_their_schema_says_and_start_again_after_a_stop_alone(name, options):
    for document in documents(of_jobs(name, options, diamond())):
        check(document, JOBSET)
        policy = document["spec"]["failurePolicy"]
        job = document["spec"]["replicatedJobs"][0]["template"]["spec"]
        (rule,) = job["podFailurePolicy"]["rules"]
        assert (rule["action"], rule["onExitCodes"]["operator"]) == ("FailJob", "NotIn")
        assert {stopping.STOPPED, peers.DEAD, 137} == {*rule["onExitCodes"]["values"]}
        assert {1, 2}.isdisjoint(rule["onExitCodes"]["values"])  # errors that come again
        # Another code fails the Job for this reason; what is left restarts the JobSet.
        assert policy["rules"][0]["onJobFailureReasons"] == ["PodFailurePolicy"]
        assert policy["rules"][0]["action"] == "FailJobSet"
        assert (policy["maxRestarts"], job["backoffLimit"]) == (50, 0)


def test_tasks_of_skypilot_are_what_their_schema_says():
    first, *tasks = documents(of_jobs("skypilot", OPTIONS["skypilot"], diamond()))
    assert first.keys() == {"name"}
    for task in tasks:
        check(task, TASK)
        codes = task["resources"]["job_recovery"]["recover_on_exit_codes"]
        assert {stopping.STOPPED, peers.DEAD} <= {*codes}
    assert [task["num_nodes"] for task in tasks] == [2, 2, 2, 1]
    assert "accelerators" not in tasks[-1]["resources"]


def test_a_field_that_no_schema_has_is_noticed():
    (document,) = documents(of_jobs("jobset", OPTIONS["jobset"], diamond()[:1]))
    document["spec"]["failurePolicy"]["maxRestart"] = 3
    with pytest.raises(AssertionError, match=r"failurePolicy: an unknown field 'maxRestart'"):
        check(document, JOBSET)


@pytest.mark.parametrize("name", ["jobset", "xpk"])
def test_an_engine_that_starts_all_jobs_at_once_lets_each_wait_for_its_needs(name):
    first, *groups, last = shell_commands(name, of_jobs(name, OPTIONS[name], diamond()))
    assert python_words(first)[0] == "m"
    for line, job in zip((*groups, last), ("dpo-beta-0.1", "hinge", "table")):
        want = ["dpojax.plans.after", "--plan=gs://b/sweep.json", f"--job={job}"]
        assert python_words(line) == want
    assert "JAX_PLATFORMS=cpu" in last


def test_slurm_holds_each_job_back_until_those_that_it_needs_have_ended_well():
    text = of_jobs("slurm", OPTIONS["slurm"], diamond())
    submissions = [line for line in text.splitlines() if "$(sbatch" in line]
    needs = [line.partition("--dependency=")[2].split(" ")[0] for line in submissions]
    after_sft, after_both = "afterok:${job_1}", "afterok:${job_2}:${job_3}"
    assert needs == ["", after_sft, after_sft, after_both]
    assert text.count("#SBATCH --gpus-per-node=8") == 3  # the last job needs no devices


def test_a_slurm_job_is_signalled_in_time_and_requeued_by_its_own_script(write):
    text = write("slurm", *OPTIONS["slurm"]).text
    for line in ("--requeue", "--signal=TERM@60", "--open-mode=append", "--constraint=h100"):
        assert f"#SBATCH {line}\n" in text
    assert "143|75|137)" in text
    assert 'scontrol requeue Incomplete "$SLURM_JOB_ID"' in text


@pytest.mark.parametrize(
    ("status", "restarts", "requeues", "ends"),
    [(0, 0, False, 0), (143, 0, True, 143), (75, 2, True, 75), (143, 3, False, 143)]
    + [(1, 0, False, 1), (2, 0, False, 2)],
)
def test_the_script_of_slurm_requeues_a_stop_and_keeps_every_status(
    write, tmp_path, status, restarts, requeues, ends
):
    """With commands of Slurm that only note how they were called."""
    text = write("slurm", "--nodes=2", "--max_restarts=3").text
    programs = {
        "srun": f"exit {status}",
        "scontrol": f'echo "$@" > {tmp_path}/requeued',
        "sleep": "exit 0",
    }
    folder = tmp_path / "programs"
    folder.mkdir()
    for name, line in programs.items():
        (folder / name).write_text(f"#!/bin/bash\n{line}\n")
        (folder / name).chmod(stat.S_IRWXU)
    variables = {"PATH": f"{folder}:/usr/bin:/bin", "SLURM_JOB_ID": "7"}
    variables["SLURM_RESTART_COUNT"] = str(restarts)
    done = subprocess.run(["bash", "-c", text], env=variables, capture_output=True, text=True)
    assert done.returncode == ends, done.stderr
    requeued = tmp_path / "requeued"
    assert requeued.exists() == requeues
    if requeues:
        assert requeued.read_text() == "requeue Incomplete 7\n"


def test_xpk_restarts_the_codes_that_a_stop_ends_with(write):
    text = write("xpk", *OPTIONS["xpk"], "--grace=300", "--max_restarts=7").text
    words = shlex.split(text.replace("\\\n", ""), comments=True)
    assert "--restart-on-exit-codes=143,75,137" in words
    assert {"--max-restarts=7", "--termination-grace-period-seconds=300", "--spot"} <= {*words}


@pytest.mark.parametrize("name", [name for name in OPTIONS if name != "tpu-vm"])
def test_the_code_that_a_config_chooses_for_a_stop_starts_the_job_again_beside_143(name, write):
    """143 stays: a process that is stopped before it has read its config ends with it."""
    text = write(name, *OPTIONS[name], "--config.exit_code_when_stopped=85").text
    if name == "slurm":
        (codes,) = re.findall(r"^ +(.*137)\)$", text, re.MULTILINE)
    elif name == "xpk":
        (codes,) = re.findall(r"--restart-on-exit-codes=(\S+)", text)
    else:  # the list of a YAML file
        (codes,) = re.findall(r"(?:values|recover_on_exit_codes):((?:\s+- \d+)+)", text)
    assert {"85", "143", "75", "137"} == {*re.findall(r"\d+", codes)}
    assert "exit_code_when_stopped=85" in text  # the job itself has the key


# The command line.


def test_keys_of_the_config_go_to_the_job_and_the_path_is_that_from_the_code(write):
    words = ("--config.preference.beta=0.3", "--noconfig.check_memory", "--config.sft.steps", "7")
    written = write("slurm", *words, workdir="runs/a b")
    (line,) = shell_commands("slurm", written.text)
    assert python_words(line) == [
        "dpojax.runs.run",
        "--config=configs/reviews.py",
        f"--workdir={ROOT / 'runs' / 'a b'}",
        "--config.preference.beta=0.3",
        "--config.check_memory=false",
        "--config.sft.steps=7",
    ]
    assert "submit it with: sbatch" in written.printed
    assert "--config.distributed=true" in write("slurm", "--nodes=2").text


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ((), "no engine is named; begin with one of .*slurm.*xpk"),
        (("slurn", CONFIG), "'slurn': no such engine"),
        (("slurm", CONFIG, "--workdir=w", "--config.preference.betta=1"), "did you mean"),
        (("slurm", CONFIG, "--workdir=w", "--nodes=0"), "--nodes=0: 1 or more"),
        (("slurm", CONFIG, "--workdir=w", "--sbatch=exclusive"), "is no option"),
        (("xpk", CONFIG, "--workdir=w", "--cluster=c"), "one of --tpu_type and --device_type"),
        (("jobset", CONFIG, "--workdir=w", "--image=i", "--tpus_per_host=4"), "TPUs need"),
        (("slurm", CONFIG, "--workdir=w", "--name=a\nb"), "cannot be printed"),
        (("slurm", CONFIG, "--workdir=w", "--config.preference.beta=-1"), "preference.beta"),
        (
            ("tpu-vm", CONFIG, "--workdir=w", "--tpu=t", "--zone=z", "--sweep"),
            "--workdir=w: .* give a bucket",
        ),
    ],
)
def test_what_means_nothing_is_refused_before_anything_is_written(
    words, message, tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    with pytest.raises((UsageError, ConfigError), match=message):
        launch.launch(words)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(("name", "options"), OPTIONS.items())
def test_submit_is_refused_where_the_engine_is_not_installed(name, options, tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ConfigError, match=rf"{engines()[name].submits_with} is not installed here"):
        launch.launch([name, CONFIG, "--workdir=run", "--submit", *options])
    assert list(tmp_path.iterdir()) == []


def test_submit_calls_the_engine_with_the_file_and_ends_as_it_does(tmp_path, monkeypatch):
    called = tmp_path / "called"
    (tmp_path / "sbatch").write_text(f'#!/bin/sh\necho "$@" > {called}\nexit 3\n')
    (tmp_path / "sbatch").chmod(stat.S_IRWXU)
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    workdir = tmp_path / "run"
    assert launch.launch(["slurm", CONFIG, f"--workdir={workdir}", "--submit"]) == 3
    assert called.read_text() == f"{workdir}/launch.sbatch\n"


def test_a_run_that_is_finished_is_not_launched_again(tmp_path, capsys):
    (tmp_path / "finished.json").write_text("{}")
    assert launch.launch(["slurm", CONFIG, f"--workdir={tmp_path}"]) == 0
    assert "nothing is launched" in capsys.readouterr().out
    assert [path.name for path in tmp_path.iterdir()] == ["finished.json"]


def test_names_are_those_of_dns_and_differ_where_the_jobs_do():
    names = ["runs", "Beta 0.1", "beta-0.1", "beta-0-1", "1", "_", "x" * 50, "x" * 51, "é"]
    made = [dns_name(name) for name in names]
    assert made[0] == "runs"
    assert len({*made}) == len(names)
    for name in made:
        check(name, JOBSET["metadata"].schema["name"])


def test_every_engine_is_documented_and_has_its_flags_in_help(capsys):
    text = (ROOT / "docs" / "clusters.md").read_text()
    assert engines().keys() == OPTIONS.keys()
    for name in engines():
        assert f"scripts/launch.py {name} " in text
        with pytest.raises(SystemExit) as ended:
            launch.parse([name, "--help"])
        assert ended.value.code == 0
        assert "--max_restarts" in capsys.readouterr().out
    for code in engine.RESTARTED:
        assert f"| {code} |" in text


# Sweeps.

TWO_LOSSES = """
def sweep():
    members = [("dpo", 1.0), ("dpo", 2.0), ("hinge", 1.0), ("hinge", 2.0)]
    return [{"preference.loss": loss, "preference.beta": beta} for loss, beta in members]
"""


@pytest.fixture
def two_losses(tmp_path):
    """--config of a sweep of two groups, each of two members that begin with the same SFT."""
    file = tmp_path / "two_losses.py"
    file.write_text((ROOT / "configs" / "reviews.py").read_text() + TWO_LOSSES)
    return f"--config={file}"


def jobs_in(folder: pathlib.Path) -> dict[str, dict]:
    return {job["name"]: job for job in json.loads((folder / "sweep.json").read_text())["jobs"]}


def test_a_sweep_is_one_job_for_each_group_after_what_they_begin_with_and_a_table(
    write, two_losses, tmp_path
):
    written = write("slurm", "--sweep", "--nodes=2", *KEYS, config=two_losses)
    jobs = jobs_in(tmp_path / "run")
    first, *groups, last = jobs.values()
    assert first["command"].startswith("python -m dpojax.sweeps.launched ")
    assert [sorted(job["needs"]) for job in groups] == 2 * [[first["name"]]]
    members = [python_words(job["command"])[-1] for job in groups]
    assert members == [f"--members=loss-{x}-beta-1,loss-{x}-beta-2" for x in ("dpo", "hinge")]
    assert (last["name"], last["needs_devices"]) == ("table", False)
    assert last["needs"] == [job["name"] for job in groups]
    assert len(shell_commands("slurm", written.text)) == 4
    config = json.loads((tmp_path / "run" / "sweep.json").read_text())["config"]
    assert config["distributed"] is True
    for path in (config["token_cache"], config["preference"]["reference"]["cache"]):
        assert path.startswith(str(tmp_path / "run"))


def test_groups_that_have_ended_are_not_launched_again(write, two_losses, tmp_path, capsys):
    run, words = tmp_path / "run", ("--sweep", *KEYS)
    write("slurm", *words, config=two_losses)
    for member in ("loss-dpo-beta-1", "loss-dpo-beta-2", "loss-hinge-beta-1"):
        (run / member).mkdir()
        (run / member / "finished.json").write_text("{}")
    write("slurm", *words, config=two_losses)
    first, group, last = jobs_in(run).values()
    assert group["needs"] == [first["name"]]
    assert last["needs"] == [group["name"]]
    (run / "loss-hinge-beta-2").mkdir()
    (run / "loss-hinge-beta-2" / "failed.txt").write_text("the loss is not finite")
    assert launch.launch(["slurm", two_losses, f"--workdir={run}", *words]) == 0
    assert "nothing is launched" in capsys.readouterr().out


def test_a_grid_with_seeds_is_launched_as_members_and_the_last_job_names_the_best(write, tmp_path):
    words = ("--sweep", "--grid", "beta=0.1,1", "label_smoothing=0.1", "--seeds=2")
    write("slurm", *words, "--best=eval/rewards/accuracies", *KEYS)
    plan = json.loads((tmp_path / "run" / "sweep.json").read_text())
    assert list(plan["members"].values()) == [
        {"preference.beta": beta, "preference.label_smoothing": 0.1, "seed": seed}
        for beta in (0.1, 1.0)
        for seed in (0, 1)
    ]
    # Seeds have an SFT each, so the members of one seed train together.
    assert [len(group) for group in plan["groups"]] == [2, 2]
    last = jobs_in(tmp_path / "run")["table"]
    assert python_words(last["command"])[-1] == "--best=eval/rewards/accuracies"


def test_a_grid_without_a_sweep_and_a_best_that_cannot_be_compared_are_refused():
    words = ["slurm", CONFIG, "--workdir=w", "--grid", "beta=0.1,1"]
    with pytest.raises(UsageError, match="add --sweep"):
        launch.parse(words)
    with pytest.raises(UsageError, match=r"members differ in preference\.beta"):
        launch.launch([*words, "--sweep", "--best=eval/loss"])
