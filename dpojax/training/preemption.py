"""A clean stop: processes that are asked to stop agree on a step, save after it, and end."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator

import jax

from dpojax import peers, sharding, stopping, storage
from dpojax.stopping import Preempted

__all__ = ["Preempted", "StopSignal", "forget_stop"]

EXCHANGE = 5  # steps between two exchanges, where the processes have no line of their own


class StopSignal:
    """Notices SIGTERM, SIGINT and SIGHUP while it is entered.

    While a loop trains (`steps`), a signal is noted. The loop asks at each step (`agreed`), saves,
    and raises `Preempted`; all processes do so at the same step. They tell each other over the line
    of `peers`, or, where there is none, at every fifth step. Outside of `steps` a signal raises
    `Preempted` at once.

    A process that lost the lock of its workdir also gets a SIGTERM (see `storage.lock`). Its run
    ends without saving: another process writes the same checkpoints.
    """

    _agreed = False  # by all processes, which have no line: to stop

    def __init__(self):
        self._entered = contextlib.ExitStack()
        self._passed_on = False  # the signal, to the other processes

    @property
    def asked(self) -> bool:
        """Whether a signal was noticed, here or by agreement."""
        link = peers.current()
        agreed = StopSignal._agreed or (link is not None and link.has_agreed)
        return agreed or bool(stopping.received())

    def __enter__(self) -> StopSignal:
        """Start to listen.

        Raises:
          Preempted: a signal has come earlier, and nothing has stopped since.
        """
        self._entered.enter_context(stopping.listening())
        try:
            self._raise_if_asked("stopped before the training began; what is done is kept")
        except BaseException:
            self.__exit__(*sys.exc_info())
            raise
        return self

    def __exit__(self, kind, error, traceback) -> None:
        if isinstance(error, Preempted):
            StopSignal._agreed = False
        self._entered.__exit__(kind, error, traceback)

    @contextlib.contextmanager
    def steps(self) -> Iterator[None]:
        """Only note a signal in the block, whose loop asks `agreed` at every step.

        Raises:
          Preempted: at the end, for a signal that came too late for the loop to obey.
        """
        with stopping.noted():
            yield
        self._raise_if_asked("stopped after the training; what is done is kept")

    def agreed(self, step: int = 0) -> bool:
        """Whether to stop now; the answer is the same in all processes.

        All of them have to call it equally often, at each step. Once True, it stays True.

        Args:
          step: only decides when processes without a line talk to each other.

        Raises:
          storage.Locked: a process has lost a lock, so none of them may save.
        """
        stops = self._exchange(step)
        if stops and sharding.any_process(bool(lost := storage.lost_locks())):
            folders = ", ".join(lost) or "the workdir"  # processes without the lock know no name
            raise storage.Locked(f"{folders}: another process took over; nothing more is saved")
        return stops

    def _exchange(self, step: int) -> bool:
        """Whether to stop, as far as all processes know."""
        if jax.process_count() == 1:
            return bool(stopping.received())
        if link := peers.current():
            if stopping.received() and not self._passed_on:
                self._passed_on = True
                link.ask_to_stop()
            return link.agreed()
        if not StopSignal._agreed and step % EXCHANGE == 0:
            StopSignal._agreed = sharding.any_process(bool(stopping.received()))
        return StopSignal._agreed

    def _raise_if_asked(self, message: str) -> None:
        if self.asked:
            raise Preempted(message)


def forget_stop() -> None:
    """Forget a signal that has stopped nothing yet."""
    stopping.forget()
    StopSignal._agreed = False
