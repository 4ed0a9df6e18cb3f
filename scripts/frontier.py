"""The frontier: python scripts/frontier.py --config=configs/reviews.py --workdir=runs/frontier

Makes everything that the figure needs, and the figure: SFT, preferences, a reward model, the
methods over their sweeps, best-of-n and the theoretical optimum. The same command goes on where it
was stopped. --add=simpo,ipo adds losses of the library by name, --add=online_dpo online DPO;
--methods=dpo,unlikelihood leaves out all others. --dry_run makes nothing: it builds every
program from shapes alone, and says so.

Without an accelerator as many runs go on at once as there are cores, in a process each
(--workers). With one they go on one after another, but for those of a method that differ in numbers
alone (beta, learning rate, the seed of the data's order), which train together (--together).
"""

from __future__ import annotations

import sys

from absl import app, flags, logging
from ml_collections import config_flags

from dpojax.config.command_line import parse

CONFIG = config_flags.DEFINE_config_file("config", None, "A file with a frontier(config).")
WORKDIR = flags.DEFINE_string("workdir", None, "Where everything goes.", required=True)
ADD = flags.DEFINE_list("add", [], "Losses to add to the figure, by name.")
METHODS = flags.DEFINE_list("methods", [], "Only these methods of the config's frontier(config).")
DRY_RUN = flags.DEFINE_bool("dry_run", False, "Only build every program, from shapes.")
WORKERS = flags.DEFINE_integer(
    "workers", 0, "Runs at once; 0: as many as cores on a CPU, else 1.", lower_bound=0
)
TOGETHER = flags.DEFINE_bool(
    "together", None, "Train runs as one program that can be; by default where --workers is 1."
)
flags.mark_flag_as_required("config")


def main(_) -> int:
    logging.set_verbosity(logging.WARNING)
    from dpojax.config.checks import ConfigError
    from dpojax.frontier import dry_run
    from dpojax.frontier import plan as frontier
    from dpojax.frontier import results as frontier_results
    from dpojax.jobs import local_workers as workers
    from dpojax.runs.run import FAILURES
    from dpojax.training.loop import Preempted

    try:
        path = config_flags.get_config_filename(flags.FLAGS["config"])
        runs = frontier.read_runs(path, CONFIG.value)
        if unknown := set(METHODS.value) - {run.method for run in runs}:
            names = ", ".join(sorted(unknown))
            raise ConfigError(f"--methods: {names}: not among the runs of {path}")
        common = dict(set.intersection(*(set(run.changes.items()) for run in runs)))
        runs = [run for run in runs if not METHODS.value or run.method in METHODS.value]
        online = {"online_beta": CONFIG.value.frontier.online_beta}
        runs += [frontier.of_loss(name, common, **online) for name in ADD.value]
        if DRY_RUN.value:
            for line in dry_run.dry_run(CONFIG.value, runs):
                print(line, flush=True)
            return 0
        at_once = WORKERS.value or workers.default_workers()
        together = at_once == 1 if TOGETHER.value is None else TOGETHER.value
        folder = frontier.make(
            CONFIG.value, runs, WORKDIR.value, at_once=at_once, together=together
        )
        text = frontier_results.write(folder)
    except Preempted as stopped:
        print(f"{stopped}; the same command goes on", file=sys.stderr)
        return 143
    except FAILURES as error:
        print(f"{type(error).__name__}: {error}", file=sys.stderr)
        return 1
    print(text.split("\n## Samples")[0])
    print(f"{folder}: frontier.csv, frontier.png, frontier.pdf, report.md")
    failed = frontier_results.failures(folder)
    for name, why in failed.items():
        print(f"{name} failed: {why}", file=sys.stderr)
    return 1 if failed else 0


if __name__ == "__main__":
    app.run(main, flags_parser=parse)
