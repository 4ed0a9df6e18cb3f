"""Sweep: dpojax sweep --config=reviews --workdir=runs/sweep

Trains what the function sweep() of the config file returns, a list of changed keys such as
{"preference.beta": 0.1}. Members that differ in numbers that the step traces (beta, label
smoothing, learning rate, length, ...) train in one program over one pass of the data, the others
one after another. Each gets a workdir of its own under --workdir; sweep.csv and sweep.png show all.
The same command goes on where it was stopped.

--dry_run makes nothing and needs no workdir: it prints the runs, builds their programs from shapes
alone, without weights or data, and prints the memory that they need. With --topology=h200:8, or
other chips of docs/plans.md, it compiles them for these chips and prints hours as well.

Without an accelerator every core is a device, and members are spread over them (--cpu_devices).
"""

from __future__ import annotations

import functools
import os
import sys
from typing import NoReturn

from absl import flags

from dpojax.config.command_line import ConfigFlag, UsageError
from dpojax.runs.command import run_script

CONFIG = ConfigFlag("A file with a sweep().")
WORKDIR = flags.DEFINE_string("workdir", None, "Where everything goes.")
DRY_RUN = flags.DEFINE_bool("dry_run", False, "Only print the runs, and what they need.")
TOPOLOGY = flags.DEFINE_string("topology", "", "With --dry_run: chips to compile for.")
CPU_DEVICES = flags.DEFINE_integer(
    "cpu_devices", 0, "Devices without an accelerator; 0: one for each core.", lower_bound=0
)


def main() -> int:
    from dpojax.sweeps.members import read_sweep
    from dpojax.sweeps.sweep import run_sweep, use_cpu_devices

    if not DRY_RUN.value and not WORKDIR.value:
        raise UsageError("--workdir is missing")
    use_cpu_devices(CPU_DEVICES.value or _cores())
    members = read_sweep(CONFIG.path)
    if DRY_RUN.value:
        return _dry_run(members)
    failures = run_sweep(CONFIG.value, members, WORKDIR.value)
    for name, why in failures.items():
        print(f"{name} failed: {why}", file=sys.stderr)
    return 1 if failures else 0


def _dry_run(members: list) -> int:
    from dpojax.planning.outline import Outline
    from dpojax.sweeps.dry_run import dry_run

    outline = Outline(TOPOLOGY.value, say=functools.partial(print, file=sys.stderr, flush=True))
    for line in dry_run(CONFIG.value, members, outline):
        print(line, flush=True)
    return 0


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()


def start() -> NoReturn:
    """Run the command that `sys.argv` holds, and end the process."""
    run_script(main, CONFIG)
