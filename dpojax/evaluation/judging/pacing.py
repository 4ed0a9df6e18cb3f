"""How fast a server is asked: several requests at once, and only so many in a minute."""

from __future__ import annotations

import queue
import random
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from typing import TypeVar

from dpojax.watchdog import taking_up_to

LONGEST_BACKOFF = 60.0  # seconds

Item = TypeVar("Item")
Result = TypeVar("Result")


class Stopped(Exception):
    """A wait that has ended early, since nobody wants the answer any more."""


class Pace:
    """Lets at most so many requests, and so many tokens, begin in a minute, evenly spaced."""

    def __init__(
        self,
        requests_per_minute: float | None = None,
        tokens_per_minute: float | None = None,
        *,
        clock: Callable[[], float] = time.monotonic,
    ):
        self._seconds_per_request = 60 / requests_per_minute if requests_per_minute else 0.0
        self._seconds_per_token = 60 / tokens_per_minute if tokens_per_minute else 0.0
        self._clock = clock
        self._lock = threading.Lock()
        self._next_start = 0.0
        self._paused_until = 0.0

    def reserve(self, tokens: int) -> float:
        """Take the next free moment for a request, and return how far it is away in seconds."""
        with self._lock:
            now = self._clock()
            start = max(now, self._next_start, self._paused_until)
            self._next_start = start + max(
                self._seconds_per_request, tokens * self._seconds_per_token
            )
            return start - now

    def pause(self, seconds: float) -> None:
        """Let no request begin for this long, because the server has asked for it."""
        with self._lock:
            self._paused_until = max(self._paused_until, self._clock() + seconds)

    def wait(self, tokens: int, stop: threading.Event) -> None:
        """Wait until a request with this many tokens may begin.

        Raises:
          Stopped: `stop` was set.
        """
        wait(self.reserve(tokens), stop)
        while (left := self._paused_until - self._clock()) > 0:
            wait(left, stop)


def wait(seconds: float, stop: threading.Event) -> None:
    """Sleep.

    Raises:
      Stopped: `stop` was set.
    """
    with taking_up_to(seconds):
        if stop.is_set() or (seconds > 0 and stop.wait(seconds)):
            raise Stopped


def backoff(retry: int, base: float) -> float:
    """Return the seconds before a retry: they double from `base`, and chance spreads callers.

    Args:
      retry: 0 before the first one.
    """
    return min(LONGEST_BACKOFF, base * 2**retry) * random.uniform(0.5, 1.0)


def call_in_threads(
    call: Callable[[Item, threading.Event], Result], items: Sequence[Item], threads: int
) -> Iterator[tuple[int, Result]]:
    """Yield (index, `call(item, stop)`) for each item, in the order in which calls end.

    After an error no further call begins. Those under way go on, and are yielded, before the error
    is raised. A caller that stops iterating (as at Ctrl-C) waits for none of them.

    Args:
      call: gets an event that is set when nobody wants further answers; it may raise `Stopped`.
    """
    stop = threading.Event()
    lock = threading.Lock()
    indexes = iter(range(len(items)))
    ended: queue.SimpleQueue = queue.SimpleQueue()

    def work() -> None:
        while not stop.is_set():
            with lock:
                index = next(indexes, None)
            if index is None:
                break
            try:
                ended.put((index, call(items[index], stop), None))
            except Stopped:
                break
            except BaseException as error:
                stop.set()
                ended.put((index, None, error))
        ended.put(None)

    at_work = min(threads, len(items))
    try:
        for number in range(at_work):
            # Python waits for threads that are no daemons before it ends.
            threading.Thread(target=work, daemon=True, name=f"judge-{number}").start()
        first_error = None
        while at_work:
            item = ended.get()
            if item is None:
                at_work -= 1
            elif item[2] is not None:
                first_error = first_error or item[2]
            else:
                yield item[:2]
        if first_error is not None:
            raise first_error
    finally:
        stop.set()
