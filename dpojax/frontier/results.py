"""From a finished frontier's folder to its points, figure and report."""

from __future__ import annotations

import json
import math

import numpy as np

from dpojax import storage
from dpojax.config.saved import read_run_config
from dpojax.evaluation.frontier import best_of_n, best_of_n_kl, mean_over_prompts
from dpojax.evaluation.frontier_figure import draw
from dpojax.evaluation.frontier_points import BEST_OF_N, REFERENCE, Point, write_points
from dpojax.evaluation.frontier_report import by_prompt, report, samples_report
from dpojax.evaluation.optimum import Optimum, optimum, write_optimum
from dpojax.frontier.frontier import read_plan
from dpojax.frontier.plan import SAMPLES
from dpojax.frontier.reference_samples import read_reference_samples
from dpojax.frontier.what_was_run import environment, sections, stage_folders
from dpojax.jobs.progress import read_seconds
from dpojax.runs.workdirs import failure_of
from dpojax.stages.samples import FILE, last_samples
from dpojax.training.metrics import read_metrics

# Fields of a point that are metrics `samples/...` of an evaluation.
SAMPLED = ("kl", "kl_error", "reward", "reward_error", "length", "distinct_2", "repetition")
SAMPLED += ("stopped", "rank_correlation", "rank_correlation_error")
BETAS = (np.inf, *np.geomspace(10, 0.02, 40))


def collect(folder: storage.Path) -> tuple[list[Point], Optimum, Point]:
    """The points of all checkpoints and of best-of-n, the limit, and the reference's own point."""
    plan = read_plan(folder)
    rewards, lengths = read_reference_samples(folder / SAMPLES)
    base = _reference_point(rewards, lengths, plan["config"]["seed"])
    points = [point for run in plan["runs"] for point in points_of(folder, plan, run)]
    for n in plan["config"]["frontier"]["best_of_n"]:
        kl, best = best_of_n_kl(rewards, n), best_of_n(rewards, n)
        points.append(
            _point(
                method=BEST_OF_N,
                setting=f"n={n}",
                seed=base.seed,
                step=0,
                kl=kl.value,
                kl_error=kl.error,
                reward=best.value,
                reward_error=best.error,
            )
        )
    return points, optimum(rewards, BETAS), base


def write(folder: storage.Path) -> str:
    """Write frontier.csv, optimum.json, frontier.png and .pdf, report.md, samples.jsonl and .md.

    Returns:
      the report.
    """
    points, curve, base = collect(folder)
    plan = read_plan(folder)
    write_points(folder / "frontier.csv", [base, *points])
    write_optimum(folder / "optimum.json", curve)
    draw(points, curve, base, folder / "frontier.png", folder / "frontier.pdf")
    samples = _samples(folder, plan)
    lines = "".join(json.dumps(line) + "\n" for line in samples)
    storage.write_text(folder / "samples.jsonl", lines)
    seconds = read_seconds(folder)
    storage.write_text(folder / "samples.md", samples_report(by_prompt(samples)))
    text = report(
        points,
        curve,
        base,
        environment(),
        sections=sections(folder, plan),
        seconds=_by_kind(seconds.jobs, plan) | {"the whole plan": seconds.passed},
        failed=failures(folder),
    )
    storage.write_text(folder / "report.md", text)
    return text


def failures(folder: storage.Path) -> dict[str, str]:
    """Why runs of the plan failed, by name."""
    names = [run["name"] for run in read_plan(folder)["runs"]]
    return {name: why for name in names if (why := failure_of(folder / "runs" / name))}


def _point(**values: object) -> Point:
    """A point of these values; what it does not have is nan."""
    return Point(**dict.fromkeys(Point._fields, math.nan) | values)


def _reference_point(rewards: np.ndarray, lengths: np.ndarray, seed: int) -> Point:
    reward = mean_over_prompts(rewards.ravel(), np.arange(rewards.size) // rewards.shape[1])
    return _point(
        method=REFERENCE,
        setting="",
        seed=seed,
        step=0,
        kl=0.0,
        kl_error=0.0,
        reward=reward.value,
        reward_error=reward.error,
        length=float(lengths.mean()),
    )


def points_of(folder: storage.Path, plan: dict, run: dict) -> list[Point]:
    """One point per evaluation of a run, but for those before a stage's first step.

    Steps go on from stage to stage.
    """
    stages = stage_folders(folder, plan, run)
    seed = read_run_config(stages[0].parent).seed
    points, before = [], 0
    for stage in stages:
        lines = [line for line in read_metrics(stage, "eval") if line["step"] > 0]
        for line in lines:
            if "samples/kl" in line:
                points.append(_point_of(line, run, seed, before + line["step"]))
        before += max((line["step"] for line in lines), default=0)
    return points


def _point_of(line: dict, run: dict, seed: int, step: int) -> Point:
    sampled = {name: float(line.get(f"samples/{name}", math.nan)) for name in SAMPLED}
    return _point(
        method=run["method"],
        setting=run["setting"],
        seed=seed,
        step=step,
        accuracy=float(line.get("rewards/accuracies", math.nan)),
        **sampled,
    )


def _samples(folder: storage.Path, plan: dict) -> list[dict]:
    """The last checkpoint's responses of every run, one line per prompt."""
    samples = []
    for run in plan["runs"]:
        last = stage_folders(folder, plan, run)[-1]
        if not (last / FILE).exists():  # the run failed before
            continue
        for line in last_samples(last):
            samples.append(
                {
                    "method": run["method"],
                    "setting": run["setting"],
                    "prompt": line["prompt"],
                    "response": line["response"],
                    "reward": line["reward"],
                    "logprob_ratio": line["log_ratio"],
                }
            )
    return samples


def _by_kind(seconds: dict[str, float], plan: dict) -> dict[str, float]:
    """Seconds by stage, the runs of a method together."""
    methods = {run["name"]: run["method"] for run in plan["runs"]}
    by_kind: dict[str, float] = {}
    for name, taken in seconds.items():
        key = methods.get(name, name.split("-")[0])  # preferences-1of2
        by_kind[key] = by_kind.get(key, 0.0) + taken
    return by_kind
