"""The other process in which records are tokenised: what it does, and its limits.

It reads pickled requests from its standard input and writes pickled replies to its standard output.
It never imports JAX. It ends when its input ends, or when nothing came for `IDLE` seconds.

A chat template is a program of others. While it renders, the process may use so much more memory
and so much time of the processor (`Limits`). A loop of the template is stopped by a signal; a
single operation that never returns ends the process.
"""

from __future__ import annotations

import contextlib
import functools
import math
import os
import pickle
import resource
import select
import signal
import struct
import sys
import time
import traceback
from collections.abc import Iterator
from typing import Any, BinaryIO, NamedTuple

from dpojax.data.records import DataError
from dpojax.data.templates import LimitExceeded

IDLE = 30.0  # seconds
LENGTH = struct.Struct("<Q")  # of a message, in bytes

SETUP, CHUNK = "setup", "chunk"  # requests
DONE, DATA_ERROR, FAILED = "done", "data error", "failed"  # replies


def write(stream: BinaryIO, message: Any) -> None:
    """Write one message."""
    content = pickle.dumps(message, protocol=pickle.HIGHEST_PROTOCOL)
    stream.write(LENGTH.pack(len(content)))
    stream.write(content)
    stream.flush()


def read(stream: BinaryIO) -> Any:
    """Read one message; raises EOFError where the other side has ended."""
    head = stream.read(LENGTH.size)
    if len(head) < LENGTH.size:
        raise EOFError
    content = stream.read(*LENGTH.unpack(head))
    return pickle.loads(content)


class Limits(NamedTuple):
    """What rendering one record may take.

    Attributes:
      seconds: of the processor. Twice as many end the process.
      memory: bytes, besides what the process uses already.
    """

    seconds: float = 10.0
    memory: int = 2 * 2**30


class _TooLong(BaseException):
    """Rendering took too long. A template cannot catch it, as it is no Exception."""


@contextlib.contextmanager
def limited(limits: Limits, id: str) -> Iterator[None]:
    """Bound the time and the memory of rendering record `id`.

    Raises:
      LimitExceeded: as it says.
    """

    def stop(*_: Any) -> None:
        raise _TooLong

    before = signal.signal(signal.SIGPROF, stop)
    signal.setitimer(signal.ITIMER_PROF, limits.seconds)
    cpu, memory = resource.getrlimit(resource.RLIMIT_CPU), resource.getrlimit(resource.RLIMIT_AS)
    _set_limit(resource.RLIMIT_CPU, math.ceil(time.process_time() + 2 * limits.seconds), cpu)
    used = _address_space()
    if used:
        _set_limit(resource.RLIMIT_AS, used + limits.memory, memory)
    try:
        yield
    except _TooLong:
        raise LimitExceeded(
            f"{id}: the chat template did not end in {limits.seconds:.0f} seconds; set "
            "config.chat_template to another one"
        ) from None
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
        signal.signal(signal.SIGPROF, before)
        resource.setrlimit(resource.RLIMIT_CPU, cpu)
        resource.setrlimit(resource.RLIMIT_AS, memory)


def _set_limit(kind: int, value: int, now: tuple[int, int]) -> None:
    """Lower the soft limit to `value`, where the system lets us."""
    soft, hard = now
    if soft == resource.RLIM_INFINITY or value < soft:
        with contextlib.suppress(ValueError, OSError):
            resource.setrlimit(kind, (value, hard))


def _address_space() -> int:
    """Bytes of address space that the process uses; 0 where the system does not tell."""
    try:
        with open("/proc/self/statm", "rb") as file:
            return int(file.read().split()[0]) * resource.getpagesize()
    except OSError:
        return 0


def serve() -> None:
    """Serve requests until the input ends."""
    requests, replies = sys.stdin.buffer, os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # whatever a library prints must not get between the replies
    make = None
    while True:
        ready, _, _ = select.select([requests], [], [], IDLE)
        if not ready:
            return
        try:
            kind, content = read(requests)
        except EOFError:
            return
        try:
            if kind == SETUP:
                make, limits = pickle.loads(content)
                make.limited = functools.partial(limited, limits)
                reply = DONE, None
            else:
                reply = DONE, make(content)
        except DataError as error:
            reply = DATA_ERROR, error
        except Exception:
            reply = FAILED, traceback.format_exc()
        write(replies, reply)
