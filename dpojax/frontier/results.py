"""From a finished frontier's folder to its points, figure and report."""

from __future__ import annotations

import json
import pathlib
import platform

import jax
import numpy as np

from dpojax.evaluation.frontier import (
    best_of_n,
    best_of_n_kl,
    mean_over_prompts,
)
from dpojax.evaluation.frontier_figure import draw
from dpojax.evaluation.frontier_points import BEST_OF_N, REFERENCE, Point, write_points
from dpojax.evaluation.frontier_report import by_prompt, report
from dpojax.evaluation.optimum import Optimum, optimum, write_optimum
from dpojax.frontier import online
from dpojax.frontier.plan import PLAN, SAMPLES
from dpojax.jobs.plan import read_seconds
from dpojax.runs.workdirs import failure_of
from dpojax.stages.samples import FILE, last_samples
from dpojax.training.metrics import read_metrics

BETAS = (np.inf, *np.geomspace(10, 0.02, 40))


def collect(folder: pathlib.Path) -> tuple[list[Point], Optimum, Point]:
    """The points of all checkpoints and of best-of-n, the limit, and the reference's own point."""
    plan = json.loads((folder / PLAN).read_text())
    with np.load(folder / SAMPLES) as found:
        rewards, lengths = found["rewards"], found["lengths"]
    reward = mean_over_prompts(rewards.ravel(), np.arange(rewards.size) // rewards.shape[1])
    missing = dict.fromkeys(Point._fields, float("nan"))
    measured = {"seed": plan["config"]["seed"], "step": 0, "kl": 0.0, "kl_error": 0.0}
    measured |= {"reward": reward.value, "reward_error": reward.error}
    measured |= {"length": float(lengths.mean())}
    base = Point(**missing | {"method": REFERENCE, "setting": ""} | measured)
    points = [point for run in plan["runs"] for point in _points_of(folder, plan, run)]
    for n in plan["config"]["frontier"]["best_of_n"]:
        kl, best = best_of_n_kl(rewards, n), best_of_n(rewards, n)
        found = {"kl": kl.value, "kl_error": kl.error}
        found |= {"reward": best.value, "reward_error": best.error}
        named = {"method": BEST_OF_N, "setting": f"n={n}", "seed": base.seed, "step": 0}
        points.append(Point(**missing | named | found))
    return points, optimum(rewards, BETAS), base


def _parts(folder: pathlib.Path, plan: dict, run: dict) -> list[pathlib.Path]:
    """The folders of the stages that a run trained, one after the other."""
    workdir = folder / "runs" / run["name"]
    if run["stage"] != online.STAGE:
        return [workdir / run["stage"]]
    rounds = plan["config"]["frontier"]["online_rounds"]
    return [trained / "preference" for trained in online.runs_of(workdir, rounds)]


def _points_of(folder: pathlib.Path, plan: dict, run: dict) -> list[Point]:
    """One point per evaluation of a run, but for those before a part's first step.

    Steps go on from part to part.
    """
    parts = _parts(folder, plan, run)
    seed = json.loads((parts[0].parent / "config.json").read_text())["seed"]
    lines, before = [], 0
    for part in parts:
        own = [line for line in read_metrics(part) if line["split"] == "eval" and line["step"] > 0]
        lines += [line | {"step": before + line["step"]} for line in own]
        before = max((line["step"] for line in lines), default=0)
    get = lambda line, name: float(line.get(f"samples/{name}", float("nan")))
    return [
        Point(
            run["method"],
            run["setting"],
            seed,
            line["step"],
            *(get(line, name) for name in ("kl", "kl_error", "reward", "reward_error", "length")),
            *(get(line, name) for name in ("distinct_2", "repetition", "stopped")),
            float(line.get("rewards/accuracies", float("nan"))),
            *(get(line, name) for name in ("rank_correlation", "rank_correlation_error")),
        )
        for line in lines
        if "samples/kl" in line
    ]


def _samples(folder: pathlib.Path, plan: dict) -> list[dict]:
    """The last checkpoint's responses of every run, one line per prompt."""
    found = []
    for run in plan["runs"]:
        last = _parts(folder, plan, run)[-1]
        if not (last / FILE).exists():  # it failed before
            continue
        found += [
            {
                "method": run["method"],
                "setting": run["setting"],
                "prompt": line["prompt"],
                "response": line["response"],
                "reward": line["reward"],
                "logprob_ratio": line["log_ratio"],
            }
            for line in last_samples(last)
        ]
    return found


def write(folder: pathlib.Path) -> str:
    """Write frontier.csv, optimum.json, samples.jsonl, frontier.png, .pdf and report.md.

    Returns the report.
    """
    points, curve, base = collect(folder)
    plan = json.loads((folder / PLAN).read_text())
    write_points(folder / "frontier.csv", [base, *points])
    write_optimum(folder / "optimum.json", curve)
    draw(points, curve, base, folder / "frontier.png", folder / "frontier.pdf")
    samples = _samples(folder, plan)
    (folder / "samples.jsonl").write_text("".join(json.dumps(line) + "\n" for line in samples))
    seconds = read_seconds(folder)
    text = report(
        points,
        curve,
        base,
        by_prompt(samples),
        _environment(),
        seconds=_by_kind(seconds.jobs, plan) | {"the whole plan": seconds.passed},
        failed=failures(folder),
    )
    (folder / "report.md").write_text(text)
    return text


def failures(folder: pathlib.Path) -> dict[str, str]:
    """Why runs of the plan failed, by name."""
    names = [run["name"] for run in json.loads((folder / PLAN).read_text())["runs"]]
    return {name: why for name in names if (why := failure_of(folder / "runs" / name))}


def _by_kind(seconds: dict[str, float], plan: dict) -> dict[str, float]:
    """Seconds by stage, the runs of a method together."""
    methods = {run["name"]: run["method"] for run in plan["runs"]}
    found: dict[str, float] = {}
    for name, taken in seconds.items():
        key = methods.get(name, name.split("-")[0])  # preferences-1of2
        found[key] = found.get(key, 0.0) + taken
    return found


def _environment() -> dict[str, str]:
    devices = jax.devices()
    return {
        "devices": f"{len(devices)} x {devices[0].device_kind}",
        "machine": f"{platform.machine()}, {platform.system()}",
        "python": platform.python_version(),
        "jax": jax.__version__,
    }
