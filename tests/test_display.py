"""What a command is doing stands below all that it prints, and fits the terminal."""

import io
import os
import sys
import threading
import time

import pytest

from dpojax import display
from dpojax.runs.terminal import Lasting


class Screen(io.StringIO):
    """A terminal that keeps all that was written to it."""

    def isatty(self):
        return True


@pytest.fixture
def quick(monkeypatch):
    monkeypatch.setattr(display, "TICK", 0.01)
    monkeypatch.setattr(display, "SOON", 0.03)


def wait_for(text: str, stream: io.StringIO) -> None:
    ends = time.monotonic() + 10
    while text not in stream.getvalue():
        assert time.monotonic() < ends, stream.getvalue()
        threading.Event().wait(0.01)


def seen(text: str) -> list[str]:
    """The lines of a terminal after a text with the three sequences that `display` writes."""
    lines, row = [""], 0
    for part in text.replace("\x1b[K", "\x00").replace("\x1b[A", "\x01"):
        if part == "\n":
            row += 1
            lines += [""] * (row + 1 - len(lines))
        elif part == "\x01":
            row -= 1
        elif part in "\r\x00":
            lines[row] = ""  # a line is always cleared after a carriage return
        else:
            lines[row] += part
    return lines[: row + 1]


@pytest.mark.usefixtures("quick")
def test_a_terminal_shows_what_is_done_below_what_is_printed_and_nothing_at_the_end(monkeypatch):
    monkeypatch.setenv("COLUMNS", "60")
    screen = Screen()
    stream = Lasting(screen, "the screen")
    with display.showing_on(stream):
        wait_for("starting", screen)
        print("a line", file=stream)
        with display.line(lambda: "frontier 1/3 jobs"), display.bar("dpo", 100, 40) as bar:
            wait_for("dpo", screen)
            for _ in range(10):
                bar.update()
            bar.note = "loss 0.61"
            wait_for("50/100 steps", screen)
            print("another", file=stream)
            wait_for("loss 0.61", screen)
        with display.doing("compiling the step"):
            wait_for("compiling the step  0:0", screen)
    assert seen(screen.getvalue()) == ["a line", "another", ""]
    assert max(map(len, seen(screen.getvalue()))) < 60


@pytest.mark.usefixtures("quick")
def test_a_pipe_is_told_once_what_lasts_and_gets_no_control_characters():
    pipe = io.StringIO()
    stream = Lasting(pipe, "the pipe")
    with display.showing_on(stream), display.doing("compiling the step"):
        wait_for("compiling the step  0:00\n", pipe)
        threading.Event().wait(0.2)
        with display.bar("dpo", 4) as bar:
            bar.update()
            wait_for("dpo  1/4 steps\n", pipe)
    text = pipe.getvalue()
    assert text.count("compiling") == 1
    assert not set("\r\x1b") & set(text)


@pytest.mark.usefixtures("quick")
def test_what_a_pipe_is_told_does_not_change_what_it_is_told_next(monkeypatch):
    monkeypatch.setattr(display._State, "has_printed", False)
    pipe = io.StringIO()
    with display.showing_on(Lasting(pipe, "the pipe")):
        wait_for("starting", pipe)
        threading.Event().wait(0.2)
    assert pipe.getvalue() == "starting  0:00\n"


@pytest.mark.usefixtures("quick")
def test_a_terminal_that_cannot_clear_lines_is_told_what_a_pipe_is(monkeypatch):
    monkeypatch.setenv("TERM", "dumb")
    screen = Screen()
    with display.showing_on(Lasting(screen, "the screen")), display.doing("compiling"):
        wait_for("compiling  0:00\n", screen)
    assert not set("\r\x1b") & set(screen.getvalue())


@pytest.mark.skipif(not hasattr(os, "openpty"), reason="needs a terminal")
def test_the_width_is_that_of_the_stream_whatever_standard_output_is(monkeypatch):
    termios = pytest.importorskip("termios")
    monkeypatch.delenv("COLUMNS", raising=False)
    user, terminal = os.openpty()
    with open(user, "rb"), open(terminal, "w") as stream:
        termios.tcsetwinsize(terminal, (50, 44))
        assert display.columns(stream) == 44
        termios.tcsetwinsize(terminal, (0, 0))  # as in a container that nobody told
        assert display.columns(stream) == 80
    monkeypatch.setenv("COLUMNS", "61")
    assert display.columns(Screen()) == 61
    assert display.columns(io.StringIO()) > 1000
    assert display.columns(None) > 1000


def test_a_bar_has_characters_that_the_terminal_can_show():
    bar = display.Bar("dpo", 4, 2, "steps")
    latin = io.TextIOWrapper(io.BytesIO(), encoding="latin-1")
    assert bar.text(80, display._block_of(latin)) == f"dpo  50% |{'#' * 10}{' ' * 10}| 2/4 steps"
    assert display._block_of(Screen()) == "\N{FULL BLOCK}"


def test_a_plan_whose_jobs_run_in_other_processes_has_its_line_alone(monkeypatch):
    monkeypatch.setattr("dpojax.watchdog.doing", lambda: (display.STARTING, 0.0))
    with display.line(lambda: "frontier 1/3 jobs"):
        assert display._texts(60) == ["frontier 1/3 jobs"]
        with display.doing("drawing the figure"):
            line, what = display._texts(60)
    assert line == "frontier 1/3 jobs"
    assert what.startswith("drawing the figure  ")


def test_a_rule_of_a_table_is_cut_at_the_edge_of_the_terminal_and_words_are_not():
    assert display.fill("-" * 83, 60) == "-" * 60
    assert display.fill("-" * 83, 100) == "-" * 83
    word = "--config.preference.data.source=" + "x" * 60
    assert word in display.fill(f"dpojax train {word}", 60)


def test_outside_of_a_command_nothing_is_shown(capfd):
    with display.bar("dpo", 4) as bar, display.doing("waiting"):
        bar.update()
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize("width", [100, 60, 20])
def test_a_bar_is_narrower_than_its_terminal(width):
    bar = display.Bar("preference x 16", 100_000, 99_000, "iterations")
    bar.note = "loss 0.613, accuracy 0.731"
    assert len(bar.text(width)) < width
    assert bar.text(width).startswith("preference x 16"[: width - 1])


def test_the_time_left_is_that_of_the_pace_without_the_first_step(monkeypatch):
    now = [0.0]
    monkeypatch.setattr(display.time, "monotonic", lambda: now[0])
    bar = display.Bar("dpo", 10, 2, "steps")
    assert bar.seconds_left is None
    for now[0] in (100.0, 103.0, 106.0):  # the first step took 100 s to compile
        bar.update()
    assert bar.seconds_left == 3.0 * 5
    now[0] = 107.0
    assert bar.seconds_left == 14.0


def test_a_long_line_breaks_between_its_parts_and_else_between_words():
    line = "step 10/40  eval loss 0.53  accuracy 71.2 %  margin +0.84"
    assert display.fill(line, 100) == line
    assert display.fill(line, 45) == "step 10/40  eval loss 0.53  accuracy 71.2 %\n    margin +0.84"
    assert display.fill("one two three four", 9) == "one two\n    three\n    four"
    assert display.fill("x" * 30, 9) == "x" * 30  # a path stays whole


def test_without_a_terminal_lines_stay_whole(monkeypatch):
    monkeypatch.setattr(sys, "stdout", log := io.StringIO())
    display.say("word " * 100)
    assert log.getvalue() == "word " * 100 + "\n"
