"""What came of a recipe: report.md, win_rates.csv, curves.csv and figures, from its folders.

    python -m dpojax.recipes.report --settings=WORKDIR/jobs/report.json

The recipe's last job; it may be called again at any time.
"""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Mapping, Sequence
from typing import Any

from dpojax import storage
from dpojax.config.command_line import ArgumentParser
from dpojax.config.saved import read_run_config
from dpojax.evaluation.judging.bootstrap import Measured
from dpojax.evaluation.judging.cautions import percent
from dpojax.evaluation.markdown import escaped_table
from dpojax.jobs.progress import read_seconds
from dpojax.recipes.configs import DATA
from dpojax.recipes.data import COMPARISONS, COUNTS, DEMONSTRATIONS, HELD_OUT, JUDGE_COMPARISONS
from dpojax.recipes.figures import LearningCurve, draw_learning, draw_over_steps
from dpojax.recipes.plan import CHECKPOINT, REPORT
from dpojax.recipes.recipe import SHIFTED, TESTS
from dpojax.runs.command import run_command
from dpojax.training.metrics import read_metrics

WIN_RATES, CURVES = "win_rates.csv", "curves.csv"
BY_EPOCH = "loss_and_kl"
SUFFIXES = (".png", ".pdf")
PARTS = {
    DEMONSTRATIONS: "demonstrations for SFT",
    COMPARISONS: "comparisons to train on",
    HELD_OUT + COMPARISONS: "comparisons held out of training",
    JUDGE_COMPARISONS: "comparisons for the judge",
    TESTS: "prompts to judge on",
    SHIFTED: "prompts of the other domain",
}
METRICS = {
    "loss": "loss (of its own beta)",
    "rewards/accuracies": "accuracy",
    "kl/per_token": "KL per token",
}
METRICS |= {"samples/reward": "reward of samples", "samples/kl": "KL of samples"}

Row = Mapping[str, str]


def write(settings: Mapping[str, Any]) -> str:
    """Write everything; return the report.

    Args:
      settings: as `recipes.plan` writes them.
    """
    folder = storage.as_path(settings["folder"])
    rates = {e["name"]: _read_rates(e["folder"]) for e in settings["evaluations"]}
    lines = [{"evaluation": name} | dict(row) for name, rows in rates.items() for row in rows]
    _write_csv(folder / WIN_RATES, lines)
    parts = [f"# {settings['title']}", settings["shows"], _data_text(folder, settings["judge"])]
    for evaluation in settings["evaluations"]:
        parts.append(_evaluation_text(folder, evaluation, rates[evaluation["name"]]))
    if settings["curves"]:
        parts.append(_curves_text(folder, settings["curves"]))
    parts += [_trainings_text(settings["trainings"]), _seconds_text(folder)]
    text = "\n\n".join(filter(None, parts)) + "\n"
    storage.write_text(folder / REPORT, text)
    return text


def _read_rates(folder: str) -> list[Row]:
    text = storage.read_text(storage.as_path(folder) / WIN_RATES)
    return list(csv.DictReader(io.StringIO(text)))


def _data_text(folder: storage.Path, judge: str) -> str:
    counts = storage.read_json(folder / DATA / COUNTS)
    rows = []
    for name, title in PARTS.items():
        if counts["records"].get(name):
            numbers = counts["records"][name], counts["prompts"][name]
            rows.append([title, *(f"{number:,}" for number in numbers)])
    people, tests = counts["test_references_by_people"], counts["test_prompts_of_any_length"]
    whose = (
        f"Of {tests:,} test prompts of any length, {people:,} have a reference that stands alone "
        "or is named as one; for the others it is the better response of their first comparison. "
        "No prompt is in two parts."
    )
    table = escaped_table(["part", "records", "prompts"], rows)
    return f"The judge is `{judge}`.\n\n{table}\n\n{whose}"


def _evaluation_text(folder: storage.Path, evaluation: Mapping, rows: Sequence[Row]) -> str:
    """A table with a line per policy and a column per temperature, and the figure."""
    place = f"evaluations/{evaluation['name']}"
    title = f"## {evaluation['title']}"
    links = f"All measures, and examples: [{place}/report.md]({place}/report.md)"
    if evaluation["checkpoints"]:
        figure = _over_steps(folder, evaluation, rows)
    else:
        figure = f"{place}/win_rates.png"
    temperatures = list(dict.fromkeys(row["temperature"] for row in rows))
    heading = ["policy", *(f"temperature {x}" if x else "" for x in temperatures)]
    table = []
    for name in dict.fromkeys(map(_policy, rows)):
        cells = {
            row["temperature"]: percent(_win_rate(row)) for row in rows if _policy(row) == name
        }
        table.append([name, *(cells.get(x, "") for x in temperatures)])
    image = f"![{evaluation['title']}]({figure})"
    note = "Win rates, in brackets 95 % intervals."
    return "\n\n".join([title, note, escaped_table(heading, table), image, links])


def _policy(row: Row) -> str:
    best = int(float(row.get("best_of") or 1))
    return row["policy"] + (f", best of {best}" if best > 1 else "")


def _win_rate(row: Row) -> Measured:
    return Measured(*(_number(row[name]) for name in ("win_rate", "low", "high")))


def _over_steps(folder: storage.Path, evaluation: Mapping, rows: Sequence[Row]) -> str:
    """Draw the win rate over training steps; return the figure's name."""
    by_side = {row["policy"]: row for row in rows}
    points: dict[str, list[tuple[float, ...]]] = {}
    for checkpoint in evaluation["checkpoints"]:
        rate = _win_rate(by_side[checkpoint["side"]])
        if math.isfinite(rate.value):
            points.setdefault(checkpoint["curve"], []).append((_step_of(checkpoint), *rate))
    name = f"win_rate_over_{evaluation['name']}"
    draw_over_steps(points, evaluation["title"], [folder / f"{name}{end}" for end in SUFFIXES])
    return f"{name}.png"


def _step_of(checkpoint: Mapping) -> int:
    """Where in its training run a policy stands."""
    there = storage.as_path(checkpoint["model"]) / CHECKPOINT
    if there.exists():
        return storage.read_json(there, fields={"step": int})["step"]
    return _evaluations(checkpoint["workdir"])[-1]["step"]


def _evaluations(workdir: str, stage: str = "") -> list[dict]:
    """The evaluations of a run's last stage."""
    run = storage.as_path(workdir)
    return read_metrics(run / (stage or read_run_config(run).stages[-1]), "eval")


def _curves_text(folder: storage.Path, trainings: Sequence[Mapping]) -> str:
    curves, table, by_epoch = {}, [], True
    for training in trainings:
        lines = _evaluations(training["workdir"], training["stage"])
        config = read_run_config(storage.as_path(training["workdir"]))[training["stage"]]
        by_epoch &= not config.steps
        share = config.epochs / lines[-1]["step"] if not config.steps else 1.0
        values = [[line.get(name, math.nan) for line in lines] for name in ("loss", "kl/per_token")]
        epochs = [line["step"] * share for line in lines]
        curves[training["label"]] = LearningCurve(epochs, *values)
        for epoch, loss, kl in zip(epochs, *values):
            table.append({"run": training["name"], "epoch": epoch, "loss": loss, "kl": kl})
    _write_csv(folder / CURVES, table)
    x_label = "epoch" if by_epoch else "optimiser step"
    draw_learning(curves, x_label, [folder / f"{BY_EPOCH}{end}" for end in SUFFIXES])
    note = (
        "Held-out loss, which means another thing at another beta, and KL(policy || SFT) per "
        f"token, exact at the contexts of held-out responses ({CURVES})."
    )
    return f"## Loss and KL\n\n{note}\n\n![Loss and KL by {x_label}]({BY_EPOCH}.png)"


def _trainings_text(trainings: Sequence[Mapping]) -> str:
    """The last evaluation of every training run."""
    heading, rows = ["run", "stage", "steps", *METRICS.values()], []
    for training in trainings:
        last = _evaluations(training["workdir"], training["stage"])[-1:]
        values = last[0] if last else {}
        numbers = [values.get(name, math.nan) for name in METRICS]
        cells = ["" if math.isnan(number) else f"{number:.3f}" for number in numbers]
        rows.append([training["name"], training["stage"], str(values.get("step", "")), *cells])
    used = [i for i in range(len(heading)) if i < 3 or any(row[i] for row in rows)]
    table = escaped_table([heading[i] for i in used], [[row[i] for i in used] for row in rows])
    return f"## Training runs, at their last evaluation on held-out data\n\n{table}"


def _seconds_text(folder: storage.Path) -> str:
    seconds = read_seconds(folder)
    rows = [[name, f"{x / 60:.1f}"] for name, x in seconds.jobs.items()]
    total = f"{sum(seconds.jobs.values()) / 60:.0f} minutes in all jobs."
    return f"## Time\n\n{escaped_table(['job', 'minutes'], rows)}\n\n{total}"


def _write_csv(path: storage.Path, rows: Sequence[Mapping[str, Any]]) -> None:
    text = io.StringIO()
    names = dict.fromkeys(name for row in rows for name in row)
    table = csv.DictWriter(text, list(names), lineterminator="\n")
    table.writeheader()
    table.writerows(rows)
    storage.write_text(path, text.getvalue())


def _number(text: str) -> float:
    return float(text) if text else math.nan


def main(arguments: Sequence[str] | None = None) -> None:
    """The command of a job: see above."""
    parser = ArgumentParser(
        prog="python -m dpojax.recipes.report", description="Write the report of a recipe."
    )
    parser.add_argument("--settings", required=True, help="a JSON file of the plan")
    options = parser.parse_args(arguments)
    path = storage.as_path(options.settings, "--settings")
    with storage.damage_named(path):
        write(storage.read_json(path, fields={"folder": str, "evaluations": list}))


if __name__ == "__main__":
    run_command(main)
