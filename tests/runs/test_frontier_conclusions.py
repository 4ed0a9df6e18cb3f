"""A real frontier, made by its one command: what it concludes holds within its error bars.

The reward is exact and the draws are seeded, so a failure is a bug somewhere between the labels
and the figure, or another machine's rounding of a margin that was too narrow. What holds of any
frontier, however small, `test_frontier.py` asserts in less time.
"""

import csv
import math
import subprocess
import sys
import time

import numpy as np
import pytest

from dpojax.evaluation import frontier_points
from dpojax.evaluation.frontier import front_below
from dpojax.evaluation.frontier_points import at_the_bound, read_points, without_base
from dpojax.evaluation.optimum import above_limit, read_optimum

from .conftest import ROOT, environment

pytestmark = pytest.mark.long

ERRORS = 2.5  # standard errors that a conclusion may be off, or has to hold by


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """The folder of a finished frontier, the points of its methods, and the reference's."""
    folder = tmp_path_factory.mktemp("conclusions")
    done = subprocess.run(
        [
            sys.executable,
            str(ROOT / "scripts" / "frontier.py"),
            f"--config={ROOT / 'tests' / 'runs' / 'small_frontier.py'}",
            f"--workdir={folder}",
            "--workers=1",  # another core has other tests
        ],
        env=environment(flags=""),  # here it is the training that takes time
        capture_output=True,
        text=True,
        timeout=900,
    )
    assert done.returncode == 0, done.stderr
    points, base = without_base(read_points(folder / "frontier.csv"))
    return folder, frontier_points.by_method(points), base


def front(points):
    return frontier_points.arrays(frontier_points.front(points))


def test_no_point_lies_above_the_theoretical_limit(made):
    folder, methods, _ = made
    points = [at_the_bound(point) for of_method in methods.values() for point in of_method]
    measured = frontier_points.arrays(points)
    gap = above_limit(
        measured.reward,
        measured.kl,
        read_optimum(folder / "optimum.json"),
        reward_error=measured.reward_error,
        kl_error=measured.kl_error,
    )
    known = np.isfinite(gap.value)
    compared = {point.method for point, there in zip(points, known) if there}
    assert compared == {"dpo", "ppo_gt", "unlikelihood", "preferred_ft", "best_of_n"}
    assert (gap.value < ERRORS * gap.error)[known].all()


def test_best_of_n_rises_with_n_and_its_kl_stays_below_the_bound(made):
    _, methods, base = made
    before = base
    for point in methods["best_of_n"]:
        assert 0 < point.kl <= at_the_bound(point).kl + 1e-9
        assert above(point, before) > ERRORS
        before = point
    assert [point.setting for point in methods["best_of_n"]] == ["n=2", "n=4", "n=16", "n=64"]


def test_dpo_and_ppo_gain_reward_and_leave_the_reference(made):
    _, methods, base = made
    for method in ("dpo", "ppo_gt"):
        gains = [above(point, base) for point in methods[method]]
        best = methods[method][int(np.argmax(gains))]
        assert max(gains) > 2 * ERRORS
        assert best.kl > ERRORS * best.kl_error


@pytest.mark.parametrize("other", ["preferred_ft", "unlikelihood"])
def test_the_front_of_dpo_is_nowhere_below_that_of(made, other):
    _, methods, _ = made
    assert front_below(front(methods["dpo"]), front(methods[other])).sigmas < ERRORS


def test_the_implicit_reward_of_dpo_orders_held_out_responses_as_the_exact_reward_does(made):
    for setting in ("beta=0.3", "beta=1"):
        *_, last = [point for point in made[1]["dpo"] if point.setting == setting]
        assert last.rank_correlation > ERRORS * last.rank_correlation_error
    assert all(math.isnan(point.rank_correlation) for point in made[1]["ppo_gt"])


def above(point, other):
    """By how many standard errors of the difference, as if independent."""
    return (point.reward - other.reward) / math.hypot(point.reward_error, other.reward_error)


def judged(folder, *arguments):
    """What scripts/judge.py prints of a frontier, and the row of each method in its CSV."""
    done = subprocess.run(
        [sys.executable, str(ROOT / "scripts" / "judge.py"), f"--frontier={folder}", *arguments],
        env=environment(flags="") | {"COLUMNS": "100"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    with open(folder / "judged" / "win_rates.csv") as file:
        return done.stdout, {row["policy"].split()[0]: row for row in csv.DictReader(file)}


def test_one_command_judges_every_method_by_the_oracle_within_two_minutes(made):
    folder, _, _ = made
    began = time.monotonic()
    printed, rows = judged(folder)
    assert time.monotonic() - began < 120
    assert "judged by exact" in printed
    assert max(map(len, printed.splitlines())) <= max(100, len(str(folder)) + 80)
    assert {"DPO", "PPO-GT", "Unlikelihood", "Preferred-FT", "SFT"} == {*rows}
    assert float(rows["SFT"]["low"]) > 0.5  # the best of 16 of its responses


def test_the_oracle_prefers_dpo_and_ppo_to_the_sft_policy(made):
    """The win rates are about 0.6. Their binomial standard error, sqrt(0.6 * 0.4 / prompts), has to
    be small enough: with the command's own 64 prompts 1/2 is 1.6 of them away, with 256 it is 3.3.
    A prompt has two comparisons, so that the real error is smaller still.
    """
    _, rows = judged(made[0], "--methods=dpo,ppo_gt", "--limit=256")
    assert {*rows} == {"DPO", "PPO-GT"}
    for row in rows.values():
        error = (float(row["high"]) - float(row["low"])) / (2 * 1.96)
        assert error < math.sqrt(0.25 / 256)
        assert float(row["win_rate"]) - 0.5 > ERRORS * error
