"""The table and the figure of a sweep's members.

    python -m dpojax.sweeps.table --workdir=runs/sweep

writes them for the members that are finished or have failed: the command of the last job of a
sweep. Where members differ in their seed alone, seeds.csv has the means.
"""

from __future__ import annotations

import csv
import io
import math
import textwrap
from collections.abc import Collection, Mapping, Sequence
from typing import Any, NamedTuple

from dpojax import storage
from dpojax.config.command_line import ArgumentParser, UsageError
from dpojax.config.resolved import workdir_path
from dpojax.evaluation.judging.bootstrap import SIGNED, mean_over_prompts
from dpojax.evaluation.sweep_figure import draw
from dpojax.runs.command import run_command
from dpojax.runs.workdirs import FINISHED, failure_of
from dpojax.stages.samples import WIN_SCORE, last_samples
from dpojax.stages.wins import RATE as WIN_RATE
from dpojax.sweeps.best import FILE as BEST
from dpojax.sweeps.best import (
    choose_best,
    describe_best,
    measure_keys,
    parse_best,
)
from dpojax.sweeps.hparams import write_hparams
from dpojax.sweeps.plan import read_plan
from dpojax.sweeps.seeds import Evaluations, Setting, mean_lines, seeds_csv, settings_of
from dpojax.tables import WIDTH, blocks_table, terminal_width
from dpojax.training.metrics import RESERVED, read_metrics
from dpojax.training.trackers import TENSORBOARD

TABLE, FIGURE, SEED_MEANS = "sweep.csv", "sweep.png", "seeds.csv"
OVER_SEEDS = "Means over seeds, with Student's 95 % intervals, which end at 0 and 100 % of a share."
# The highest win rate of a member minus this member's, paired by prompt, with a 95 % interval.
BEHIND = "samples/behind_best"


class Column(NamedTuple):
    """A column of the printed table, shown where the metric was logged."""

    heading: str
    metric: str  # of the kept evaluation
    scale: float
    number_format: str
    with_interval: bool = False  # the ends are metrics, too: NAME_low and NAME_high
    with_error: bool = False  # the standard error is a metric, too: NAME_error

    def cell(self, line: Mapping[str, float]) -> str:
        """The metric of an evaluation, and its interval or error where that is known."""
        ends = ("_low", "_high") if self.with_interval else ("_error",) if self.with_error else ()
        values = [line.get(self.metric + end, math.nan) for end in ("", *ends)]
        value, *spread = (format(self.scale * x, self.number_format) for x in values)
        if not ends or math.isnan(values[-1]):
            return value
        return f"{value} ± {spread[0]}" if self.with_error else f"{value} ({' to '.join(spread)})"


MARGINS = "rewards/margins"
COLUMNS = (
    Column("held-out loss", "loss", 1, "z.4f"),
    Column("accuracy, %", "rewards/accuracies", 100, "z.1f"),
    Column("accuracy, %", "accuracy", 100, "z.1f"),
    Column("margin", MARGINS, 1, "+z.3f"),  # of several units, see `_with_unit`
    Column("KL, nats/token", "kl/per_token", 1, "z.4f"),
    Column("chosen less likely, %", "displacement", 100, "z.1f"),
    Column("reward of samples", "samples/reward", 1, "z.3f", with_error=True),
    Column("KL of samples, nats", "samples/kl", 1, "z.2f", with_error=True),
    Column("win rate, %", "samples/win_rate", 100, "z.1f", with_interval=True),
    Column("behind the best, %", BEHIND, 100, "z.1f", with_interval=True),
)


def write_table(folder: storage.Path, plan: Mapping[str, Any], best: str = "") -> str:
    """Write sweep.csv and sweep.png of the members that are finished or have failed.

    With members that differ in their seed alone, also seeds.csv; with a metric, also best.json.

    Args:
      plan: what sweep.json holds.
      best: a metric, as `parse_best` takes it; "" takes that of the best.json that is there, whose
        best member may no longer be the best, and names none where there is no such file.

    Returns:
      the table as text, in blocks of columns where the terminal is too narrow; then why members
      failed, and the best one, or why none can be named.
    """
    stage, members = plan["config"]["stages"][-1], plan["members"]
    failures = {name: why for name in members if (why := failure_of(folder / name))}
    curves = {
        name: read_metrics(folder / name / stage, "eval")
        for name in members
        if name in failures or (folder / name / FINISHED).exists()
    }
    evaluations = {
        name: kept_evaluation(folder / name / stage, lines)
        for name, lines in curves.items()
        if lines and name not in failures
    }
    add_differences(evaluations, {name: folder / name / stage for name in evaluations})
    storage.write_text(folder / TABLE, _csv(evaluations, members, failures))
    has_one_measure = not measure_keys(list(members.values()), stage)
    if curves:
        draw(
            curves,
            folder / FIGURE,
            failed=failures,
            changes=members,
            results=evaluations,
            same_measure=has_one_measure,
        )
    if TENSORBOARD in plan["config"].get("trackers", ()):
        write_hparams(folder, members, evaluations)
    settings = settings_of(members, stage, plan["config"]["seed"])
    units = {_reward_unit(folder / name / stage) for name in evaluations}
    columns = _with_unit(_columns(evaluations, has_one_measure), units)
    if len(settings) < len(members):
        storage.write_text(folder / SEED_MEANS, seeds_csv(settings, evaluations))
        lines = blocks_table(_rows_of_seeds(settings, evaluations, columns), terminal_width())
        lines.append(OVER_SEEDS)
    else:
        lines = blocks_table(_rows(evaluations, failures, columns), terminal_width())
    width = terminal_width() or WIDTH
    lines += [
        textwrap.shorten(f"{name}: {why}", width, placeholder=" ...")
        for name, why in failures.items()
    ]
    if text := _best_text(best, plan, settings, evaluations, folder):
        lines += ["", text]
    return "\n".join(lines)


def _best_text(
    best: str,
    plan: Mapping[str, Any],
    settings: Sequence[Setting],
    evaluations: Evaluations,
    folder: storage.Path,
) -> str:
    """Write best.json anew; say which member is best, or why none is. "" if nobody asks."""
    best = best or _written_best(folder)
    (folder / BEST).unlink(missing_ok=True)
    try:
        members = list(plan["members"].values())
        criterion = parse_best(best, plan["config"]["stages"][-1], members)
        if criterion is None:
            return ""
        chosen = choose_best(criterion, settings, evaluations)
    except UsageError as error:  # the table is shown all the same
        return str(error)
    content = chosen or {"metric": criterion.metric, "setting": None}
    storage.write_json(folder / BEST, {"criterion": best} | content)
    if chosen:
        return describe_best(chosen, folder)
    return f"no setting has a finite eval/{criterion.metric} for each of its seeds"


def _written_best(folder: storage.Path) -> str:
    """The --best of the call that wrote best.json; "" where there is none that can be read."""
    try:
        return storage.read_json(folder / BEST, fields={"criterion": str})["criterion"]
    except (FileNotFoundError, storage.StorageError):
        return ""


def files_text(folder: storage.Path) -> str:
    """Which files `write_table` has written."""
    names = (TABLE, SEED_MEANS, BEST, FIGURE)
    return f"{folder}: {', '.join(name for name in names if (folder / name).exists())}"


def kept_evaluation(folder: storage.Path, lines: Sequence[Mapping[str, float]]) -> Mapping:
    """The evaluation of the step that a stage kept (`keep_best`), by default the last one.

    Args:
      folder: of the stage, which is finished.
      lines: its evaluations, one or more.
    """
    best = _read_summary(folder).get("kept")
    step = best["step"] if best else None
    return next((line for line in lines if line["step"] == step), lines[-1])


def _read_summary(folder: storage.Path) -> Mapping[str, Any]:
    """summary.json of a stage; {} where a stage leaves none."""
    path = folder / "summary.json"
    return storage.read_json(path) if path.is_file() else {}


def _reward_unit(folder: storage.Path) -> str:
    """The unit of the reward that a stage's loss trains; "" where its summary does not say."""
    return _read_summary(folder).get("reward", {}).get("unit", "")


def add_differences(
    evaluations: dict[str, Mapping[str, float]], folders: Mapping[str, storage.Path]
) -> None:
    """Add how far each member's win rate is behind the highest, where a judge compared samples.

    All members answered the same prompts, so the difference is paired by prompt.

    Args:
      evaluations: those that are kept, by member; `BEHIND` is put into them.
      folders: of the members' stages.
    """
    rates = {name: line.get(WIN_RATE, math.nan) for name, line in evaluations.items()}
    rates = {name: rate for name, rate in rates.items() if math.isfinite(rate)}
    if len(rates) < 2:
        return
    scores = {name: _win_scores(folders[name], evaluations[name]["step"]) for name in rates}
    best = max(rates, key=rates.__getitem__)
    for name in rates:
        prompts = [prompt for prompt in scores[best] if prompt in scores[name]]
        gaps = [scores[best][prompt] - scores[name][prompt] for prompt in prompts]
        measured = mean_over_prompts(gaps, range(len(gaps)), SIGNED)
        behind = zip(("", "_low", "_high"), measured)
        evaluations[name] = evaluations[name] | {f"{BEHIND}{end}": x for end, x in behind}
    # The best is not behind itself, with certainty.
    evaluations[best] = evaluations[best] | {BEHIND: 0.0}
    for end in ("_low", "_high"):
        evaluations[best] |= {f"{BEHIND}{end}": math.nan}


def _win_scores(folder: storage.Path, step: int) -> dict[str, float]:
    """The share of its comparisons that each prompt's responses won, at a step."""
    return {
        line["prompt"]: line[WIN_SCORE] for line in last_samples(folder, step) if WIN_SCORE in line
    }


def _csv(
    evaluations: Evaluations, members: Mapping[str, Mapping], failures: Mapping[str, str]
) -> str:
    """The keys that members change, all metrics of their kept evaluations, and why some failed."""
    keys = list(dict.fromkeys(key for changes in members.values() for key in changes))
    metrics = sorted({key for line in evaluations.values() for key in line} - set(RESERVED))
    table = io.StringIO()
    out = csv.writer(table)
    out.writerow(["member", *keys, "step", *metrics, "failed"])
    for name, changes in members.items():
        if name in evaluations or name in failures:
            line = evaluations.get(name, {})
            values = [line.get(metric, math.nan) for metric in metrics]
            changed = [changes.get(key, "") for key in keys]
            out.writerow([name, *changed, line.get("step", ""), *values, failures.get(name, "")])
    return table.getvalue()


def _columns(evaluations: Evaluations, has_one_measure: bool) -> list[Column]:
    """The columns of the metrics that were logged; no loss where members' losses differ in meaning.

    A margin stays; it is of each member's own reward.
    """
    columns = [c for c in COLUMNS if any(c.metric in line for line in evaluations.values())]
    return [column for column in columns if has_one_measure or column.metric != "loss"]


def _with_unit(columns: Sequence[Column], units: Collection[str]) -> list[Column]:
    """The columns; the margin's heading has its unit where all members have the same one."""
    unit = next(iter(units)) if len(units) == 1 else ""
    if not unit:
        return list(columns)
    return [
        column._replace(heading=f"{column.heading}, {unit}") if column.metric == MARGINS else column
        for column in columns
    ]


def _rows(
    evaluations: Evaluations, failures: Mapping[str, str], columns: list[Column]
) -> list[list[str]]:
    """The headings, and the kept evaluation of every member; its step where they differ."""
    if len({line["step"] for line in evaluations.values()}) > 1:
        columns = [Column("step", "step", 1, ".0f"), *columns]
    rows = [["", *(column.heading for column in columns)]]
    for name, line in evaluations.items():
        rows.append([name, *(column.cell(line) for column in columns)])
    for name in failures:
        rows.append([f"{name} (failed)", *("" for _ in columns)])
    return rows


def _rows_of_seeds(
    settings: Sequence[Setting], evaluations: Evaluations, columns: Sequence[Column]
) -> list[list[str]]:
    """The headings, and for every setting the means over its seeds with their intervals."""
    columns = [
        column._replace(with_interval=True, with_error=False)
        for column in columns
        if column.metric != BEHIND
    ]
    means = mean_lines(settings, evaluations)
    rows = [["", "seeds", *(column.heading for column in columns)]]
    for setting in settings:
        finished = sum(name in evaluations for name in setting.members.values())
        line = means.get(setting.name, {})
        counted = f"{finished} of {len(setting.members)}"
        cells = [column.cell(line) if line else "" for column in columns]
        rows.append([setting.name, counted, *cells])
    return rows


def main(arguments: Sequence[str] | None = None) -> None:
    """The command of a job: see above."""
    parser = ArgumentParser(
        prog="python -m dpojax.sweeps.table", description="Write a sweep's table and figure."
    )
    parser.add_argument("--workdir", required=True, help="of the sweep")
    parser.add_argument("--best", default="", help="name the best member by this metric")
    options = parser.parse_args(arguments)
    folder = workdir_path(options.workdir)
    print(f"\n{write_table(folder, read_plan(folder), options.best)}\n{files_text(folder)}")


if __name__ == "__main__":
    run_command(main)
