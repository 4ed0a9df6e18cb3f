"""Certify: dpojax certify --config=hh --workdir=runs/hh --small --devices=8

Trains the first steps of a config on other meshes and device orders, in other precisions and under
other XLA flags, and compares each with float32: log-probs, the gradient's signs, the loss curve,
what single margins learn. Prints a table with a verdict for each, and keeps certificate.json and
certificate.md in the workdir. There a run whose mesh, precision or flags have failed is refused.
The exit status is 1 if anything failed.

--small takes a model of the same family with two layers and random weights; without it the run's
own model is measured, on the devices that are there. --devices=8 pretends that a CPU has eight.
--flags="--xla_allow_excess_precision=false" adds a set of flags to those in force; it may be
repeated. Measured is the last stage of SFT or preferences. See docs/numerics.md.
"""

from __future__ import annotations

from typing import NoReturn

from absl import flags

from dpojax.config.command_line import ConfigFlag
from dpojax.runs.command import run_script

CONFIG = ConfigFlag("A file, or the name of a shipped config.")
WORKDIR = flags.DEFINE_string("workdir", None, "Of the run, for the certificate.", required=True)
STEPS = flags.DEFINE_integer("steps", 20, "Optimiser steps of each variant.", lower_bound=1)
SMALL = flags.DEFINE_bool("small", False, "A small model of the same family.")
DEVICES = flags.DEFINE_integer("devices", 0, "Of a CPU; 0: as many as there are.", lower_bound=0)
FLAGS = flags.DEFINE_multi_string("flags", [], "A set of XLA flags, in one line; may be repeated.")


def main() -> int:
    from dpojax.certifying.certify import certify
    from dpojax.certifying.report import lines_of

    certificate = certify(
        CONFIG.value,
        WORKDIR.value,
        steps=STEPS.value,
        is_small=SMALL.value,
        devices=DEVICES.value,
        flag_sets=FLAGS.value,
    )
    print("", *lines_of(certificate), sep="\n")
    return 0 if certificate["passes"] else 1


def start() -> NoReturn:
    """Run the command that `sys.argv` holds, and end the process."""
    run_script(main, CONFIG)
