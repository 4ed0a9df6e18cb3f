"""A clean stop: processes that get a SIGTERM agree on the step after which they save and end."""

from __future__ import annotations

import itertools
import signal
from typing import ClassVar

import jax
import numpy as np
from jax.experimental import multihost_utils

EXCHANGE = 5  # steps between two exchanges, where JAX's preemption service is off


class Preempted(Exception):
    """The run was asked to stop (SIGTERM) and has saved its state."""


class StopSignal:
    """Notices a SIGTERM while it is entered; all processes stop at the same step.

    One process has its own signal handler. Several use JAX's preemption service: it handles the
    signal of whichever process gets it, and picks a step that no process has reached yet. Where
    that service is off (`jax_enable_preemption_service`), the processes tell each other at every
    fifth step.

    Attributes:
      asked: a SIGTERM was noticed, here or by agreement.
    """

    # Counts the calls of `agreed` in this process. The service needs numbers that only grow, and
    # all processes call it equally often, whatever the stage and its steps.
    _calls: ClassVar = itertools.count(1)

    def __enter__(self) -> StopSignal:
        self.asked = False
        self._service = (
            jax.process_count() > 1
            and jax.distributed.is_initialized()
            and jax.config.jax_enable_preemption_service
        )
        if not self._service:  # a handler of our own would replace the service's
            self._before = signal.signal(signal.SIGTERM, self._ask)
        return self

    def __exit__(self, *_) -> None:
        if not self._service:
            signal.signal(signal.SIGTERM, self._before)

    def _ask(self, *_) -> None:
        self.asked = True

    def agreed(self, step: int = 0) -> bool:
        """Whether to stop now; the answer is the same in all processes.

        All of them have to call it equally often, at each step. Once True, it stays True.

        Args:
          step: only decides when processes without the preemption service talk to each other.
        """
        if jax.process_count() == 1:
            return self.asked
        if self._service:
            reached = multihost_utils.reached_preemption_sync_point(next(self._calls))
            self.asked = self.asked or reached
            return self.asked
        if step % EXCHANGE:
            return False
        return bool(multihost_utils.process_allgather(np.array(self.asked)).any())
