"""What every command shows: the recorder sees faults, and the commands have none."""

import pathlib
import subprocess
import sys

import pytest

from benchmarks.terminal import COLUMNS, PIPED, ROOT, Recording, commands, faults
from dpojax.commands.entry import COMMANDS


def recording(columns, *pieces, seconds=None, status=0):
    """Pieces that came after so many seconds each."""
    times, texts = zip(*pieces)
    return Recording(columns, times, texts, times[-1] if seconds is None else seconds, status)


@pytest.mark.parametrize(
    ("recorded", "fault"),
    [
        (recording(20, (1.0, "word " * 5 + "\r\n")), "25 columns: "),
        (recording(20, (1.0, "a line\r\n"), (7.5, "late\r\n")), "6.5 s of silence after: a line"),
        (recording(20, (6.0, "a line\r\n")), "6.0 s of silence after: the start"),
        (recording(20, (1.0, "a line\r\n"), seconds=9.0), "8.0 s of silence after: a line"),
        (recording(PIPED, (1.0, "10 %\r20 %\n")), "a carriage return in a pipe"),
        (recording(PIPED, (1.0, "\x1b[31mred\n")), "an escape sequence in a pipe"),
        (recording(PIPED, (1.0, "a line\n"), seconds=99.0), "98.0 s of silence after: a line"),
        (recording(200, (1.0, "PyTorch was not found.\r\n")), "noise: PyTorch was not found."),
        (recording(20, (1.0, "a line\r\n"), status=1), "exit status 1 in place of 0"),
    ],
)
def test_a_recording_is_told_its_fault(recorded, fault):
    (told,) = faults(recorded)
    assert told.startswith(fault)


@pytest.mark.parametrize(
    "recorded",
    [
        recording(20, (4.0, "\r\x1b[K10 %"), (8.0, "\r\x1b[K20 %"), (12.0, "\r\x1b[Kdone\r\n")),
        recording(20, (1.0, f"see /{'folder/' * 9}report.md\r\n")),  # a path cannot be broken
        recording(PIPED, (1.0, "word " * 50 + "\n"), (60.0, "10 %\n")),
    ],
)
def test_a_recording_without_a_fault_is_told_none(recorded):
    assert list(faults(recorded)) == []


def test_every_command_is_recorded_but_the_one_that_waits_for_a_user():
    assert {words[0] for words in commands(pathlib.Path()).values()} == COMMANDS.keys() - {"chat"}


@pytest.mark.long  # it holds only while the machine does nothing else
@pytest.mark.parametrize("columns", COLUMNS)
def test_commands_fit_their_terminal_and_are_never_silent(columns, tmp_path):
    words = ["train", "finished", "sample", "prefer", "export", "inspect-data"]
    command = [sys.executable, ROOT / "benchmarks" / "terminal.py", *words]
    ended = subprocess.run(
        [*command, f"--columns={columns}", f"--out={tmp_path}"], capture_output=True, text=True
    )
    assert ended.returncode == 0, ended.stdout
