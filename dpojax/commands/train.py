"""Train: dpojax train --config=reviews --workdir=runs/reviews

Any key of the config can be set on the command line (--config.preference.beta=0.3). The same
command in the same workdir resumes. SIGTERM, Ctrl-C and SIGHUP (a terminal that is gone) save, and
the exit status is 143; a second Ctrl-C ends at once, without saving. An error that the user can
mend is told in one paragraph, and the exit status is 1, or 2 for one in the command line.
"""

from __future__ import annotations

from typing import NoReturn

from absl import flags

from dpojax.config.command_line import ConfigFlag
from dpojax.runs.command import run_script

CONFIG = ConfigFlag("A file, or the name of a shipped config.")
WORKDIR = flags.DEFINE_string("workdir", None, "Where the run keeps everything.", required=True)


def main() -> None:
    from dpojax.runs.run import run
    from dpojax.training.goodput import process_age

    run(CONFIG.value, WORKDIR.value, age=process_age())


def start() -> NoReturn:
    """Run the command that `sys.argv` holds, and end the process."""
    run_script(main, CONFIG)
