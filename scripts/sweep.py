"""Sweep: python scripts/sweep.py --config=configs/reviews.py --workdir=runs/sweep

Trains what the function sweep() of the config file returns, a list of changed keys such as
{"preference.beta": 0.1}. Members that differ in numbers that the step traces (beta, label
smoothing, learning rate, length, ...) train in one program over one pass of the data, the others
one after another. Each gets a workdir of its own under --workdir; sweep.csv and sweep.png show all.
The same command goes on where it was stopped.

Without an accelerator every core is a device, and members are spread over them (--cpu_devices).
"""

from __future__ import annotations

import os
import sys

from absl import flags

from dpojax.config.command_line import ConfigFlag
from dpojax.runs.command import run_script

CONFIG = ConfigFlag("A file with a sweep().")
WORKDIR = flags.DEFINE_string("workdir", None, "Where everything goes.", required=True)
CPU_DEVICES = flags.DEFINE_integer(
    "cpu_devices", 0, "Devices without an accelerator; 0: one for each core.", lower_bound=0
)


def main() -> int:
    from dpojax.sweeps.members import read_sweep
    from dpojax.sweeps.sweep import run_sweep, use_cpu_devices

    use_cpu_devices(CPU_DEVICES.value or _cores())
    members = read_sweep(CONFIG.path)
    failures = run_sweep(CONFIG.value, members, WORKDIR.value)
    for name, why in failures.items():
        print(f"{name} failed: {why}", file=sys.stderr)
    return 1 if failures else 0


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()


if __name__ == "__main__":
    run_script(main, CONFIG)
