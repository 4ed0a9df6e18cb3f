"""The command `dpojax`: which commands there are, and how one is started by its name.

A command's file is imported when it is called, and not before: absl's flags are global, and the
flags of one command are no flags of another.
"""

from __future__ import annotations

import difflib
import importlib
import sys
import textwrap
from typing import NoReturn

import dpojax
from dpojax import display
from dpojax.extras import needs_train

COMMANDS = {
    "train": "train a run: SFT, preferences, a reward model, a classifier, PPO",
    "sweep": "train a grid or a config's sweep(), as one program where that can be",
    "compare": "show what runs and sweeps differ in: configs, metrics, curves",
    "plan": "compile a config for chips that are not there: memory, time, chip-hours",
    "certify": "compare the first steps on other meshes, precisions and flags with float32",
    "frontier": "make the reward-KL frontier, and everything that it needs",
    "recipe": "make an experiment that ends in a win rate: TL;DR, HH, instructions",
    "judge": "ask a judge which of two policies' responses are better: win rates",
    "prefer": "draw completions, score them, and write preference data",
    "sample": "print the responses of several models side by side",
    "chat": "talk to one or two models, line by line",
    "export": "write a run's policy as a Hugging Face folder",
    "inspect-data": "print a data set's tokens, a report on it, and its faults",
    "launch": "write the job file for Slurm, XPK, JobSet, TPU VMs or SkyPilot",
}
FAILED, USAGE = 1, 2
WIDTH = 100  # columns of a list that no terminal shows


def main() -> NoReturn:
    """The console script `dpojax`."""
    name = sys.argv[1] if len(sys.argv) > 1 else "--help"
    if name in ("-h", "--help", "help"):
        print(_overview())
        sys.exit(0)
    if name == "--version":
        print(f"dpojax {dpojax.__version__}")
        sys.exit(0)
    if name not in COMMANDS:
        print(f"dpojax: {_unknown(name)} (dpojax --help lists all commands)", file=sys.stderr)
        sys.exit(USAGE)
    sys.argv[:2] = [f"dpojax {name}"]
    start(name)


def start(name: str) -> NoReturn:
    """Run a command with the words of `sys.argv[1:]`, and end the process with its status."""
    if sentence := needs_train(f"dpojax {name}"):
        print(sentence, file=sys.stderr)
        sys.exit(FAILED)
    from dpojax.runs import terminal

    terminal.look_after()
    with display.showing_on(sys.stderr):  # the imports of a command may take long
        importlib.import_module(f"dpojax.commands.{name.replace('-', '_')}").start()


def _overview() -> str:
    column = max(map(len, COMMANDS)) + 4
    lines = [
        textwrap.fill(
            what,
            min(display.columns(sys.stdout), WIDTH),
            initial_indent=f"  {name}".ljust(column),
            subsequent_indent=" " * column,
        )
        for name, what in COMMANDS.items()
    ]
    return "\n".join(
        [
            "usage: dpojax COMMAND --FLAG=VALUE ...",
            "",
            *lines,
            "",
            display.fill(
                "dpojax COMMAND --help shows the flags of a command, dpojax --version the version.",
                indent="",
            ),
        ]
    )


def _unknown(name: str) -> str:
    """Says that there is no such command, and which ones are nearest."""
    near = difflib.get_close_matches(name.replace("_", "-"), COMMANDS, n=3, cutoff=0.5)
    hint = f"; did you mean {' or '.join(near)}?" if near else ""
    return f"{name!r}: no such command{hint}"
