"""A clean stop: processes that get a SIGTERM agree on the step after which they save and end."""

from __future__ import annotations

import itertools
import signal
import sys
from typing import ClassVar

import jax
import numpy as np
from jax.experimental import multihost_utils

from dpojax import storage

EXCHANGE = 5  # steps between two exchanges, where JAX's preemption service is off


class Preempted(Exception):
    """The run was asked to stop (SIGTERM) and has saved its state."""


class StopSignal:
    """Notices a SIGTERM while it is entered; all processes stop at the same step.

    One process has its own signal handler. Several use JAX's preemption service: it handles the
    signal of whichever process gets it, and picks a step that no process has reached yet. Where
    that service is off (`jax_enable_preemption_service`), the processes tell each other at every
    fifth step.

    A SIGTERM can come so late that the training ends before it can stop. It is not lost then. One
    process hands it to the handler that was there before. The whole process remembers it, so that
    the next `StopSignal` stops before anything is trained. It is forgotten once a `Preempted` has
    left a `StopSignal`, or by `forget_stop`.

    A process that lost the lock of its workdir also gets a SIGTERM (see `storage.lock`). Its run
    ends without saving: another process writes the same checkpoints.
    """

    # Counts the calls of `agreed` in this process. The service needs numbers that only grow, and
    # all processes call it equally often, whatever the stage and its steps.
    _calls: ClassVar = itertools.count(1)
    _received: ClassVar[bool] = False  # a SIGTERM, by this process
    _agreed: ClassVar[bool] = False  # by all processes: to stop

    @property
    def asked(self) -> bool:
        """Whether a SIGTERM was noticed, here or by agreement."""
        return StopSignal._received or StopSignal._agreed

    def __enter__(self) -> StopSignal:
        """Start to listen.

        Raises:
          Preempted: a SIGTERM has come earlier, and nothing has stopped since.
          storage.Locked: as `agreed`.
        """
        self._service = (
            jax.process_count() > 1
            and jax.distributed.is_initialized()
            and jax.config.jax_enable_preemption_service
        )
        if not self._service:  # a handler of our own would replace the service's
            self._before = signal.signal(signal.SIGTERM, self._receive)
        try:
            if self.agreed():
                raise Preempted("stopped before the training began; what is done is kept")
        except BaseException:
            self.__exit__(*sys.exc_info())
            raise
        return self

    def __exit__(self, kind, error, traceback) -> None:
        if not self._service:
            signal.signal(signal.SIGTERM, self._before)
        if isinstance(error, Preempted):
            forget_stop()
        elif error is None and not self._service:
            self._hand_on()

    def agreed(self, step: int = 0) -> bool:
        """Whether to stop now; the answer is the same in all processes.

        All of them have to call it equally often, at each step. Once True, it stays True.

        Args:
          step: only decides when processes without the preemption service talk to each other.

        Raises:
          storage.Locked: a process has lost a lock, so none of them may save.
        """
        StopSignal._agreed = StopSignal._agreed or self._exchange(step)
        if StopSignal._agreed and _any_process(bool(lost := storage.lost_locks())):
            folders = ", ".join(lost) or "the workdir"  # processes without the lock know no name
            raise storage.Locked(f"{folders}: another process took over; nothing more is saved")
        return StopSignal._agreed

    def _exchange(self, step: int) -> bool:
        """Whether any process has received a SIGTERM, as far as all processes know."""
        if jax.process_count() == 1:
            return StopSignal._received
        if self._service:
            return multihost_utils.reached_preemption_sync_point(next(self._calls))
        return step % EXCHANGE == 0 and _any_process(StopSignal._received)

    def _receive(self, *_) -> None:
        StopSignal._received = True

    def _hand_on(self) -> None:
        """Call the handler of before with a SIGTERM that stopped nothing here.

        Several processes do so only if all of them know of it: one that leaves alone would make the
        others wait for it.
        """
        is_pending = self.asked if jax.process_count() == 1 else StopSignal._agreed
        if is_pending and callable(self._before):
            try:
                self._before(signal.SIGTERM, None)
            except Preempted:
                forget_stop()
                raise


def forget_stop() -> None:
    """Forget a SIGTERM that has stopped nothing yet."""
    StopSignal._received = StopSignal._agreed = False


def _any_process(value: bool) -> bool:
    """Whether a value is True in any process; they wait for each other."""
    if jax.process_count() == 1:
        return value
    return bool(multihost_utils.process_allgather(np.array(value)).any())
