"""Jobs for tests: `python -m tests.jobs.small_jobs --do=touch --folder=FOLDER --name=NAME`.

Each one ends by making the file FOLDER/NAME, its output. Which jobs a plan has, and what they need,
is up to the tests.
"""

import argparse
import fcntl
import json
import os
import pathlib
import signal
import time
from collections.abc import Callable

from dpojax.config.errors import ConfigError
from dpojax.jobs.job import Job, command
from dpojax.training.preemption import Preempted, StopSignal

DIAMOND = {
    "a": (),
    "b": ("a",),
    "c": ("a",),
    "d": ("b", "c"),
}  # the jobs of a plan, and their needs


def job(folder: pathlib.Path, name: str, do: str = "touch", **fields) -> Job:
    """A job of this module; `fields` are those of `Job`."""
    call = command(__name__, do=do, folder=folder, name=name)
    return Job(name, call, outputs=(str(folder / name),), **fields)


def diamond(folder: pathlib.Path, **do: str) -> list[Job]:
    """b and c after a, d after both; `do` says what a job does that is not `note`."""
    return [job(folder, name, do.get(name, "note"), needs=x) for name, x in DIAMOND.items()]


def main(arguments) -> None:
    parser = argparse.ArgumentParser()
    for flag in ("--do", "--folder", "--name"):
        parser.add_argument(flag, required=True)
    options = parser.parse_args(arguments)
    ACTIONS[options.do](pathlib.Path(options.folder), options.name)


def touch(folder: pathlib.Path, name: str) -> None:
    (folder / name).touch()


def say_hello(folder: pathlib.Path, name: str) -> None:
    print("hello")
    touch(folder, name)


def refuse(folder: pathlib.Path, name: str) -> None:
    raise ConfigError("config.preference.beta = 0.0: must be greater than 0")


def fail_and_say_so(folder: pathlib.Path, name: str) -> None:
    (folder / f"{name}.failed").write_text("the loss was NaN")
    raise FloatingPointError("the loss was NaN")


def forget_the_output(folder: pathlib.Path, name: str) -> None:
    with open(folder / f"{name}.calls", "a") as file:
        file.write("called\n")


def note(folder: pathlib.Path, name: str) -> None:
    """Writes what was there before it, and where it ran; b waits until c is under way."""
    before = sorted(set(DIAMOND) & set(os.listdir(folder)))
    (folder / f"{name}.begun").touch()
    if name == "b":
        wait_for(folder / "c.begun")
    cores = sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else [0]
    (folder / f"{name}.json").write_text(json.dumps([before, os.getpid(), cores]))
    touch(folder, name)


def see_who_began(folder: pathlib.Path, name: str) -> None:
    """b1, the first of its kind, lasts until another job has begun."""

    def begun() -> list[str]:
        return sorted(path.stem for path in folder.glob("*.begun"))

    (folder / f"{name}.begun").write_text(" ".join(begun()))
    if name == "b1":
        assert wait_until(lambda: len(begun()) > 1)
    touch(folder, name)


def die(folder: pathlib.Path, name: str) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def fail_beside_another(folder: pathlib.Path, name: str) -> None:
    wait_for(folder / "c.begun")
    raise ConfigError(f"{name} cannot be")


def train_until_asked_to_stop(folder: pathlib.Path, name: str) -> None:
    with StopSignal() as stop, stop.steps():
        (folder / f"{name}.begun").touch()
        while not stop.asked:
            time.sleep(0.05)
        time.sleep(0.5)
        (folder / f"{name}.saved").touch()
        raise Preempted(f"{name}: stopped, saved")


def stop_itself(folder: pathlib.Path, name: str) -> None:
    os.kill(os.getpid(), signal.SIGTERM)


def stop_the_plan(folder: pathlib.Path, name: str) -> None:
    os.kill(os.getppid(), signal.SIGTERM)
    time.sleep(60)


def linger(folder: pathlib.Path, name: str) -> None:
    """Locks a file as long as the process lives."""
    file = os.open(folder / "lock", os.O_CREAT | os.O_RDWR)
    fcntl.flock(file, fcntl.LOCK_EX)
    (folder / f"{name}.begun").touch()
    time.sleep(60)


ACTIONS = {
    action.__name__: action
    for action in (touch, say_hello, refuse, fail_and_say_so, forget_the_output, note)
    + (see_who_began, die, fail_beside_another, train_until_asked_to_stop)
    + (stop_itself, stop_the_plan, linger)
}


def wait_until(holds: Callable[[], bool], seconds: float = 60) -> bool:
    until = time.monotonic() + seconds
    while not holds() and time.monotonic() < until:
        time.sleep(0.05)
    return holds()


def wait_for(path: pathlib.Path) -> None:
    wait_until(path.exists)


if __name__ == "__main__":
    main(None)
