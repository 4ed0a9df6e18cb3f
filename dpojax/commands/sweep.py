"""Sweep: dpojax sweep --config=reviews --workdir=runs/sweep \\
           --grid beta=0.05,0.1,1 learning_rate=1e-4,3e-4 --seeds=3 --best=eval/rewards/accuracies

Trains every combination of the values of --grid. Without --grid, trains what the function sweep()
of the config file returns, a list of changed keys such as {"preference.beta": 0.1}. --seeds trains
every member with several seeds, and shows means with 95 % intervals.

Members that differ in numbers that the step traces (beta, label smoothing, learning rate, length,
...) train in one program over one pass of the data, the others one after another. Each gets a
workdir of its own under --workdir; sweep.csv and sweep.png show all, those that failed as well. The
same command goes on where it was stopped; more values or seeds add members to those that are there.

--dry_run makes nothing and needs no workdir: it prints the runs, builds their programs from shapes
alone, without weights or data, and prints the memory that they need. With --topology=h200:8, or
other chips of docs/plans.md, it compiles them for these chips and prints hours as well.

Without an accelerator every core is a device, and members are spread over them (--cpu_devices).
docs/sweeps.md has more.
"""

from __future__ import annotations

import os
import sys
from functools import partial
from typing import NoReturn

from absl import flags

from dpojax import display
from dpojax.config.command_line import ConfigFlag, UsageError
from dpojax.runs.command import run_script

CONFIG = ConfigFlag("A file, or the name of a shipped config.")
WORKDIR = flags.DEFINE_string("workdir", None, "Where everything goes.")
GRID = flags.DEFINE_multi_string(
    "grid",
    [],
    "KEY=VALUE,VALUE KEY=VALUE,VALUE ...: every combination is a member. A key may be named "
    "without its group (beta, learning_rate): one of the last stage is meant, or the only one. A "
    "value with a comma stands in quotes or brackets.",
)
SEEDS = flags.DEFINE_integer(
    "seeds", 0, "Seeds of every member, from config.seed on; 0: config.seed alone.", lower_bound=0
)
BEST = flags.DEFINE_string(
    "best", "", "Name the best member by this metric, as config.STAGE.keep_best names it."
)
DRY_RUN = flags.DEFINE_bool("dry_run", False, "Only print the runs, and what they need.")
TOPOLOGY = flags.DEFINE_string("topology", "", "With --dry_run: chips to compile for.")
CPU_DEVICES = flags.DEFINE_integer(
    "cpu_devices", 0, "Devices without an accelerator; 0: one for each core.", lower_bound=0
)


def main() -> int:
    from dpojax.sweeps.best import parse_best
    from dpojax.sweeps.grid import describe, sweep_members
    from dpojax.sweeps.sweep import run_sweep, use_cpu_devices

    if not DRY_RUN.value and not WORKDIR.value:
        raise UsageError("--workdir is missing")
    use_cpu_devices(CPU_DEVICES.value or _cores())
    members = sweep_members(CONFIG.path, CONFIG.value, GRID.value, SEEDS.value)
    parse_best(BEST.value, CONFIG.value.stages[-1], members)
    if DRY_RUN.value:
        from dpojax.planning import outline
        from dpojax.sweeps.dry_run import dry_run

        outline.show(partial(dry_run, CONFIG.value, members), TOPOLOGY.value)
        return 0
    display.say(describe(members))
    failures = run_sweep(CONFIG.value, members, WORKDIR.value, best=BEST.value)
    if failures:
        what = "1 member has" if len(failures) == 1 else f"{len(failures)} members have"
        print(f"{what} failed; sweep.csv and failed.txt of each say why", file=sys.stderr)
    return 1 if failures else 0


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()


def start() -> NoReturn:
    """Run the command that `sys.argv` holds, and end the process."""
    run_script(main, CONFIG, lists=("grid",))
