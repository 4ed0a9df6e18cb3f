"""Runs and members of sweeps side by side: configs that differ, metrics, and curves."""

from __future__ import annotations

import csv
import io
import itertools
import json
import textwrap
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from dpojax import storage
from dpojax.config.command_line import UsageError
from dpojax.config.errors import ConfigError
from dpojax.config.resolved import flat
from dpojax.config.saved import CONFIG, CONTENTS, FINISHED, REWRITTEN, SAME_RESULT
from dpojax.evaluation.plots import is_defined
from dpojax.evaluation.sweep_figure import draw
from dpojax.runs.workdirs import failure_of
from dpojax.sweeps.best import LOSS_METRICS, changes_measure
from dpojax.sweeps.plan import PLAN, read_plan
from dpojax.sweeps.table import COLUMNS, kept_evaluation
from dpojax.tables import blocks_table
from dpojax.training.metrics import RESERVED, read_metrics

RUNS, CURVES, FIGURE = "runs.csv", "curves.csv", "curves.png"
MOST_STEPS = 12  # lines of a printed curve
LONGEST_VALUE = 40  # characters of a config value in the printed table


class ComparedRun(NamedTuple):
    """A run, as far as it is.

    Attributes:
      label: the part of its path that tells it from the others.
      workdir: where it is.
      config: all keys, dotted, as JSON has them.
      files: hashes of the files that the config names, by key.
      code: the version of dpojax that began it, and the hash of its sources.
      lines: evaluations of the compared stage.
      evaluation: that of the step that the stage kept; empty if there is none.
      status: "finished", "failed: ..." or "step 40".
    """

    label: str
    workdir: storage.Path
    config: Mapping[str, Any]
    files: Mapping[str, str]
    code: str
    lines: Sequence[Mapping[str, float]]
    evaluation: Mapping[str, float]
    status: str


def read_runs(names: Sequence[str], stage: str = "") -> tuple[list[ComparedRun], str]:
    """The runs in workdirs; the workdir of a sweep stands for its members.

    Args:
      names: of the workdirs.
      stage: that is compared; "" is the last one that all runs have.

    Returns:
      the runs, and the stage.

    Raises:
      UsageError: a folder that is none of them.
      ConfigError: no stage that all runs have.
    """
    workdirs = list(dict.fromkeys(path for name in names for path in _workdirs(name)))
    configs = {path: storage.read_json(path / CONFIG, REWRITTEN, fields={}) for path in workdirs}
    stages = [list(configs[path]["stages"]) for path in workdirs]
    shared = [name for name in stages[0] if all(name in of_run for of_run in stages)]
    if not shared:
        raise ConfigError("these runs have no stage in common; compare those of one kind")
    if stage and stage not in shared:
        raise ConfigError(f"--stage={stage}: not all runs have it; they share {', '.join(shared)}")
    stage = stage or shared[-1]
    labels = short_labels([str(path) for path in workdirs])
    return [
        _read_run(label, path, configs[path], stage) for label, path in zip(labels, workdirs)
    ], stage


def _workdirs(name: str) -> list[storage.Path]:
    """The workdir of a run, or those of a sweep's members that have begun."""
    path = storage.as_path(name, "the workdir of a run")
    if (path / PLAN).is_file():
        begun = [path / member for member in read_plan(path)["members"]]
        if members := [workdir for workdir in begun if (workdir / CONFIG).is_file()]:
            return members
        raise UsageError(f"{name}: no member of this sweep has begun")
    if not (path / CONFIG).is_file() or "stages" not in storage.read_json(path / CONFIG, fields={}):
        raise UsageError(f"{name}: not the workdir of a run or a sweep")
    return [path]


def _read_run(label: str, path: storage.Path, config: dict, stage: str) -> ComparedRun:
    contents = storage.read_json(path / CONTENTS) if (path / CONTENTS).is_file() else {}
    lines = read_metrics(path / stage, "eval")
    why = failure_of(path)
    steps = max((line["step"] for line in read_metrics(path / stage)), default=0)
    finished = (path / FINISHED).exists()
    return ComparedRun(
        label=label,
        workdir=path,
        config=flat(config),
        files={key: content[1] for key, content in contents.get("files", {}).items()},
        code=" ".join(map(str, contents.get("version", {}).values())),
        lines=lines,
        evaluation=kept_evaluation(path / stage, lines) if lines and not why else {},
        status=f"failed: {why}" if why else "finished" if finished else f"step {steps}",
    )


def short_labels(paths: Sequence[str]) -> list[str]:
    """The paths without the folders that all of them begin with."""
    if len(paths) == 1:
        return [paths[0].rstrip("/").rpartition("/")[2]]
    parts = [path.rstrip("/").split("/") for path in paths]
    columns = itertools.takewhile(lambda column: len(set(column)) == 1, zip(*parts))
    begin = sum(1 for _ in columns)
    return ["/".join(of_path[begin:]) or of_path[-1] for of_path in parts]


def differences(runs: Sequence[ComparedRun]) -> dict[str, list[str]]:
    """The keys in which configs differ, with the value of each run as text.

    Keys that change no result are left out, and so are those of stages that a run has not. A file
    that has other content under the same path is there with its hash, and so is other code.
    """
    keys = dict.fromkeys(key for run in runs for key in run.config)
    left_out = tuple(f"{key}." for key in (*SAME_RESULT, "stages"))  # stages have a row below
    rows = {}
    for key in keys:
        values = [_as_text(run.config.get(key)) for run in runs]
        if len(set(values)) > 1 and not f"{key}.".startswith(left_out):
            rows[key] = values
    stages = [",".join(run.config.get("stages", ())) for run in runs]
    if len(set(stages)) > 1:
        rows = {"stages": stages} | rows
    for key in dict.fromkeys(key for run in runs for key in run.files):
        hashes = [run.files.get(key, "")[:12] for run in runs]
        if len(set(hashes)) > 1 and key not in rows:
            rows[f"files of {key}"] = hashes
    if len({run.code for run in runs}) > 1:
        rows["code"] = [run.code for run in runs]
    return rows


def describe(runs: Sequence[ComparedRun], stage: str, metric: str, width: int) -> str:
    """What is printed: the runs with their metrics, what differs, and a curve; within `width`."""
    rows = differences(runs)
    of_measure = [key for key in rows if changes_measure(key, stage)]
    parts = [f"{stage} of {len(runs)} runs"]
    parts.append("\n".join(blocks_table(_metric_rows(runs, bool(of_measure)), width)))
    failed = [f"{run.label} {run.status}" for run in runs if run.status.startswith("failed")]
    if failed:
        parts.append("\n".join(textwrap.shorten(x, width, placeholder=" ...") for x in failed))
    if not rows:
        parts.append("The configs do not differ in anything that decides a result.")
    else:
        # A row for each run and a column for each key, since values are shorter than paths.
        heading = ["config", *rows]
        table = [heading]
        for index, run in enumerate(runs):
            table.append([run.label, *(_cut(values[index]) for values in rows.values())])
        parts.append("\n".join(blocks_table(table, width)))
    if of_measure:
        note = (
            "Losses and margins are not compared: they mean another thing in each run, since "
            f"{', '.join(of_measure)} differ{'s' if len(of_measure) == 1 else ''}."
        )
        parts.append(textwrap.fill(note, width))
    metric = metric or _first_metric(runs, bool(of_measure))
    if metric:
        parts.append("\n".join(_curve(runs, metric, width)))
    return "\n\n".join(parts)


def _metric_rows(runs: Sequence[ComparedRun], is_other_measure: bool) -> list[list[str]]:
    columns = [c for c in COLUMNS if any(c.metric in run.evaluation for run in runs)]
    if is_other_measure:
        columns = [column for column in columns if column.metric not in LOSS_METRICS]
    rows = [["", "status", "step", *(column.heading for column in columns)]]
    for run in runs:
        cells = [column.cell(run.evaluation) if run.evaluation else "" for column in columns]
        step = f"{run.evaluation['step']}" if run.evaluation else ""
        rows.append([run.label, run.status.partition(":")[0], step, *cells])
    return rows


def _first_metric(runs: Sequence[ComparedRun], is_other_measure: bool) -> str:
    """The metric whose curve is printed by default: one that means the same in all runs."""
    names = {name for run in runs for line in run.lines for name in line}
    candidates = ["samples/win_rate", "rewards/accuracies", "accuracy", "samples/reward"]
    if not is_other_measure:
        candidates.insert(0, "loss")
    return next((name for name in candidates if name in names), "")


def _curve(runs: Sequence[ComparedRun], metric: str, width: int) -> list[str]:
    """A column for each run, a line for each step at which one was evaluated."""
    by_step = [
        {line["step"]: line[metric] for line in run.lines if _is_meaningful(line, metric)}
        for run in runs
    ]
    steps = sorted({step for values in by_step for step in values})
    if not steps:
        known = sorted({name for run in runs for line in run.lines for name in line} - {*RESERVED})
        raise UsageError(f"--metric={metric}: no evaluation has it; they have {', '.join(known)}")
    count = len(steps)
    if count > MOST_STEPS:  # the first, the last, and some between
        chosen = {round(k * (count - 1) / (MOST_STEPS - 1)) for k in range(MOST_STEPS)}
        steps = [steps[index] for index in sorted(chosen)]
    rows = [[f"eval/{metric}", *(run.label for run in runs)]]
    for step in steps:
        cells = [f"{values[step]:.4f}" if step in values else "" for values in by_step]
        rows.append([f"step {step}", *cells])
    return blocks_table(rows, width)


def _is_meaningful(line: Mapping[str, float], metric: str) -> bool:
    """Whether the metric means something: while the policy is the reference, no accuracy does."""
    return metric in line and is_defined(metric, line)


def write_comparison(runs: Sequence[ComparedRun], stage: str, folder: storage.Path) -> list[str]:
    """Write runs.csv, curves.csv and curves.png; return the names of those that were written.

    Args:
      stage: that is compared. Runs whose losses are different measures have no loss in the figure.
    """
    rows = differences(runs)
    metrics = sorted({name for run in runs for name in run.evaluation} - {*RESERVED})
    table = [["run", "workdir", "status", *rows, "step", *metrics]]
    for index, run in enumerate(runs):
        values = [run.evaluation.get(metric, "") for metric in metrics]
        changed = [of_key[index] for of_key in rows.values()]
        table.append(
            [run.label, run.workdir, run.status, *changed, run.evaluation.get("step", ""), *values]
        )
    storage.write_text(folder / RUNS, _csv(table))
    names = sorted({name for run in runs for line in run.lines for name in line} - {*RESERVED})
    curves = [["run", "step", *names]]
    for run in runs:
        for line in run.lines:
            curves.append([run.label, line["step"], *(line.get(name, "") for name in names)])
    storage.write_text(folder / CURVES, _csv(curves))
    failed = [run.label for run in runs if run.status.startswith("failed")]
    has_one_measure = not any(changes_measure(key, stage) for key in rows)
    draw(
        {run.label: run.lines for run in runs},
        folder / FIGURE,
        failed=failed,
        same_measure=has_one_measure,
    )
    return [name for name in (RUNS, CURVES, FIGURE) if (folder / name).exists()]


def _csv(rows: Sequence[Sequence[Any]]) -> str:
    table = io.StringIO()
    csv.writer(table).writerows(rows)
    return table.getvalue()


def _as_text(value: Any) -> str:
    if value is None:
        return ""
    return value if isinstance(value, str) else json.dumps(value)


def _cut(text: str) -> str:
    """The end of a long value, such as a path's, since its beginning is what paths share."""
    return text if len(text) <= LONGEST_VALUE else "..." + text[3 - LONGEST_VALUE :]
