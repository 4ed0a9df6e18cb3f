"""A recipe small enough for a test: what it writes, and how it goes on after a kill."""

import csv
import json
import os
import pathlib
import shlex
import signal
import subprocess
import sys
import time
from typing import NamedTuple

import pytest

from dpojax.config.errors import ConfigError
from dpojax.recipes.make import make_recipe

from ..runs.conftest import ROOT, environment
from .conftest import small_config, small_recipe

pytestmark = pytest.mark.long
CONFIG = """
from tests.recipes.conftest import small_config, small_recipe

def get_config():
    return small_config({comparisons!r})

def recipe(config):
    return small_recipe(config)
"""


def script(tmp_path, comparisons, folder):
    path = tmp_path / "small.py"
    path.write_text(CONFIG.format(comparisons=comparisons))
    command = [sys.executable, str(ROOT / "scripts" / "recipe.py")]
    env = environment() | {"PYTHONPATH": f"{ROOT}:{os.environ.get('PYTHONPATH', '')}"}
    return [*command, f"--config={path}", f"--workdir={folder}"], env


def rows_of(folder):
    with open(folder / "win_rates.csv", newline="") as file:
        return list(csv.DictReader(file))


class Made(NamedTuple):
    """A recipe that one process made, which was killed on its way and started again."""

    folder: pathlib.Path
    env: dict
    sft_before: int  # when the first run ended, before the second start
    sft_after: int  # and behind it


@pytest.fixture(scope="module")
def made(tmp_path_factory, comparisons):
    path = tmp_path_factory.mktemp("made")
    folder = path / "recipe"
    command, env = script(path, comparisons, folder)
    process = subprocess.Popen(command, env=env, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
    started = folder / "runs" / "dpo-beta-0.5" / "config.json"
    deadline = time.monotonic() + 200
    while not started.exists() and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.05)
    process.send_signal(signal.SIGKILL)
    _, errors = process.communicate()
    assert started.exists(), errors.decode()
    done = folder / "runs" / "sft" / "finished.json"
    before = done.stat().st_mtime_ns
    ended = subprocess.run(command, env=env, capture_output=True, text=True, timeout=500)
    assert ended.returncode == 0, ended.stderr
    return Made(folder, env, before, done.stat().st_mtime_ns)


def results_of(folder):
    """Every number and every file that does not hold a time."""
    files = [*folder.glob("*.csv"), *folder.glob("evaluations/*/*.csv")]
    files += folder.glob("evaluations/*/samples.jsonl")
    files += folder.glob("models/*/*.safetensors")
    return {str(path.relative_to(folder)): path.read_bytes() for path in files}


def test_a_recipe_that_is_killed_goes_on_to_its_report_and_makes_nothing_twice(made, comparisons):
    folder = made.folder
    assert made.sft_after == made.sft_before
    rows = rows_of(folder)
    labels = {(row["evaluation"], row["policy"], row["best_of"]) for row in rows}
    assert labels == {
        ("tests", "SFT", "1"),
        ("tests", "SFT", "4"),
        ("tests", "DPO", "1"),
        ("tests", "PPO", "1"),
        ("steps", "DPO at 1/2", "1"),
        ("steps", "DPO at 2/2", "1"),
    }
    assert len(rows) == 4 * 2 + 2
    assert all(0 <= float(r["low"]) <= float(r["win_rate"]) <= float(r["high"]) <= 1 for r in rows)
    middle = json.loads((folder / "models" / "dpo-beta-0.5-at-0.5" / "checkpoint.json").read_text())
    assert middle == {"step": 2, "steps": 4}
    report = (folder / "report.md").read_text()
    for name in ("tests", "steps"):
        assert f"evaluations/{name}/report.md" in report
    for line in report.splitlines():
        if line.startswith("!["):
            assert (folder / line.split("(")[-1].rstrip(")")).stat().st_size > 5_000
    _each_command_of_the_plan_can_be_run_by_hand(folder, made.env)
    config = small_config(comparisons, **{"recipe.max_new_tokens": 13})
    with pytest.raises(ConfigError, match=r"recipe\.max_new_tokens: 12 -> 13"):
        make_recipe(config, small_recipe(config), folder)


def _each_command_of_the_plan_can_be_run_by_hand(folder, env):
    """The last one, whose output is gone, makes the same again."""
    plan = json.loads((folder / "plan.json").read_text())
    last, text = plan["jobs"][-1], (folder / "report.md").read_text()
    (folder / "report.md").unlink()
    words = [sys.executable, *shlex.split(last["command"])[1:]]
    subprocess.run(words, env=env, check=True, capture_output=True)
    again = (folder / "report.md").read_text()
    assert again.split("## Time")[0] == text.split("## Time")[0]


def test_two_workers_make_bit_for_bit_what_one_makes(tmp_path, comparisons, made):
    command, env = script(tmp_path, comparisons, tmp_path / "two")
    ended = subprocess.run(
        [*command, "--workers=2"], env=env, capture_output=True, text=True, timeout=500
    )
    assert ended.returncode == 0, ended.stderr
    results = results_of(tmp_path / "two")
    assert len([name for name in results if name.endswith(".safetensors")]) >= 5
    assert results.keys() >= {"win_rates.csv", "evaluations/tests/samples.jsonl"}
    assert results == results_of(made.folder)
