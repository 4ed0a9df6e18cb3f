"""Train: python scripts/train.py --config=configs/reviews.py --workdir=runs/reviews

Any key of the config can be set on the command line (--config.preference.beta=0.3). The same command in
the same workdir resumes. SIGTERM saves and exits with 0; an error that the user can mend is told
in one paragraph and exits with 1.
"""

from __future__ import annotations

import sys

from absl import app, flags, logging
from ml_collections import config_flags

from dpojax.config.command_line import parse

CONFIG = config_flags.DEFINE_config_file("config", None, "A file of configs/.", lock_config=True)
WORKDIR = flags.DEFINE_string("workdir", None, "Where the run keeps everything.")


def main(_) -> int:
    from dpojax.runs.run import FAILURES, run
    from dpojax.training.loop import Preempted

    logging.set_verbosity(logging.WARNING)
    try:
        run(CONFIG.value, WORKDIR.value)
    except Preempted as stopped:
        print(f"{stopped}; the same command resumes", file=sys.stderr)
    except FAILURES as error:
        print(f"\n{type(error).__name__}: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    flags.mark_flags_as_required(["config", "workdir"])
    app.run(main, flags_parser=parse)
