"""Plan: dpojax plan --config=hh --topology=v5e:4x4

Compiles the programs of a config for chips that need not be there, and says what each needs and
takes: memory a device (predicted and compiled), FLOPs, bytes of the HBM and of collectives, what of
the communication no kernel hides, the time at the roofline, and with it hours and chip-hours. That
time is a lower bound: no kernel reaches its chip's peak.

Topologies: v5e:4x4, v6e:8x8, v4, v5p and v7x:2x2x4 (pip install 'jax[tpu]'), a100:8, h100:8, h200:8
(pip install 'jax[cuda13]'), cpu:8 (memory alone). Run it with JAX_PLATFORMS=cpu. No weights are
read, and no data: config.plan says how many examples there are, and how long they are.

--search compiles variants of mesh, rematerialisation and rows, and prints the keys of the fastest.
--members=4 adds the step of a sweep whose members train together. --max_hours=12 refuses a plan
that takes longer (exit status 1). --json=FILE keeps all numbers.
"""

from __future__ import annotations

import math
import textwrap
from typing import NoReturn

from absl import flags

from dpojax.config.command_line import ConfigFlag
from dpojax.runs.command import run_script

CONFIG = ConfigFlag("A file, or the name of a shipped config.")
TOPOLOGY = flags.DEFINE_string(
    "topology", None, "Chips to compile for, such as v5e:4x4 or h200:8.", required=True
)
MEMBERS = flags.DEFINE_integer("members", 0, "Of a sweep that trains together.", lower_bound=0)
PRICE = flags.DEFINE_float("price_per_chip_hour", 0.0, "Of a chip, in any currency.")
MAX_HOURS = flags.DEFINE_float("max_hours", 0.0, "Refuse a plan that takes longer; 0 refuses none.")
SEARCH = flags.DEFINE_bool("search", False, "Look for faster meshes, rows and remat by compiling.")
# Lines to copy, for a terminal of 100 columns.
COPIED = {
    "width": 98,
    "initial_indent": "  ",
    "subsequent_indent": "    ",
    "break_long_words": False,
    "break_on_hyphens": False,
}
JSON = flags.DEFINE_string("json", "", "File for all numbers.")


def main() -> int:
    import jax

    from dpojax import display, storage
    from dpojax.planning import plan
    from dpojax.planning.chips import topology

    # Programs for devices that are not there can be written to the cache, but not read from it.
    jax.config.update("jax_enable_compilation_cache", False)
    chips = topology(TOPOLOGY.value)
    if SEARCH.value:
        return _search(chips)
    plans = []
    for one in plan.make_plan(CONFIG.value, chips, members=MEMBERS.value, say=_say):
        plans.append(one)
        for line in plan.describe(one, price=PRICE.value):
            display.say(line)
    _tell_unplanned()
    if JSON.value:
        storage.write_json(storage.as_path(JSON.value), [plan.as_json(one) for one in plans])
    if not all(one.fits for one in plans):
        return 1
    if MAX_HOURS.value:
        plan.require_hours(plans, MAX_HOURS.value)
    return 0


def _search(chips) -> int:
    """Print the variants of each stage's step; 1 if none fits."""
    from dpojax.planning.programs import can_be_planned
    from dpojax.planning.search import search

    _tell_unplanned()
    for name in filter(can_be_planned, CONFIG.value.stages):
        best, *others = search(CONFIG.value, name, chips, _say)
        if best.seconds == math.inf:
            print(f"{name}: no variant fits {chips.name}")
            return 1
        print(f"{name} on {chips.name}: {1e3 * best.seconds:.0f} ms a step at the roofline")
        print(textwrap.fill(best.flags or "the config as it is", **COPIED).replace("\n", " \\\n"))
        programs = {id(one.step): one for one in reversed(others) if one.step is not best.step}
        for other in sorted(programs.values(), key=lambda one: one.seconds)[:4]:
            if other.seconds < math.inf:
                print(f"  {other.seconds / best.seconds:.2f}x: {other.short}")
    return 0


def _tell_unplanned() -> None:
    from dpojax.planning.plan import unplanned

    for name in unplanned(CONFIG.value):
        print(f"{name}: no plan is made of it; its memory and hours come on top", flush=True)


def _say(line: str) -> None:
    from dpojax import display
    from dpojax.watchdog import beat

    beat(line)
    display.complain(line)


def start() -> NoReturn:
    """Run the command that `sys.argv` holds, and end the process."""
    run_script(main, CONFIG)
