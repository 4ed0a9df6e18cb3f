"""Compare: dpojax compare runs/a runs/b runs/sweep

Prints what the configs of runs differ in, the metrics of the step that each has kept, and a curve;
a sweep stands for all its members, and a run need not be finished. --out gets runs.csv (a line for
each run), curves.csv (a line for each evaluation) and curves.png.
"""

from __future__ import annotations

import sys
from typing import NoReturn

from dpojax.runs.command import run_command


def main() -> None:
    from dpojax import storage
    from dpojax.config.command_line import ArgumentParser, UsageError, command_name
    from dpojax.sweeps import compare
    from dpojax.tables import WIDTH, terminal_width

    parser = ArgumentParser(prog=command_name(), description=__doc__.partition("\n\n")[2])
    parser.add_argument("runs", nargs="*", metavar="RUN", help="workdirs of runs and of sweeps")
    parser.add_argument("--stage", default="", help="by default the last one that all runs have")
    parser.add_argument(
        "--metric", default="", help="metric whose curve is printed: eval/loss, ..."
    )
    parser.add_argument("--out", default="comparison", help="folder; default: %(default)s")
    options = parser.parse_args(sys.argv[1:])
    if not options.runs:
        raise UsageError("name the workdirs of two runs or more, or of a sweep")
    runs, stage = compare.read_runs(options.runs, options.stage)
    metric = options.metric.removeprefix("eval/")
    print(compare.describe(runs, stage, metric, terminal_width() or WIDTH))
    folder = storage.as_path(options.out, "--out")
    written = compare.write_comparison(runs, stage, folder)
    print(f"\n{folder}: {', '.join(written)}")


def start() -> NoReturn:
    """Run the command that `sys.argv` holds, and end the process."""
    run_command(main)
