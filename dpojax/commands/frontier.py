"""Frontier: dpojax frontier --config=reviews --workdir=runs/frontier

Makes the reward-KL frontier of Rafailov et al. 2023, figure 2, and everything that it needs: SFT,
preferences of the SFT policy's completions, a reward model, and one run per method and setting of
the config file's frontier(config). The same command goes on where it was stopped; the plan of all
jobs, with the command of each, is WORKDIR/plan.json.

--add=simpo,ipo adds runs of other losses, --add=online_dpo online DPO; --methods=dpo,unlikelihood
leaves out all others.

--dry_run makes nothing and needs no workdir: it prints the runs, builds every program from shapes
alone, and prints the memory of each. With --topology=h200:1, or other chips of docs/plans.md, it
compiles them for these chips and prints hours as well.

Without an accelerator as many runs go on at once as there are cores, in a process each
(--workers). With an accelerator they go one after another. Runs of one method that differ only in
numbers (beta, learning rate, the seed of the data's order) then train together (--vectorise).
"""

from __future__ import annotations

import sys
from functools import partial
from typing import NoReturn

from absl import flags

from dpojax import display
from dpojax.config.command_line import ConfigFlag, UsageError
from dpojax.runs.command import run_script

CONFIG = ConfigFlag("A file with a frontier(config).")
WORKDIR = flags.DEFINE_string("workdir", None, "Where everything goes.")
ADD = flags.DEFINE_list("add", [], "Losses to add to the figure, by name.")
METHODS = flags.DEFINE_list("methods", [], "Only these methods of the config's frontier(config).")
DRY_RUN = flags.DEFINE_bool("dry_run", False, "Only build every program, from shapes.")
TOPOLOGY = flags.DEFINE_string("topology", "", "With --dry_run: chips to compile for.")
WORKERS = flags.DEFINE_integer(
    "workers", 0, "Runs at once; 0: as many as cores on a CPU, else 1.", lower_bound=0
)
VECTORISE = flags.DEFINE_bool(
    "vectorise",
    None,
    "Train runs that can share a program as one vectorised sweep; default: if workers is 1.",
)


def main() -> int:
    if not DRY_RUN.value and not WORKDIR.value:
        raise UsageError("--workdir is missing")
    from dpojax.evaluation.frontier_report import WHAT_WAS_RUN
    from dpojax.frontier import frontier, results
    from dpojax.jobs import local_workers
    from dpojax.tables import fitted_markdown, terminal_width

    runs = planned_runs()
    if DRY_RUN.value:
        from dpojax.frontier.dry_run import dry_run
        from dpojax.planning import outline

        outline.show(partial(dry_run, CONFIG.value, runs), TOPOLOGY.value)
        return 0
    workers = WORKERS.value or local_workers.default_workers()
    vectorise = workers == 1 if VECTORISE.value is None else VECTORISE.value
    folder = frontier.make_frontier(
        CONFIG.value, runs, WORKDIR.value, workers=workers, vectorise=vectorise
    )
    report = results.write(folder).split(f"\n{WHAT_WAS_RUN}")[0]
    print(fitted_markdown(report, terminal_width()))
    display.say(f"{folder}: frontier.csv, frontier.png, frontier.pdf, report.md, samples.md")
    failures = results.failures(folder)
    for name, why in failures.items():
        print(f"{name} failed: {why}", file=sys.stderr)
    return 1 if failures else 0


def planned_runs() -> list:
    """The runs of the config file that --methods leaves, and those that --add names."""
    from dpojax.config.errors import ConfigError
    from dpojax.frontier.runs import read_runs, run_of_loss

    path = CONFIG.path
    runs = read_runs(path, CONFIG.value)
    if unknown := set(METHODS.value) - {run.method for run in runs}:
        names = ", ".join(sorted(unknown))
        raise ConfigError(f"--methods: {names}: not among the runs of {path}")
    common = dict(set.intersection(*(set(run.changes.items()) for run in runs)))
    runs = [run for run in runs if not METHODS.value or run.method in METHODS.value]
    beta = CONFIG.value.frontier.online_beta
    return runs + [run_of_loss(name, common, online_beta=beta) for name in ADD.value]


def start() -> NoReturn:
    """Run the command that `sys.argv` holds, and end the process."""
    run_script(main, CONFIG)
