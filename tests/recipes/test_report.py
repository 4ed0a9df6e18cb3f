"""The report of a recipe, from folders that are made up: its numbers are those of its parts."""

import csv
import json

import pytest

from dpojax import storage
from dpojax.config.resolved import as_json
from dpojax.recipes import figures, report
from dpojax.recipes.plan import plan_recipe
from dpojax.recipes.recipe import Evaluation, Recipe, Side, Training, checkpoint_sides

from .conftest import small_config, write_lines

COLUMNS = "policy,temperature,best_of,win_rate,low,high,prompts"
RATES = ["SFT,0.0,1,0.4,0.3,0.5,8", "SFT,1.0,1,0.25,0.2,0.3,8", "SFT,1.0,4,0.75,0.7,0.8,8"]
AT_STEPS = ["DPO at 1/2,1.0,1,0.5,0.4,0.6,8", "DPO at 2/2,1.0,1,0.625,0.5,0.7,8"]


@pytest.fixture
def settings(tmp_path):
    """A folder with what the jobs before the report would leave, and the report's settings."""
    config = small_config("pairs.jsonl", **{"preference.steps": 0, "preference.epochs": 3})
    dpo = Side("DPO", "dpo")
    recipe = Recipe(
        "Title",
        [Training("sft", "sft", start=""), Training("dpo", "preference")],
        [
            Evaluation("tests", "Tests", [Side("SFT", "sft", best_of=(1,))], (0.0, 1.0)),
            Evaluation("steps", "Steps", checkpoint_sides(config, [dpo]), (1.0,)),
        ],
        "It shows nothing.",
        ["dpo"],
    )
    plan = plan_recipe(config, recipe, storage.as_path(tmp_path))
    for name, lines in (("tests", RATES), ("steps", AT_STEPS)):
        folder = tmp_path / "evaluations" / name
        folder.mkdir(parents=True)
        (folder / "win_rates.csv").write_text("\n".join([COLUMNS, *lines]) + "\n")
    for name, stage in (("sft", "sft"), ("dpo", "preference")):
        run = config.copy_and_resolve_references()
        run.stages = (stage,)
        steps = [
            {"split": "eval", "step": n, "loss": 1 / (n + 1), "kl/per_token": n / 100}
            for n in (0, 6, 12)
        ]
        write_lines(tmp_path / "runs" / name / stage / "metrics.jsonl", steps)
        (tmp_path / "runs" / name / "config.json").write_text(json.dumps(as_json(run)))
    middle = tmp_path / "models" / "dpo-at-0.5"
    middle.mkdir(parents=True)
    (middle / "checkpoint.json").write_text(json.dumps({"step": 6, "steps": 12}))
    counts = {"tests": 8, "comparisons": 30, "judge": 0}
    content = {"records": counts, "prompts": counts}
    content |= {"test_references_by_people": 3, "test_prompts_of_any_length": 9}
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "data.json").write_text(json.dumps(content))
    (tmp_path / "seconds.json").write_text(json.dumps({"passed": 90.0, "jobs": {"sft": 60.0}}))
    return plan.files[str(tmp_path / "jobs" / "report.json")]


def cells(text):
    """The cells of each line of all tables of a report."""
    lines = [line for line in text.splitlines() if line.startswith("|")]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]


def test_the_tables_have_the_win_rates_of_every_evaluation(settings, tmp_path):
    text = report.write(settings)
    assert ["policy", "temperature 0.0", "temperature 1.0"] in cells(text)
    assert ["SFT", "40.0 % (30.0 to 50.0)", "25.0 % (20.0 to 30.0)"] in cells(text)
    assert ["SFT, best of 4", "", "75.0 % (70.0 to 80.0)"] in cells(text)
    assert "Of 9 test prompts of any length, 3 have a reference" in text
    assert ["prompts to judge on", "8", "8"] in cells(text)
    assert "comparisons for the judge" not in text
    assert "It shows nothing." in text
    with open(tmp_path / "win_rates.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["evaluation"] for row in rows] == ["tests"] * 3 + ["steps"] * 2
    assert [row["win_rate"] for row in rows] == ["0.4", "0.25", "0.75", "0.5", "0.625"]


def test_the_figures_have_the_steps_of_checkpoints_and_epochs_of_evaluations(
    settings, tmp_path, monkeypatch
):
    drawn = {}
    monkeypatch.setattr(report, "draw_over_steps", lambda points, *_: drawn.update(steps=points))
    monkeypatch.setattr(
        report, "draw_learning", lambda curves, label, _: drawn.update(curves=curves, label=label)
    )
    report.write(settings)
    assert drawn["steps"] == {"DPO": [(6, 0.5, 0.4, 0.6), (12, 0.625, 0.5, 0.7)]}
    assert drawn["label"] == "epoch"
    assert [*drawn["curves"]["DPO at 2/2"].epochs] == [0, 1.5, 3]
    assert [*drawn["curves"]["DPO at 2/2"].kl] == [0, 0.06, 0.12]
    with open(tmp_path / "curves.csv", newline="") as file:
        assert [row["epoch"] for row in csv.DictReader(file)] == ["0.0", "1.5", "3.0"]


def test_figures_are_written_as_png_and_pdf(settings, tmp_path):
    text = report.write(settings)
    for name in ("win_rate_over_steps", "loss_and_kl"):
        assert (tmp_path / f"{name}.png").stat().st_size > 10_000
        assert (tmp_path / f"{name}.pdf").stat().st_size > 5_000
        assert f"({name}.png)" in text


def test_a_rate_of_one_and_its_interval_are_inside_the_axes(monkeypatch):
    saved = []
    monkeypatch.setattr(figures, "save", lambda figure, *_: saved.append(figure))
    points = [(0, 0.99, 0.9, 1.0), (5, 0.0, 0.0, 0.1)]
    figures.draw_over_steps({"A": points}, "T", [])
    (axes,) = saved[0].axes
    low, high = axes.get_ylim()
    assert low <= 0
    assert high > 1
