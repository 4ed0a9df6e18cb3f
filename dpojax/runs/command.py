"""How commands end: with a status, and a paragraph for whatever a user can mend."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import NoReturn

from absl import logging

from dpojax.config.errors import ConfigError
from dpojax.data.records import DataError
from dpojax.evaluation.policies import NothingStopped
from dpojax.evaluation.rewards import RewardError
from dpojax.sharding import FirstProcessFailed
from dpojax.storage import StorageError
from dpojax.training.checkpoints import CheckpointError
from dpojax.training.loop import NonFiniteLoss
from dpojax.training.preemption import Preempted
from dpojax.training.reference import ReferenceMismatch

# What a user can mend; anything else is a bug of ours, and shows its traceback.
FAILURES = (ConfigError, DataError, CheckpointError, ReferenceMismatch, NonFiniteLoss, OSError)
FAILURES += (RewardError, NothingStopped, StorageError, FirstProcessFailed)
STOPPED = 143  # the status of a command that a SIGTERM ended; the same command goes on


def exit_status(command: Callable[[], int | None]) -> int:
    """Run a command and return its exit status.

    0 or what the command returns; 1 with the error in one paragraph, for what a user can mend;
    `STOPPED` after a SIGTERM.
    """
    logging.set_verbosity(logging.WARNING)
    try:
        return command() or 0
    except Preempted as stopped:
        print(f"{stopped}; the same command goes on", file=sys.stderr)
        return STOPPED
    except FAILURES as error:
        print(f"\n{type(error).__name__}: {error}", file=sys.stderr)
        return 1


def run_command(main: Callable[[], int | None]) -> NoReturn:
    """Run the main function of a module, and end the process with its status."""
    sys.exit(exit_status(main))
