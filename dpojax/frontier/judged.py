"""What judges a finished frontier: one run of every method against the SFT policy."""

from __future__ import annotations

import math
from collections.abc import Collection
from typing import Any

from dpojax import storage
from dpojax.config.errors import ConfigError
from dpojax.data.prompts import EMBEDDED
from dpojax.evaluation.frontier_points import BEST_OF_N, Point, name
from dpojax.frontier import online
from dpojax.frontier.configs import CLASSIFIER, POLICY
from dpojax.frontier.frontier import read_plan
from dpojax.frontier.results import points_of
from dpojax.frontier.runs import ONLINE
from dpojax.runs.judging_settings import Settings, Side
from dpojax.runs.workdirs import FINISHED

MOST_OF_N = 16  # of the n of best-of-n that the frontier has: to draw more takes long


def frontier_settings(
    folder: storage.Path,
    *,
    at_kl: float | None = None,
    methods: Collection[str] = (),
    **changes: Any,
) -> Settings:
    """The settings that judge a frontier by its true reward, or by what `changes` say.

    The prompts are held out, and are others than those by which a run of a method is chosen.

    Args:
      folder: the frontier's workdir.
      at_kl: of each method the run whose last evaluation is nearest to this KL, in nats; None: the
        one with the highest reward there.
      methods: only these; () is all.
      changes: fields of `Settings`.

    Raises:
      ConfigError: no run has been evaluated, or a method is not there.
      StorageError: the plan is damaged.
    """
    plan = read_plan(folder)
    config, samples = plan["config"], plan["config"]["samples"]
    chosen = chosen_runs(folder, plan, at_kl)
    known = [*chosen, BEST_OF_N]
    if unknown := sorted(set(methods) - set(known)):
        raise ConfigError(
            f"{folder}: no finished run of {', '.join(unknown)}; it has {', '.join(known)}"
        )
    sides = [
        Side(str(_workdir_of(folder, plan, run)), name=f"{name(method)} {run['setting']}")
        for method, (run, _) in chosen.items()
        if not methods or method in methods
    ]
    n = max((n for n in config["frontier"]["best_of_n"] if n <= MOST_OF_N), default=0)
    if n and (not methods or BEST_OF_N in methods):
        sides.append(Side(str(folder / POLICY), name="SFT", best_of=(n,)))
    reward = config["frontier"]["reward"]
    learned = f"classifier:{folder / CLASSIFIER}"
    values = {
        "out": str(folder / "judged"),
        "prompts": samples["prompts"],
        "judge": {EMBEDDED: "exact", "classifier": learned}.get(reward, reward),
        "b": Side(str(folder / POLICY), name="SFT"),
        "temperatures": (samples["temperature"],),
        "best_of_reward": learned if reward == "classifier" else reward,
        "samples": 2,
        "max_new_tokens": samples["max_new_tokens"],
        "skip": samples["count"],
        "limit": 2 * samples["count"],
    }
    return Settings(a=tuple(sides), **values | changes)


def chosen_runs(
    folder: storage.Path, plan: dict, at_kl: float | None
) -> dict[str, tuple[dict, Point]]:
    """For each method the chosen run of the plan, and its last point.

    Raises:
      ConfigError: no run has been evaluated.
    """
    chosen: dict[str, tuple[dict, Point]] = {}
    for run in plan["runs"]:
        if not (_workdir_of(folder, plan, run) / FINISHED).exists():  # it failed, or is not done
            continue
        last = points_of(folder, plan, run)[-1]
        best = chosen.get(run["method"])
        if best is None or _rank(last, at_kl) > _rank(best[1], at_kl):
            chosen[run["method"]] = run, last
    if not chosen:
        raise ConfigError(f"{folder}: no run of the frontier is finished; go on with it first")
    return chosen


def _rank(point: Point, at_kl: float | None) -> float:
    rank = point.reward if at_kl is None else -abs(point.kl - at_kl)
    return -math.inf if math.isnan(rank) else rank


def _workdir_of(folder: storage.Path, plan: dict, run: dict) -> storage.Path:
    """The workdir that the run's policy lies in."""
    workdir = folder / "runs" / run["name"]
    if run["stage"] != ONLINE:
        return workdir
    return online.trained_runs(workdir, plan["config"]["frontier"]["online_rounds"])[-1]
