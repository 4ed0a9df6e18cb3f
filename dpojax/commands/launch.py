"""Launch: dpojax launch slurm --config=reviews --workdir=runs/reviews

Writes the file of an engine that runs jobs on a cluster, and says how to submit it; --submit does
so. ENGINE is slurm, xpk, jobset, tpu-vm or skypilot; `dpojax launch ENGINE --help` shows its flags.
A job that is stopped saves and ends with 143, and the engine starts it again where it was.

--sweep makes a job of each group of the config's sweep() that trains together, and a last one that
makes the table and the figure. Any key of the config (--config.preference.beta=0.3) goes to the
jobs. The same command again launches what is not done yet.
"""

from __future__ import annotations

import sys
from typing import NoReturn

from dpojax.runs.command import run_command


def main() -> int:
    import jax

    jax.config.update("jax_platforms", "cpu")  # nothing is computed here
    from dpojax.launching.launch import launch

    return launch(sys.argv[1:])


def start() -> NoReturn:
    """Run the command that `sys.argv` holds, and end the process."""
    run_command(main)
