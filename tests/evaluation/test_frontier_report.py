"""The report's numbers are those worked out by hand, and its claims turn with the data."""

import doctest
import html
import math
import re

import numpy as np
import pytest

from dpojax.evaluation import frontier_report, markdown
from dpojax.evaluation.frontier_points import Point
from dpojax.evaluation.frontier_report import (
    Section,
    conclusions,
    report,
    rows,
    samples_report,
    table,
)
from dpojax.evaluation.optimum import Optimum

BASE = Point("sft", "", 0, 0, 0.0, 0.0, 0.5, 0.01, 30.0, 0.4, 0.02, 1.0, math.nan)
TRUSTED = np.array([True, True, True, True, False])


def limit(trusted=TRUSTED):
    """Best reward 0.5 + 0.2 sqrt(KL), with an error of 0.01, trusted up to 9 nats."""
    kl = np.array([0.0, 1.0, 4.0, 9.0, 16.0])
    columns = dict.fromkeys(Optimum._fields, np.zeros(5))
    columns |= dict(kl=kl, reward=0.5 + 0.2 * np.sqrt(kl), frontier_error=np.full(5, 0.01))
    return Optimum(**columns)._replace(trusted=trusted)


def point(method, kl, reward, *, error=0.02, kl_error=0.1, setting="beta=0.1", step=1, stopped=1.0):
    text = 25.04, 0.3216, 0.0444, stopped, 0.651, 0.807, 0.032
    return Point(method, setting, 0, step, kl, kl_error, reward, error, *text)


DPO = [point("dpo", 1.0, 0.6), point("dpo", 4.0, 0.8), point("dpo", 12.0, 0.85)]


def cells(text):
    """The cells of a Markdown table's body."""
    lines = [line.strip("|").split(" | ") for line in text.splitlines()[2:]]
    return [[cell.strip() for cell in line] for line in lines]


def test_the_table_holds_the_numbers_worked_out_by_hand():
    """At 1 nat the limit is 0.7 with slope 0.1, so that the share is 0.1 of 0.2."""
    share_error = math.sqrt(0.02**2 + 0.25 * (0.01**2 + 0.01**2) + 0.25 * 0.01**2) / 0.2
    (first, *_) = rows(DPO, limit(), BASE)
    np.testing.assert_allclose(first.optimal, [0.7, 0.01], rtol=1e-9)
    np.testing.assert_allclose(first.share, [0.5, share_error], rtol=1e-9)
    base, one, four, last = cells(table(DPO, limit(), BASE))
    assert base[:5] == ["reference", "0", "", "0", "0.500 ± 0.010"]
    run, text = (
        "beta=0.1, seed 0, step 1",
        ["25.0", "0.322", "0.044", "100.0 %", "65.1 %", "0.81 ± 0.03"],
    )
    share = f"50.0 ± {100 * share_error:.1f} %"
    reward = ["1.00 ± 0.10", "0.600 ± 0.020", "0.700 ± 0.010", share]
    assert one == ["DPO", "1", run, *reward, *text]
    assert four[:6] == ["DPO", "3", run, "4.00 ± 0.10", "0.800 ± 0.020", "0.900 ± 0.010"]
    assert four[6].startswith("75.0 ±")
    assert last[:2] == ["DPO", "10"]
    assert last[5:7] == ["-", "-"]  # beyond 9 nats


def test_a_row_is_the_front_point_nearest_to_its_target_and_the_end_is_never_left_out():
    kls = [0.1, 0.68, 0.9, 1.2, 2.1, 20.0]
    points = [point("ppo", kl, 0.5 + 0.01 * i, step=i) for i, kl in enumerate(kls)]
    points.append(point("ppo", 1.05, 0.5, step=99))  # nearer to 1, but not on the front
    got = [(row.near, row.point.kl) for row in rows(points, limit(), BASE)]
    assert got[:2] == [(1.0, 0.9), (3.0, 2.1)]
    assert math.isnan(got[2][0])
    assert got[2][1] == 20.0
    assert len(got) == 3


def test_best_of_n_is_held_against_the_limit_at_its_bound():
    tied = point("best_of_n", 0.1, 0.6, setting="n=4")
    (row,) = rows([tied], limit(), BASE)
    kl = math.log(4) - 3 / 4
    np.testing.assert_allclose(row.point.kl, kl)
    np.testing.assert_allclose(row.share.value, 0.1 / (0.2 * math.sqrt(kl)), rtol=1e-9)
    assert cells(table([tied], limit(), BASE))[1][2] == "n=4"


def test_a_point_above_the_limit_is_said_first_and_loudly():
    """0.06 above 0.7 with an error of sqrt(0.02^2 + 0.01^2 + 0.01^2) = 0.0245 is 2.4 errors."""
    high = point("ppo", 1.0, 0.76, setting="kl=0.1", step=7)
    first = conclusions([*DPO, high], limit(), BASE)[0]
    assert first.startswith("**WARNING: 1 of 3 points lie above the theoretical limit")
    assert "PPO (learned reward), kl=0.1, seed 0, step 7: reward 0.760 at 1.00 nats" in first
    assert "0.060 above (2.4 standard errors)" in first
    assert "1 points could not be compared" in first  # the one at 12 nats
    assert "about 0.1;" in first  # 3 times 2.3 %
    lower = [*DPO, high._replace(reward=0.74)]  # 1.6 errors
    first = conclusions(lower, limit(), BASE)[0]
    assert first.startswith("No point of the 3 that can be compared lies above")


def test_where_nothing_is_known_of_the_limit_the_report_says_so():
    nowhere = limit(np.zeros(5, bool))
    assert conclusions(DPO, nowhere, BASE)[0].startswith("**Not known: whether a point lies above")
    unknown = [p._replace(reward_error=math.nan) for p in DPO]
    assert conclusions(unknown, limit(), BASE)[0].startswith("**Not known")
    text = report(DPO, nowhere, BASE, {})
    assert "**The limit can be trusted nowhere**" in text
    assert "nan" not in text


def about(points, other):
    (text,) = [t for t in conclusions(points, limit(), BASE)[1:] if other in t]
    return text


def test_which_method_lies_below_turns_with_the_data():
    """0.1 apart at 4 nats with errors of 0.0224 and 0.0283, so 2.8 of their sum in quadrature."""
    other = lambda shift: [point("ppo_gt", p.kl, p.reward + shift, kl_error=0.0) for p in DPO[:2]]
    dpo = [p._replace(kl_error=0.0) for p in DPO[:2]]
    below = about([*dpo, *other(0.1)], "PPO-GT")
    assert below.startswith("**DPO lies below PPO-GT**, by up to 0.100 at ")
    assert f"up to {0.1 / math.hypot(0.02, 0.02):.1f} combined standard errors" in below
    assert "PPO-GT is nowhere below DPO" in below
    assert "between 1.00 and 4.00 nats" in below
    above = about([*dpo, *other(-0.1)], "PPO-GT")
    assert above.startswith("DPO is nowhere below PPO-GT")
    assert "PPO-GT lies below DPO, by up to 0.100" in above
    level = about([*dpo, *other(0.05)], "PPO-GT")  # 1.8 errors
    assert level.startswith("DPO is nowhere below PPO-GT by more than 2 combined standard errors")
    assert "PPO-GT is nowhere below DPO" in level


def test_a_comparison_that_cannot_be_made_is_not_made():
    far = [point("unlikelihood", 20.0, 0.9)]
    assert "no KL in common: not compared" in about([*DPO, *far], "Unlikelihood")
    unknown = [point("unlikelihood", p.kl, p.reward - 0.1, error=math.nan) for p in DPO]
    assert "a standard error is unknown" in about([*DPO, *unknown], "Unlikelihood")
    assert "no point of DPO" in " ".join(conclusions(far, limit(), BASE))


def test_a_front_that_runs_on_higher_than_that_of_dpo_is_reported():
    online = [point("online_dpo", 2.0, 0.65), point("online_dpo", 15.0, 0.95)]
    text = about([*DPO, *online], "Online DPO")
    assert "**Beyond that Online DPO gets higher**: to 0.950 at 15.00 nats" in text
    assert "0.850 (at 12.00)" in text
    online[1] = online[1]._replace(reward=0.9)  # 1.8 errors
    assert "Beyond" not in about([*DPO, *online], "Online DPO")


def test_points_that_are_not_numbers_and_texts_without_their_end_are_counted():
    broken = point("ppo", math.nan, 0.9, setting="kl=0.02")
    cut = point("ppo", 1.0, 0.6, setting="kl=0.3", stopped=0.5)
    text = " ".join(conclusions([*DPO, broken, cut], limit(), BASE))
    assert "**1 of 5 points have no finite KL or reward**" in text
    assert "the first is PPO (learned reward), kl=0.02" in text
    assert "At 1 of 5 points fewer than 95% of the responses" in text
    assert "kl=0.3, seed 0, step 1 with 50%" in text
    clean = " ".join(conclusions(DPO, limit(), BASE))
    assert "no finite" not in clean
    assert "fewer than" not in clean


def test_samples_stand_together_by_prompt_and_nothing_in_them_is_markup():
    text = "good <br /> | *film*\n\n# [x](y) `z`"
    samples = {
        "dpo": {"I saw": [(text, 0.9), ("two", math.nan)], "It": [("was", 0.5)]},
        "ppo": {"I saw": [("bad", 0.25)]},
    }
    got = samples_report(samples)
    first, second = got.index("> I saw"), got.index("> It")
    lines = [line for line in got[first:second].splitlines() if line.startswith("| ")][2:]
    assert len(lines) == 3
    method, reward, response = re.fullmatch(r"\| (.*?) +\| (\S+) +\| (.*?) *\|", lines[0]).groups()
    assert (method, reward) == ("DPO", "0.900")
    assert not re.search(r"(?<!\\)[|*#`\[\]<>]", response)
    assert html.unescape(re.sub(r"\\(.)", r"\1", response)) == " ".join(text.split())
    assert "| DPO " in lines[1]
    assert "| PPO (learned reward) | 0.250 " in lines[2]
    assert "no sample for this prompt" in got[second:]


@pytest.mark.parametrize("seconds", [None, {"sft": 61.4, "dpo": 4000.0}])
def test_what_was_run_and_on_what_and_how_long_are_tables(seconds):
    what = Section("Models", "Of this run.", ["model", "parameters"], [["policy", "148,000"]])
    machine = {"jax": "0.10.2", "devices": 8}
    got = report(DPO, limit(), BASE, machine, sections=[what], seconds=seconds)
    assert re.search(r"### Models\n\nOf this run\.\n\n\| model +\| parameters \|\n", got)
    assert re.search(r"\| jax +\| 0\.10\.2 \|\n\| devices +\| 8 +\|", got)
    assert ("### Time" in got) == (seconds is not None)
    if seconds is not None:
        times = re.findall(r"\| (sft|dpo) +\| (\S+)", got)
        assert times == [("sft", "0:01:01"), ("dpo", "1:06:40")]


def test_why_a_run_failed_is_one_item_of_a_list_and_no_markup():
    got = report(DPO, limit(), BASE, {}, failed={"ppo_gt": "loss is nan\n# step 3 | *all* of it"})
    (item,) = re.findall(r"^\* ppo.*$", got, re.MULTILINE)
    assert item == r"* ppo\_gt: loss is nan \# step 3 \| \*all\* of it"
    assert "\n# step" not in got


@pytest.mark.parametrize("module", [frontier_report, markdown])
def test_examples_in_the_docstrings_run(module):
    result = doctest.testmod(module)
    assert (result.attempted > 0, result.failed) == (True, 0)
