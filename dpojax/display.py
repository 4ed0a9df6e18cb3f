"""What a command is doing, in lines below all that it prints: no terminal is silent for long.

On a terminal a thread draws these lines anew twice a second: progress bars (`bar`), how far a plan
is (`line`), and where no bar moves, what is being done (`doing`, or what `watchdog.beat` has named)
and for how long. Whatever the command prints takes their place (`making_way`). Without a
terminal there are no such lines. There what lasts is said once after `SOON` seconds, and then a
line a minute.

Only a command shows any of it (`showing_on`). Elsewhere these functions do nothing.
"""

from __future__ import annotations

import contextlib
import os
import re
import sys
import textwrap
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

from dpojax import stopping, watchdog

UNBROKEN = 10**6  # characters of a line without a terminal: a log is searched line by line
USUAL = 80  # columns of a terminal that does not say how many it has
TICK = 0.5  # seconds between two drawings
SOON = 20.0  # seconds without a line, after which a pipe is told what is being done
OFTEN = 60.0  # seconds between two lines in a pipe
STILL = 2.0  # seconds after which a bar that does not move is told what is being done
STARTING = "starting"
WIDEST_BAR = 20  # characters of a progress bar
BLOCK, PLAIN_BLOCK = "█", "#"  # what a bar is made of; the latter in encodings without the first
CLEAR, UP = "\r\x1b[K", "\x1b[A"


class Bar:
    """A progress bar; `update` when some of it is done, `note` for numbers beside it."""

    def __init__(self, name: str, total: int, done: int, unit: str):
        self.name, self.total, self.done, self.unit = name, total, done, unit
        self.note = ""
        self._first: tuple[int, float] | None = None  # done and time at the first update
        self.moved = time.monotonic()

    def update(self, count: int = 1) -> None:
        self.done += count
        self.moved = time.monotonic()
        self._first = self._first or (self.done, self.moved)

    @property
    def seconds_left(self) -> float | None:
        """From the pace since the first update, which waited for a compilation."""
        if self._first is None or self.done == self._first[0]:
            return None
        waited = time.monotonic() - self.moved
        return max(0.0, self._pace * (self.total - self.done) - waited)

    @property
    def _pace(self) -> float:
        """Seconds of one step."""
        done, since = self._first
        return (self.moved - since) / (self.done - done)

    def _pace_text(self) -> str:
        if self._first is None or self.done == self._first[0]:
            return ""
        pace = self._pace
        return f", {pace:.1f} s each" if pace > 1 else f", {1 / max(pace, 1e-9):.1f}/s"

    def text(self, width: int, block: str = BLOCK) -> str:
        """One line of less than `width` characters."""
        share = self.done / self.total if self.total else 1.0
        left = self.seconds_left
        ends = "" if left is None else f"  {clock(left)} left"
        count = f"{self.done}/{self.total} {self.unit}{self._pace_text()}"
        filled = round(WIDEST_BAR * share)
        drawn = f"|{block * filled}{' ' * (WIDEST_BAR - filled)}| "
        note = f"  {self.note}" if self.note else ""
        head = f"{self.name} {share:4.0%} "
        for candidate in (
            head + drawn + count + ends + note,
            head + drawn + count + ends,
            head + count + ends + note,
            head + count + ends,
        ):
            if len(candidate) < width:
                return candidate
        return candidate[: width - 1]

    def plain_text(self) -> str:
        """How far it is, in words."""
        left = self.seconds_left
        ends = "" if left is None else f", {clock(left)} left"
        note = f", {self.note}" if self.note else ""
        return f"{self.name}  {self.done}/{self.total} {self.unit}{ends}{note}"


class _State:
    """The lines of this process."""

    stream: Any = None  # standard error of a command; None shows nothing
    terminal = False  # whether it is one that lines can be drawn on
    block = BLOCK
    lock = threading.RLock()  # a signal may come while a line is drawn
    entries: list = []  # noqa: RUF012 (bars, lines of plans and `doing`, the innermost last)
    drawn = 0  # lines that stand on the terminal
    at_start = True  # the cursor stands at the start of a line
    has_printed = False  # anything but these lines
    last_output = 0.0  # when anything was printed, monotonic
    last_label: Any = None  # of what was last written to a pipe
    ended: threading.Event | None = None


class _Line:
    """A line that its owner makes anew whenever it is shown."""

    def __init__(self, make: Callable[[], str]):
        self.text = make


class _Doing:
    """What is being done."""

    def __init__(self, text: str):
        self.text, self.since = text, time.monotonic()


@contextlib.contextmanager
def showing_on(stream: Any) -> Iterator[None]:
    """Show on a stream what is being done while the block runs; a block in another does nothing."""
    if _State.stream is not None:
        yield
        return
    _State.stream, _State.terminal = stream, _can_be_drawn_on(stream)
    _State.block = _block_of(stream)
    _State.last_output, _State.ended = time.monotonic(), threading.Event()
    watchdog.beat(STARTING)
    stopping.before_saying(_erase_soon)
    thread = threading.Thread(target=_tick, args=(_State.ended,), daemon=True, name="display")
    thread.start()
    try:
        yield
    finally:
        hide()


def hide() -> None:
    """Show nothing from now on: in all processes of a run but the first, and where users type."""
    with _State.lock:
        _erase()
        _State.stream = None
    if _State.ended is not None:
        _State.ended.set()


@contextlib.contextmanager
def bar(name: str, total: int, done: int = 0, unit: str = "steps") -> Iterator[Bar]:
    """A progress bar while the block runs."""
    with _entry(Bar(name, total, done, unit)) as entry:
        yield entry


@contextlib.contextmanager
def line(make: Callable[[], str]) -> Iterator[None]:
    """A line while the block runs; `make` is called whenever it is shown, from another thread."""
    with _entry(_Line(make)):
        yield


def draws() -> bool:
    """Whether a terminal shows the lines."""
    return _State.stream is not None and _State.terminal


@contextlib.contextmanager
def doing(what: str) -> Iterator[None]:
    """Say what the block does, and for how long."""
    with _entry(_Doing(what)):
        yield


@contextlib.contextmanager
def _entry(entry: Any) -> Iterator[Any]:
    _State.entries.append(entry)
    try:
        yield entry
    finally:
        _State.entries.remove(entry)
        if _State.drawn:
            with contextlib.suppress(OSError, ValueError):
                _draw()


@contextlib.contextmanager
def making_way(text: str) -> Iterator[None]:
    """Take the lines away while the block prints a text."""
    if not text or _State.stream is None:
        yield
        return
    with _State.lock:
        _erase()
        _State.at_start = text.endswith("\n")
        _State.last_output, _State.has_printed = time.monotonic(), True
        yield


def clock(seconds: float) -> str:
    """`0:07`, `12:30` or `1:02:03`."""
    minutes, rest = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"


def say(text: str) -> None:
    """Print lines that fit into the terminal; see `fill`."""
    print("\n".join(map(fill, text.split("\n"))), flush=True)


def complain(text: str) -> None:
    """Print to standard error what fits into the terminal; see `fill`."""
    width = columns(sys.stderr)
    print("\n".join(fill(line, width) for line in text.split("\n")), file=sys.stderr, flush=True)


def fill(text: str, width: int | None = None, indent: str = "    ") -> str:
    """Break a line whose parts stand two spaces apart, between two parts where that is possible.

    Args:
      width: characters of a line; None is that of standard output, see `columns`.
      indent: of all lines but the first.
    """
    width = width or columns(sys.stdout)
    if len(text) <= width:
        return text
    if not text.strip("-"):  # a rule of a table
        return text[:width]
    lines = [""]
    for part in re.split(r"(?<=\S) {2,}", text):  # of a table, columns move together
        longer = f"{lines[-1]}  {part}" if lines[-1].strip() else lines[-1] + part
        if len(longer) <= width:
            lines[-1] = longer
            continue
        start = [indent] if lines[-1].strip() else [lines.pop()]
        words = textwrap.wrap(
            part,
            width,
            initial_indent=start[0],
            subsequent_indent=indent,
            break_long_words=False,
            break_on_hyphens=False,
        )
        lines += words or [indent]
    return "\n".join(lines)


def columns(stream: Any) -> int:
    """Columns of the terminal that a stream writes to; `UNBROKEN` where it is none.

    The environment's COLUMNS comes first. A terminal that does not say has `USUAL`.
    """
    if stream is None or not stream.isatty():
        return UNBROKEN
    if os.environ.get("COLUMNS", "").isdecimal() and int(os.environ["COLUMNS"]):
        return int(os.environ["COLUMNS"])
    # `shutil.get_terminal_size` asks standard output, which may be a file where this stream is not.
    try:
        return os.get_terminal_size(stream.fileno()).columns or USUAL
    except (OSError, ValueError):
        return USUAL


def _can_be_drawn_on(stream: Any) -> bool:
    """Whether the stream is a terminal whose lines can be cleared."""
    return stream.isatty() and os.environ.get("TERM") != "dumb"


def _block_of(stream: Any) -> str:
    """What a bar is made of in the stream's encoding."""
    try:
        BLOCK.encode(getattr(stream, "encoding", None) or "utf-8")
    except (UnicodeEncodeError, LookupError):
        return PLAIN_BLOCK
    return BLOCK


def _tick(ended: threading.Event) -> None:
    while not ended.wait(TICK):
        with contextlib.suppress(OSError, ValueError):
            if _State.terminal:
                _draw()
            else:
                _write_to_pipe()


def _draw() -> None:
    with _State.lock:
        if _State.stream is None or not _State.terminal or not (_State.at_start or _State.drawn):
            return
        width = columns(_State.stream)
        texts = _texts(width)
        clipped = "\n".join(text[: width - 1] for text in texts)
        _State.stream.write_below(_clearing() + clipped)
        _State.drawn = len(texts)


def _texts(width: int) -> list[str]:
    """The lines to draw: bars and plans, and what is being done if no bar moves."""
    entries, texts = list(_State.entries), []
    for entry in entries:
        if isinstance(entry, Bar):
            texts.append(entry.text(width, _State.block))
        elif isinstance(entry, _Line):
            texts.append(entry.text())
    innermost = entries[-1] if entries else None
    moves = isinstance(innermost, Bar) and time.monotonic() - innermost.moved < STILL
    if not moves and not _is_elsewhere(innermost):
        texts.append(_what(innermost))
    return texts


def _is_elsewhere(innermost: Any) -> bool:
    """Whether the jobs of a plan run in other processes, so that its line says all there is."""
    return isinstance(innermost, _Line) and watchdog.doing()[0] == STARTING


def _what(innermost: Any) -> str:
    """What is being done, and for how long."""
    what, since = watchdog.doing()
    if what == STARTING and _State.has_printed:
        what = "at work"
    if isinstance(innermost, _Doing):
        what, since = innermost.text, innermost.since
    return f"{what}  {clock(time.monotonic() - since)}"


def _write_to_pipe() -> None:
    """In a pipe: say what lasts, once, and then how far it is every minute."""
    with _State.lock:
        silent = time.monotonic() - _State.last_output
        if _State.stream is None or silent < SOON:
            return
        entries = list(_State.entries)
        innermost = entries[-1] if entries else None
        label = (len(entries), _what(innermost).split("  ")[0])
        if label == _State.last_label and silent < OFTEN:
            return
        texts = [entry.text() for entry in entries if isinstance(entry, _Line)]
        texts += [entry.plain_text() for entry in entries if isinstance(entry, Bar)]
        if not isinstance(innermost, Bar) and not _is_elsewhere(innermost):
            texts.append(_what(innermost))
        _State.stream.write_below("\n".join(texts) + "\n")
        _State.last_label, _State.last_output = label, time.monotonic()


def _erase() -> None:
    if _State.drawn and _State.stream is not None:
        _State.stream.write_below(_clearing())
        _State.drawn = 0


def _erase_soon() -> None:
    """`_erase`, from a thread that must not wait for another one that prints."""
    if _State.lock.acquire(timeout=1.0):
        try:
            _erase()
        finally:
            _State.lock.release()


def _clearing() -> str:
    """What clears the drawn lines, and leaves the cursor at the start of the first one."""
    return CLEAR + (UP + CLEAR) * (_State.drawn - 1) if _State.drawn else ""


def _forget_in_child() -> None:
    _State.stream, _State.lock, _State.drawn = None, threading.RLock(), 0


os.register_at_fork(after_in_child=_forget_in_child)
