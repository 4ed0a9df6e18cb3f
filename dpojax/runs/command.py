"""How commands end: with a status, and a paragraph for whatever a user can mend.

Nothing of dpojax that imports JAX is imported before a command runs: a signal that comes meanwhile
ends it with a sentence, too.
"""

from __future__ import annotations

import contextlib
import sys
import threading
import traceback
from collections.abc import Callable, Collection
from typing import NoReturn

from absl import logging

from dpojax import display, peers, stopping
from dpojax.config.command_line import USAGE, ConfigFlag, UsageError, command_name, parse_flags
from dpojax.runs import terminal
from dpojax.stopping import Preempted, stop_code
from dpojax.tpu_flags import use_tpu_flags

FAILED = 1
LINGER = 20.0  # seconds that a command may take to end once it is done


def failures() -> tuple[type[Exception], ...]:
    """The errors that a user can mend; anything else is a bug of ours, and shows its traceback."""
    from dpojax.config.errors import ConfigError
    from dpojax.data.records import DataError
    from dpojax.evaluation.judging.judge import JudgeError
    from dpojax.evaluation.policies import NothingStopped
    from dpojax.evaluation.rewards import RewardError
    from dpojax.sampling.sampler import SamplingError
    from dpojax.sharding import DistributedError, FirstProcessFailed
    from dpojax.storage import StorageError
    from dpojax.training.checkpoints import CheckpointError
    from dpojax.training.loop import NonFiniteLoss
    from dpojax.training.reference import ReferenceMismatch

    of_data = (ConfigError, DataError, StorageError, OSError, RewardError, NothingStopped)
    of_data += (SamplingError, JudgeError)
    of_training = (CheckpointError, ReferenceMismatch, NonFiniteLoss)
    return (*of_data, *of_training, FirstProcessFailed, DistributedError)


def exit_status(command: Callable[[], int | None]) -> int:
    """Run a command and return its exit status.

    0 or what the command returns; 1 with the error in one paragraph, for what a user can mend, and
    with a traceback for anything else; `stop_code()` after SIGTERM, SIGINT or SIGHUP. Other
    processes of the run end with the same status.
    """
    logging.set_verbosity(logging.WARNING)
    try:
        status = command() or 0
    except Preempted as stopped:
        return _stopped(stopped)
    except UsageError as error:
        print(f"{command_name()}: {error}", file=sys.stderr)
        return USAGE
    except SystemExit as error:  # of argparse
        status = error.code if isinstance(error.code, int) else FAILED
        if isinstance(error.code, str):
            print(error.code, file=sys.stderr)
    except BaseException as error:
        if stopped := stopping.raised():  # a library, or a module half imported, fails over it
            return _stopped(stopped)
        if isinstance(error, failures()):
            display.complain(f"\n{type(error).__name__}: {error}")
        else:
            _wait_for_the_one_that_died(error)
            traceback.print_exception(error)
        status = FAILED
    if link := peers.current():
        if status == 0:
            link.close()
        else:
            link.end(status, "has failed; see what it printed")
    return status


def _stopped(stopped: Preempted) -> int:
    """Say how the command was stopped; what it lost its lock to is told instead."""
    from dpojax.storage import lost_locks

    link = peers.current()
    if lost := lost_locks():
        print(f"\nLocked: {', '.join(lost)}: another process took over", file=sys.stderr)
        return FAILED
    sentence, command = f"{stopped}; {stopping.go_on()}".split("\n", 1)
    display.complain(f"\n{sentence}")
    print(command, file=sys.stderr)
    if link and link.has_agreed:
        link.close()
    elif link:
        link.end(stop_code(), "was asked to stop")
    return stop_code()


def _wait_for_the_one_that_died(error: BaseException) -> None:
    """A collective fails a moment before the line says which process is gone, and ends this one."""
    if peers.current() is not None and type(error).__module__.startswith("jax"):
        threading.Event().wait(peers.LOST + 5)


def run_command(main: Callable[[], int | None]) -> NoReturn:
    """Run the main function of a module or script, and end the process with its status.

    Signals, a terminal that is gone, and libraries that print are looked after.
    """
    stopping.announce_signals()
    terminal.look_after()
    use_tpu_flags()
    with stopping.listening(), display.showing_on(sys.stderr):
        end(exit_status(main))


def run_script(
    main: Callable[[], int | None],
    config: ConfigFlag | None = None,
    *,
    lists: Collection[str] = (),
) -> NoReturn:
    """`run_command`, of a command whose flags are absl's; `config` is its flag --config.

    --help prints the text at the top of the file that holds `main`.

    Args:
      lists: flags that take all words up to the next flag.
    """
    about = sys.modules[main.__module__].__doc__

    def parse_and_run() -> int | None:
        parse_flags(sys.argv[1:], config, about=about, lists=lists)
        if config is not None:
            code = config.value.exit_code_when_stopped
            if 1 <= code <= 255:  # `resolve` refuses another one; a signal may come before
                stopping.use_stop_code(code)
        return main()

    run_command(parse_and_run)


def end(status: int) -> NoReturn:
    """End the process within `LINGER` seconds.

    A process that has failed is not kept by threads of a library, or by a barrier in which the
    others of its run will not come.
    """
    alone = peers.current() is None
    if status and not alone:
        with contextlib.suppress(Exception):
            threading.Event().wait(0.5)  # the others hear why before the coordinator is gone
        stopping.end_now(status)
    if status or alone:
        text = f"ended after {LINGER:.0f} s of waiting for threads of libraries"
        stopping.later(LINGER, stopping.end_now, status, text)
    sys.exit(status)
