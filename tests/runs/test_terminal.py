"""A command outlives its terminal, and shows one paragraph where a disk is full."""

import asyncio
import logging
import os
import sys
import threading

import pytest

from dpojax.runs import terminal


@pytest.fixture
def pipe():
    """A stream into a pipe, and the end to read it."""
    reads, writes = os.pipe()
    with (
        os.fdopen(writes, "w", buffering=1, encoding="utf-8") as stream,
        os.fdopen(reads) as reader,
    ):
        yield terminal.Lasting(stream, "standard output"), reader


def test_a_stream_writes_as_before_and_is_dropped_once_its_reader_is_gone(pipe, capsys):
    stream, reader = pipe
    print("a line", file=stream, flush=True)
    assert reader.readline() == "a line\n"
    assert not stream.isatty()
    assert stream.encoding == "utf-8"  # else bars are drawn with #
    reader.close()
    for _ in range(3):
        print("nobody reads this", file=stream, flush=True)
    sys.__stderr__.flush()
    os.write(stream.fileno(), b"a library goes on, too")


def test_other_errors_of_a_stream_are_raised():
    class Full:
        def write(self, text):
            raise OSError(28, "No space left on device")

    with pytest.raises(OSError, match="No space left"):
        terminal.Lasting(Full(), "standard output").write("text")


def test_what_orbax_logs_of_a_failed_save_is_not_shown():
    def record(path, text):
        return logging.LogRecord("absl", logging.ERROR, path, 1, text, (), None)

    shown = terminal.WithoutLibraries().filter
    assert not shown(record("/site-packages/orbax/checkpoint/future.py", "run() raised"))
    assert not shown(record("/asyncio/base_events.py", "Task exception was never retrieved"))
    assert shown(record("/dpojax/storage/locks.py", "in use by another"))


def error_of_a_closed_loop():
    loop = asyncio.new_event_loop()
    loop.close()
    with pytest.raises(RuntimeError) as closed:
        loop.call_soon(print)
    return closed.value


@pytest.mark.parametrize(
    ("error", "shown"),
    [
        (OSError(28, "full"), 0),
        (error_of_a_closed_loop(), 0),
        (ValueError("bug"), 1),
        (RuntimeError("bug"), 1),
    ],
)
def test_only_what_follows_from_a_failed_write_is_quiet(error, shown):
    seen = []
    hook = terminal._unless_it_follows(seen.append)
    hook(threading.ExceptHookArgs((type(error), error, None, None)))
    assert len(seen) == shown
