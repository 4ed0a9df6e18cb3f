"""A job is data: a command, what it needs, and what it makes. A plan is a list of jobs.

Executors (`in_process`, `local_workers`) know nothing of what a job means. They start the jobs
whose needs are met, and a job has ended once its outputs are there.
"""

from __future__ import annotations

import contextlib
import importlib
import shlex
import sys
import traceback
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from dpojax import storage
from dpojax.stopping import Preempted

PYTHON = ("python", "-m")  # how every command begins; a module of dpojax and its arguments follow


class Job(NamedTuple):
    """One step of a plan; all fields can be written as JSON.

    Attributes:
      name: unique in its plan.
      command: `python -m MODULE ARGUMENT ...`, to be run by hand too. MODULE has a function
        `main(arguments)`, which returns when the job is done and raises when it fails.
      needs: names of the jobs before it that have to be done.
      outputs: paths that are there once it is done.
      failure_files: for each output, a path that is there instead where making it has failed and
        the other jobs go on. The job is not tried again, and no job that needs it is started. Empty
        for a job that may not fail alone.
      kind: jobs of one kind take about the same time and compile the same programs. "": no other
        job is like this one.
      is_part: the job is one part of a larger one, cut so that parts can be done at once.
      needs_devices: it computes on accelerators. A job that only reads and writes files runs on any
        machine.
    """

    name: str
    command: tuple[str, ...]
    needs: tuple[str, ...] = ()
    outputs: tuple[str, ...] = ()
    failure_files: tuple[str, ...] = ()
    kind: str = ""
    is_part: bool = False
    needs_devices: bool = True

    @property
    def kind_name(self) -> str:
        """The kind's name, also of a job that is alone in its kind."""
        return self.kind or self.name

    @property
    def is_done(self) -> bool:
        return all(map(_exists, self.outputs))

    @property
    def has_failed(self) -> bool:
        """Whether each output that is missing has failed by itself."""
        pairs = list(zip(self.outputs, self.failure_files))
        return bool(pairs) and all(_exists(x) or _exists(failure) for x, failure in pairs)


def command(module: str, **options: Any) -> tuple[str, ...]:
    """The command that calls a module with options: `python -m MODULE --NAME=VALUE ...`."""
    flags = (f"--{name}={value}" for name, value in options.items() if value not in (None, ""))
    return (*PYTHON, module, *flags)


def pending(jobs: Sequence[Job]) -> list[Job]:
    """The jobs that are still to be done, in order.

    Those that failed, and those that need one that failed or was left out, are not among them.
    """
    left_out: set[str] = set()
    to_do = []
    for job in jobs:
        if job.is_done:
            continue
        if job.has_failed or not left_out.isdisjoint(job.needs):
            left_out.add(job.name)
        else:
            to_do.append(job)
    return to_do


def execute(job: Job) -> None:
    """Run a job's command in this process.

    Raises:
      ValueError: the command is not one of Python modules.
      what the module's `main` raises.
    """
    if job.command[:2] != PYTHON or len(job.command) < 3:
        raise ValueError(f"job {job.name}: its command has to begin with {' '.join(PYTHON)} MODULE")
    module, *arguments = job.command[2:]
    importlib.import_module(module).main(arguments)


def execute_logged(job: Job, folder: storage.Path) -> None:
    """`execute`, where everything printed goes into folder/logs/NAME.txt.

    A job whose failure files are there afterwards has failed by itself: the others go on.

    Raises:
      what the job raises otherwise; the traceback is in the log, too.
      RuntimeError: the job returned and one of its outputs is not there.
    """
    with storage.LineWriter(folder / "logs" / f"{job.name.replace('/', '-')}.txt") as log:
        text = _Log(log)
        with contextlib.redirect_stdout(text), contextlib.redirect_stderr(text):
            try:
                execute(job)
                _require_outputs(job)
            except Preempted as stopped:
                print(stopped)
                raise
            except BaseException:
                traceback.print_exc()
                if not job.has_failed:
                    raise
            finally:
                text.end_line()


def plan_as_json(jobs: Sequence[Job]) -> list[dict]:
    """The jobs as a list of JSON objects, each with its command as one line for a shell."""
    return [job._asdict() | {"command": shlex.join(job.command)} for job in jobs]


def job_from_json(values: Mapping[str, Any]) -> Job:
    """The job that `plan_as_json` wrote.

    Raises:
      TypeError, KeyError: it has a field too many, or lacks one.
    """
    lists = {name: tuple(values[name]) for name in ("needs", "outputs", "failure_files")}
    return Job(**{**values, **lists, "command": tuple(shlex.split(values["command"]))})


class _Log:
    """A text stream whose whole lines go into a log."""

    def __init__(self, lines: storage.LineWriter):
        self._lines, self._rest = lines, ""
        self.encoding = sys.stdout.encoding

    def write(self, text: str) -> int:
        *whole, self._rest = (self._rest + text).split("\n")
        for line in whole:
            self._lines.write(line)
        return len(text)

    def flush(self) -> None:
        self._lines.flush()

    def isatty(self) -> bool:
        return False

    def end_line(self) -> None:
        if self._rest:
            self.write("\n")


def _require_outputs(job: Job) -> None:
    """Raise RuntimeError where an output is missing."""
    missing = [path for path in job.outputs if not _exists(path)]
    if missing:
        raise RuntimeError(f"job {job.name}: its command ended without making {missing[0]}")


def _exists(path: str) -> bool:
    return storage.as_path(path).exists()
