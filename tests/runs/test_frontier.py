"""A frontier small enough for a test: its jobs, what it writes, and how it resumes."""

import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys

import jax
import numpy as np
import pytest

from dpojax import storage
from dpojax.config.errors import ConfigError
from dpojax.evaluation import frontier_points, markdown
from dpojax.evaluation.frontier_points import arrays, at_the_bound, read_points
from dpojax.evaluation.optimum import above_limit, read_optimum
from dpojax.evaluation.policies import NothingStopped
from dpojax.evaluation.rewards import Reward, RewardError, open_reward
from dpojax.frontier import judged
from dpojax.frontier import results as frontier_results
from dpojax.frontier.configs import RunConfigs
from dpojax.frontier.frontier import make_frontier, write_or_compare_plan
from dpojax.frontier.judged import frontier_settings
from dpojax.frontier.plan import plan_frontier
from dpojax.frontier.runs import Run, paper_runs, run_of_loss
from dpojax.runs import preferences as preferences_module
from dpojax.runs.command import failures
from dpojax.runs.judging import judge
from dpojax.runs.run import run as train
from dpojax.stages import samples as samples_module
from dpojax.training.metrics import read_metrics
from dpojax.training.preemption import Preempted

from .conftest import tiny_config

SMALL = {
    "sft.data.limit": 200,
    "sft.steps": 30,
    "sft.learning_rate": 3e-3,
    "evaluate_every": 2,
    "log_every": 2,
    "checkpoint_every": 0,
    "samples.count": 8,
    "samples.per_prompt": 2,
    "samples.max_new_tokens": 16,
    "frontier.count": 24,
    "frontier.completions": 3,
    "frontier.truncated": "keep",
    "frontier.reference_samples": 64,
    "frontier.best_of_n": (2, 4),
    "preference.steps": 4,
    "preference.data.eval_limit": 4,
}
RUNS = [
    Run("dpo", "beta=0.1", {"preference.beta": 0.1}),
    Run("preferred_ft", "seed=1", {"preference.loss": "sft", "seed": 1}),
]
ADDED = run_of_loss("simpo", {"preference.steps": 2})


def config(**changes):
    return tiny_config(**SMALL | changes)


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    folder = tmp_path_factory.mktemp("frontier")
    make_frontier(config(), RUNS, str(folder))
    return folder, frontier_results.write(folder)


@pytest.mark.long
def test_every_evaluation_of_every_run_is_a_point_beside_best_of_n_and_the_reference(made):
    folder, _ = made
    points = read_points(folder / "frontier.csv")
    by_method = lambda method: [p for p in points if p.method == method]
    assert [(p.step, p.setting) for p in by_method("dpo")] == [(2, "beta=0.1"), (4, "beta=0.1")]
    assert [(p.step, p.seed) for p in by_method("preferred_ft")] == [(2, 1), (4, 1)]
    assert [p.setting for p in by_method("best_of_n")] == ["n=2", "n=4"]
    (base,) = by_method("sft")
    with np.load(folder / "reference_samples.npz") as samples:
        assert samples["rewards"].shape == (8, 64)
        assert base.reward == pytest.approx(samples["rewards"].mean())
    lines = read_metrics(folder / "runs" / "dpo-beta-0.1" / "preference")
    last = [line for line in lines if line["split"] == "eval"][-1]
    assert by_method("dpo")[-1].kl == last["samples/kl"]
    assert len(read_optimum(folder / "optimum.json").beta) == len(frontier_results.BETAS)


@pytest.mark.long
def test_no_point_lies_above_the_limit_and_best_of_n_rises_within_its_bound(made):
    points, curve, base = frontier_results.collect(made[0])
    measured = arrays([at_the_bound(point) for point in points])
    gap = above_limit(
        measured.reward,
        measured.kl,
        curve,
        reward_error=measured.reward_error,
        kl_error=measured.kl_error,
    )
    known = np.isfinite(gap.value)
    assert (gap.value < 4 * gap.error)[known].all()
    assert known.sum() >= len(points) // 2
    best = [point for point in points if point.method == "best_of_n"]
    assert [*sorted(best, key=lambda point: point.reward)] == best
    assert base.reward < best[0].reward
    assert all(0 < point.kl <= at_the_bound(point).kl + 1e-9 for point in best)


@pytest.mark.long
def test_it_ends_with_figure_report_and_samples_of_every_run(made):
    folder, text = made
    assert (folder / "frontier.png").stat().st_size > 10_000
    assert (folder / "frontier.pdf").is_file()
    assert "Preferred-FT" in text
    assert re.search(r"\| policy and reference +\| llama +\| [\d,]+ ", text)
    assert re.search(r"\| DPO +\| beta=0\.1 +\| [\d.e-]+ +\| \d+ +\| \w+ +\| \d+ +\| \d+ ", text)
    assert jax.__version__ in text
    lines = [json.loads(line) for line in (folder / "samples.jsonl").read_text().splitlines()]
    assert {line["method"] for line in lines} == {"dpo", "preferred_ft"}
    assert len(lines) == 2 * 8
    texts = (folder / "samples.md").read_text()
    assert all(markdown.escaped(line["response"]) in texts for line in lines)


@pytest.mark.long
def test_one_run_of_each_method_is_judged_against_the_sft_policy(made, tmp_path):
    folder = storage.as_path(made[0])
    settings = frontier_settings(folder, limit=6, samples=1, out=str(tmp_path))
    assert (settings.prompts, settings.skip) == ("reviews", 8)  # behind those of the evaluations
    assert (settings.judge, settings.b.label) == ("exact", "SFT")
    result = judge(settings)
    assert [(row.policy, row.best_of) for row in result.rows] == [
        ("DPO beta=0.1", 1),
        ("Preferred-FT seed=1", 1),
        ("SFT", 4),
    ]
    assert result.opponent == "SFT"
    assert all(0 <= row.win_rate.value <= 1 for row in result.rows)
    assert (tmp_path / "report.md").exists()


@pytest.mark.long
def test_of_each_method_the_run_with_the_highest_reward_or_nearest_to_a_kl_is_judged(
    made, monkeypatch
):
    folder = storage.as_path(made[0])
    plan = frontier_results.read_plan(folder)
    other = plan["runs"][0] | {"setting": "beta=9", "name": plan["runs"][1]["name"]}
    plan["runs"].append(other)
    last = {"beta=0.1": (5.0, 0.6), "beta=9": (1.0, 0.5), "seed=1": (0.2, 0.5)}  # KL, reward

    def points_of(folder, plan, run):
        kl, reward = last[run["setting"]]
        values = dict.fromkeys(frontier_points.Point._fields, 0.0)
        return [frontier_points.Point(**values | {"kl": kl, "reward": reward})]

    monkeypatch.setattr(judged, "points_of", points_of)
    for at_kl, setting in ((None, "beta=0.1"), (1.5, "beta=9"), (4.0, "beta=0.1")):
        chosen = judged.chosen_runs(folder, plan, at_kl)
        assert chosen["dpo"][0]["setting"] == setting


@pytest.mark.long
def test_a_method_that_the_frontier_has_not_is_named(made):
    with pytest.raises(ConfigError, match="no finished run of ppo; it has dpo, preferred_ft, best"):
        frontier_settings(storage.as_path(made[0]), methods=["ppo"])


@pytest.mark.long
def test_the_same_command_makes_nothing_again_and_runs_that_are_added_tokenise_nothing(made):
    folder, _ = made
    before = {p: p.stat().st_mtime_ns for p in folder.rglob("finished.json")}
    tokens = folder / "tokens"
    cached = {*tokens.iterdir()}  # of SFT, of the preferences, and of the best of each
    make_frontier(config(), [*RUNS, ADDED], str(folder))
    log = (folder / "logs" / "simpo-default.txt").read_text()
    assert log.count(f"tokens read from {tokens}") == 1
    assert len(cached) == 3
    assert {*tokens.iterdir()} == cached
    after = {p: p.stat().st_mtime_ns for p in folder.rglob("finished.json")}
    assert before.items() <= after.items()
    assert (folder / "runs" / "simpo-default" / "finished.json").is_file()
    assert "simpo" in {p.method for p in frontier_results.collect(folder)[0]}


@pytest.mark.long
def test_another_config_in_the_same_folder_is_refused_by_key(made):
    with pytest.raises(ConfigError, match=r"frontier\.count: 24 -> 25"):
        make_frontier(config(**{"frontier.count": 25}), RUNS, str(made[0]))


def test_a_run_that_could_not_start_is_refused_before_anything_is_made(tmp_path):
    wrong = Run("dpo", "beta=0", {"preference.beta": 0.0})
    with pytest.raises(ConfigError, match=r"beta: must be greater than 0, got 0\.0"):
        make_frontier(config(), [wrong], str(tmp_path / "none"))
    assert not (tmp_path / "none").exists()


def misbehaving(*behaviours):
    """The exact reward by default; each call first takes the next behaviour: a function of the
    number of texts, or None."""
    exact, left = open_reward("reviews"), iter(behaviours)

    def score(prompts, responses):
        scores, change = exact(prompts, responses), next(left, None)
        return scores if change is None else change(scores)

    return lambda *_, **__: Reward("odd", score, exact.fingerprint)


def without_runs(made, folder):
    """A copy of a frontier in which SFT, its policy and the tokens are done, and nothing else."""
    left_out = shutil.ignore_patterns("preferences", "runs", "reference*", "plan.json", "*.csv")
    return shutil.copytree(made, folder, ignore=left_out)


def sigterm(scores):
    os.kill(os.getpid(), signal.SIGTERM)
    return scores


@pytest.mark.long
def test_a_plan_that_fails_or_is_stopped_anywhere_goes_on_to_the_same_points(
    made, tmp_path, monkeypatch
):
    """In the middle of the preferences and of a run: every failure is one that scripts tell in a
    line, and leaves nothing that is half done."""
    folder = without_runs(made[0], tmp_path / "again")
    make = lambda: make_frontier(config(), RUNS, str(folder))
    nan, short = lambda scores: scores * np.nan, lambda scores: scores[:-1]
    monkeypatch.setattr(preferences_module, "open_reward", misbehaving(nan, short, sigterm))
    for error, message in (
        (RewardError, "reward odd: 72 of 72 scores are not finite"),
        (RewardError, r"reward odd: gave an array of shape \(71,\) for 72 texts"),
        (Preempted, "frontier: stopped by SIGTERM, what is done is kept"),
    ):
        with pytest.raises(error, match=message):
            make()
        assert issubclass(error, (*failures(), Preempted))
        assert os.listdir(folder / "preferences") == ["provenance.json"]
    # Of the reference, before the first step, and of the policy, after the second.
    monkeypatch.setattr(samples_module, "open_reward", misbehaving(None, sigterm))
    with pytest.raises(Preempted, match="preference: stopped at step 3 of 4, saved"):
        make()
    assert not (folder / "runs" / "dpo-beta-0.1" / "finished.json").exists()
    make()
    (part,) = (folder / "preferences").glob("*.parquet")
    assert part.read_bytes() == (made[0] / "preferences" / part.name).read_bytes()
    methods = {run.method for run in RUNS}
    measured = lambda of: [repr(p) for p in frontier_results.collect(of)[0] if p.method in methods]
    assert measured(folder) == measured(made[0])


@pytest.mark.long
def test_two_processes_make_the_same_points(made, tmp_path):
    folder = without_runs(made[0], tmp_path / "beside")
    make_frontier(config(), RUNS[:1], str(folder), workers=2)
    jobs = plan_frontier(config(), RUNS[:1], folder, parts=2).jobs
    done = {job.name for job in jobs if job.is_done}
    assert done == {"sft", "policy", "preferences", RUNS[0].name, "reference_samples"}
    methods = ("sft", "dpo", "best_of_n")
    measured = lambda of: [repr(p) for p in frontier_results.collect(of)[0] if p.method in methods]
    assert len(measured(folder)) == 4
    assert measured(folder) == measured(made[0])


@pytest.mark.long
def test_the_plan_holds_every_job_with_a_command_that_runs_by_hand(made, tmp_path):
    """An export, and a run whose SFT policy and preferences are there."""
    folder = without_runs(made[0], tmp_path / "by hand")
    shutil.copytree(made[0] / "preferences", folder / "preferences")
    shutil.rmtree(folder / "policy")
    plan = plan_frontier(config(), RUNS, folder)
    write_or_compare_plan(config(), RUNS, plan, folder)
    jobs = {job["name"]: job for job in json.loads((folder / "plan.json").read_text())["jobs"]}
    names = ["sft", "policy", "preferences", "reference_samples", *(run.name for run in RUNS)]
    assert list(jobs) == names
    for name in ("policy", RUNS[0].name):
        python, *arguments = shlex.split(jobs[name]["command"])
        assert (python, arguments[0]) == ("python", "-m")
        assert not any(map(os.path.exists, jobs[name]["outputs"]))
        done = subprocess.run([sys.executable, *arguments], capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        assert all(map(os.path.exists, jobs[name]["outputs"]))
    logged = lambda of: [
        {
            key: x
            for key, x in line.items()
            if not key.startswith(("time", "perf/", "goodput/", "memory/"))
        }
        for line in read_metrics(of / "runs" / RUNS[0].name / "preference")
    ]
    assert logged(folder) == logged(made[0])


def test_preferences_are_made_in_as_many_parts_as_jobs_at_once_but_no_emptier_than_a_shard():
    def names(workers, count):
        changes = {"frontier.prompts": "prompts.txt", "frontier.count": count}
        plan = plan_frontier(config(**changes), RUNS, storage.as_path("none"), parts=workers)
        return [job.name for job in plan.jobs if job.kind == "preferences"]

    assert names(1, 5_000) == ["preferences"]
    assert names(2, 5_000) == ["preferences-1of2", "preferences-2of2"]
    assert names(8, 2_048) == names(2, 0) == ["preferences-1of2", "preferences-2of2"]


def test_best_of_n_wants_enough_samples_of_the_reference(tmp_path):
    few = config(**{"frontier.best_of_n": (2, 32)})
    with pytest.raises(ConfigError, match=r"reference_samples = 64: best of 32 .* at least 128"):
        make_frontier(few, RUNS, str(tmp_path / "none"))


def test_a_policy_that_never_ends_is_told_in_a_line():
    assert issubclass(NothingStopped, failures())


def test_the_papers_sweep_has_22_runs():
    runs = paper_runs()
    assert len(runs) == 22 == len({run.name for run in runs})


@pytest.mark.long
def test_runs_of_a_method_that_differ_in_numbers_alone_are_one_job_and_may_fail_alone(
    made, tmp_path
):
    """This adds runs to what the tests before it look at; so does the one after it."""
    folder, _ = made
    betas = [Run("dpo", f"beta={beta:g}", {"preference.beta": beta}) for beta in (0.1, 0.3, 2.0)]
    seeds = [
        Run("preferred_ft", f"seed={i}", {"preference.loss": "sft", "seed": i}) for i in (1, 2, 3)
    ]
    planned = plan_frontier(config(), [*betas, *seeds, ADDED], folder, vectorise=True).jobs
    names = [job.name.rsplit("-", 1)[0] for job in planned]
    assert {"dpo-3-runs", "preferred_ft-3-runs"} <= {*names}
    before = (folder / "runs" / "dpo-beta-0.1" / "finished.json").stat().st_mtime_ns
    make_frontier(config(), [*betas, *seeds, ADDED], str(folder), vectorise=True)
    assert (folder / "runs" / "dpo-beta-0.1" / "finished.json").stat().st_mtime_ns == before
    assert all(job.is_done for job in planned)
    train(RunConfigs(config(), folder).config_of(betas[1]), str(tmp_path / "alone"))
    of_run = lambda workdir: read_metrics(workdir / "preference", "eval")[-1]
    alone, member = of_run(tmp_path / "alone"), of_run(folder / "runs" / "dpo-beta-0.3")
    assert member["loss"] == pytest.approx(alone["loss"], abs=1e-5)
    assert member["samples/reward"] == alone["samples/reward"]


@pytest.mark.long
def test_a_run_that_fails_leaves_the_others_and_is_named_in_the_report(made):
    """By itself, and among others that train with it."""
    folder, too_large = made[0], {"preference.learning_rate": 1e30}
    broken = [
        Run("hinge", "broken", {"preference.loss": "hinge"} | too_large),
        Run("apo_zero", "broken", {"preference.loss": "apo_zero"} | too_large),
    ]
    whole = [Run("apo_zero", "whole", {"preference.loss": "apo_zero"})]
    there = json.loads((folder / "plan.json").read_text())["runs"]
    before = [Run(**{key: run[key] for key in Run._fields}) for run in there]
    planned = [*before, *broken, *whole]
    for _ in range(2):
        make_frontier(config(), planned, str(folder), vectorise=True)
    assert (folder / "logs" / "hinge-broken.txt").read_text().count("not finite at step") == 1
    text = frontier_results.write(folder)
    failed = text.split("## Runs that failed")[1].split("## Points")[0]
    named = [run.name for run in planned if f"{run.name}: " in failed]
    assert named == [run.name for run in broken]
    points = frontier_results.collect(folder)[0]
    assert {p.setting for p in points if p.method == "apo_zero"} >= {"whole"}
