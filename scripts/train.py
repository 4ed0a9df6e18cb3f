"""Train: python scripts/train.py --config=configs/reviews.py --workdir=runs/reviews

Any key of the config can be set on the command line (--config.preference.beta=0.3). The same
command in the same workdir resumes. SIGTERM saves and exits with 143. An error that the user can
mend is told in one paragraph, and the exit status is 1.
"""

from __future__ import annotations

from absl import app, flags
from ml_collections import config_flags

from dpojax.config.command_line import parse

CONFIG = config_flags.DEFINE_config_file("config", None, "A file of configs/.", lock_config=True)
WORKDIR = flags.DEFINE_string("workdir", None, "Where the run keeps everything.")


def main(_) -> int:
    from dpojax.runs.command import exit_status
    from dpojax.runs.run import run

    return exit_status(lambda: run(CONFIG.value, WORKDIR.value))


if __name__ == "__main__":
    flags.mark_flags_as_required(["config", "workdir"])
    app.run(main, flags_parser=parse)
