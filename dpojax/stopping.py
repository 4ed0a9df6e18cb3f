"""What asks a run to stop: SIGTERM, SIGINT (Ctrl-C) and SIGHUP (a terminal that is gone).

A training loop notes the signal and saves after its step (`noted`). Anywhere else nothing is worth
saving, and the signal raises `Preempted`. This module needs the standard library alone, so that a
script can listen before it imports anything else.
"""

from __future__ import annotations

import contextlib
import faulthandler
import multiprocessing
import os
import shlex
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any, NoReturn

# The status of a command that was asked to stop, unless `use_stop_code` sets another one; the same
# command goes on. A shell shows it for a process that SIGTERM has killed (128 + 15).
STOPPED = 143
SIGNALS = tuple(
    getattr(signal, name) for name in ("SIGTERM", "SIGINT", "SIGHUP") if hasattr(signal, name)
)
GO_ON = "the same command goes on"
RESPONSE = 10.0  # seconds that a computation in C++ may take before the process ends over it
RESPONSE_TOLD = 1.0  # the same, where other processes have been told and end, too
AGAIN = 0.1  # seconds after which a Preempted is raised again that Python has dropped
SAME_PRESS = 1.0  # a launcher may pass one Ctrl-C on twice; a later one ends the process at once


class Preempted(BaseException):
    """The run was asked to stop, and nothing that it has saved is lost.

    Not an Exception: libraries that go on after any error would go on after this one, too.
    """


class _State:
    """What this process has received. Signal handlers belong to the whole process."""

    received = ""  # the name of the first signal that stopped nothing yet
    listeners = 0  # how many `listening` blocks are entered
    noting = 0  # how many `noted` blocks are entered
    obeying = False  # whether `between_batches` obeys what was noted
    raised = False  # whether Preempted was raised for it
    repeats = 0  # signals that this process sends itself, since Preempted was dropped
    what = ""  # names what is stopped
    on_end: Callable[[int, str], None] | None = None  # is told that this process ends alone
    stop_code = STOPPED
    before_say: Callable[[], None] | None = None  # clears the terminal's last line


def received() -> str:
    """The name of a signal that has stopped nothing yet; "" if there is none."""
    return _State.received


def raised() -> Preempted | None:
    """What was raised for a signal that has stopped nothing yet; None if nothing was."""
    return Preempted(_sentence()) if _State.raised else None


def stop_code() -> int:
    """The exit status of this process once it was asked to stop."""
    return _State.stop_code


def use_stop_code(code: int) -> None:
    """From now on `stop_code` is `code`.

    Raises:
      ValueError: it is not from 1 to 255: 0 would say that all is done.
    """
    if not 1 <= code <= 255:
        raise ValueError(f"exit status {code}: from 1 to 255")
    _State.stop_code = code


def go_on() -> str:
    """`GO_ON`, and the command line of this process, to be repeated in a shell."""
    name, *words = sys.argv
    if not name.startswith("dpojax "):  # the command `dpojax` puts its name in one word
        name, *words = sys.orig_argv
        name = os.path.basename(name)
    return f"{GO_ON}:\n    {name} {shlex.join(words)}".rstrip()


def forget() -> None:
    """Forget a signal that has stopped nothing yet."""
    _State.received, _State.raised = "", False


def on_end(action: Callable[[int, str], None] | None) -> None:
    """Call `action` with a status and the reason when this process ends before its run does."""
    _State.on_end = action


def before_saying(action: Callable[[], None] | None) -> None:
    """Call `action` before `say` prints."""
    _State.before_say = action


def _tell(status: int, why: str) -> None:
    if _State.on_end is not None:
        with contextlib.suppress(Exception):
            _State.on_end(status, why)


@contextlib.contextmanager
def listening(what: str = "") -> Iterator[None]:
    """Stop at a signal while the block runs; the handlers of before are put back.

    A signal that this process ignores from its start (SIGHUP under nohup) stays ignored. Only the
    main thread can listen; in another one this does nothing. A `Preempted` that leaves the
    outermost block has stopped all there was to stop: its signal is forgotten.

    Args:
      what: names what is stopped, such as "frontier".
    """
    before_what, _State.what = _State.what, what or _State.what
    before = {}
    if threading.current_thread() is threading.main_thread():
        for number in SIGNALS:
            if signal.getsignal(number) is not signal.SIG_IGN:
                before[number] = signal.signal(number, _receive)
    _State.listeners += 1
    try:
        yield
    except Preempted:
        if _State.listeners == 1:
            forget()
        raise
    finally:
        _State.listeners -= 1
        _State.what = before_what
        for number, handler in before.items():
            signal.signal(number, handler)


@contextlib.contextmanager
def noted() -> Iterator[None]:
    """Only note a signal in the block, which asks for it by `received`."""
    _State.noting += 1
    try:
        yield
    finally:
        _State.noting -= 1


@contextlib.contextmanager
def obeyed(between_batches: bool) -> Iterator[None]:
    """In a `noted` block: let an evaluation end early, whose caller saves and repeats it.

    Args:
      between_batches: whether it may; False changes nothing.
    """
    before, _State.obeying = _State.obeying, between_batches
    try:
        yield
    finally:
        _State.obeying = before


@contextlib.contextmanager
def interrupts_raise() -> Iterator[None]:
    """In the block Ctrl-C raises KeyboardInterrupt, as in any Python program, and ends nothing.

    For a dialogue on a terminal, where it stops one answer. SIGTERM and SIGHUP stay as they are.
    """
    in_main = threading.current_thread() is threading.main_thread()
    if not in_main or signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        yield
        return
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    pipe = signal.set_wakeup_fd(-1)  # whoever reads it would say that the run stops
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)
        signal.set_wakeup_fd(pipe, warn_on_full_buffer=False)


def between_batches() -> None:
    """Raise Preempted for a signal that was noted, in a block of `obeyed`."""
    if _State.obeying and _State.received:
        raise Preempted(_sentence())


def _receive(number: int, _frame: object) -> None:
    """The handler, which runs in the main thread."""
    _State.received = _State.received or signal.Signals(number).name
    if not _State.noting and not _State.raised:
        _State.raised = True
        raise Preempted(_sentence())


def dropped() -> None:
    """Raise Preempted again, soon: it came in a finaliser, whose errors Python drops."""
    later(AGAIN, _repeat)


def later(seconds: float, action: Callable[..., None], *arguments: Any) -> None:
    """Call action(*arguments) after a while, in a thread that keeps no process from ending."""
    timer = threading.Timer(seconds, action, arguments)
    timer.daemon = True
    timer.start()


def _repeat() -> None:
    if _State.received:
        _State.raised = False
        _State.repeats += 1
        signal.pthread_kill(threading.main_thread().ident, signal.Signals[_State.received])


def _sentence() -> str:
    subject = f"{_State.what}: " if _State.what else ""
    return f"{subject}stopped by {_State.received}, what is done is kept"


def announce_signals() -> None:
    """Say at once that a signal has come, also while the main thread computes outside of Python.

    A process that cannot obey within `RESPONSE` seconds, and has nothing to save, is ended then. A
    second Ctrl-C ends it at once and saves nothing. Children that are forked do not listen.
    """
    reads, writes = os.pipe()
    os.set_blocking(writes, False)
    signal.set_wakeup_fd(writes, warn_on_full_buffer=False)
    os.register_at_fork(after_in_child=_forget_parent)
    threading.Thread(target=_watch, args=(reads,), daemon=True, name="signals").start()


def _watch(pipe: int) -> None:
    """Read the number of each signal from the pipe."""
    announced: set[int] = set()
    first_interrupt = None
    while number := os.read(pipe, 1):
        number = number[0]
        if number not in SIGNALS:
            continue
        if _State.repeats:
            _State.repeats -= 1
            continue
        now = time.monotonic()
        if number == signal.SIGINT:
            if first_interrupt is not None and now - first_interrupt > SAME_PRESS:
                end_now(stop_code(), "Ctrl-C again: ended at once, without saving; " + go_on())
            first_interrupt = first_interrupt or now
        if number in announced:
            continue
        announced.add(number)
        name = signal.Signals(number).name
        if _State.noting:
            say(f"{name}: the run stops after this step, and saves")
            continue
        say(f"{name}: the run stops")
        _tell(stop_code(), f"was stopped by {name}")
        alone = _State.on_end is None
        later(RESPONSE if alone else RESPONSE_TOLD, _end_if_deaf, name)


def _end_if_deaf(name: str) -> None:
    """End the process if the main thread has not handled the signal."""
    if not (_State.raised or _State.noting):
        end_now(stop_code(), f"stopped by {name}, what is done is kept; {go_on()}")


def _forget_parent() -> None:
    """In a forked child: a terminal's signals are for the parent, which ends its children."""
    signal.set_wakeup_fd(-1)
    for number in SIGNALS:
        if signal.getsignal(number) is _receive:
            ends = number == signal.SIGTERM
            signal.signal(number, signal.SIG_DFL if ends else signal.SIG_IGN)


def say(text: str) -> None:
    """Print a line on the terminal's error stream, whatever this thread's streams are by now."""
    with contextlib.suppress(OSError, ValueError, AttributeError):
        if _State.before_say is not None:
            _State.before_say()
        print(f"\n{text}", file=sys.__stderr__, flush=True)


def end_now(
    status: int, text: str = "", *, why: str = "has ended", stacks: bool = False
) -> NoReturn:
    """End the process from any thread: no barrier, no thread and no library is waited for.

    Its children end, too.

    Args:
      text: is printed first.
      why: is told to the other processes of the run.
      stacks: also print the stack of every thread.
    """
    if text:
        say(text)
    _tell(status, why)
    if stacks:
        with contextlib.suppress(Exception):
            faulthandler.dump_traceback(file=sys.__stderr__)
    with contextlib.suppress(Exception):
        for child in multiprocessing.active_children():
            child.kill()
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(Exception):
            stream.flush()
    os._exit(status)
