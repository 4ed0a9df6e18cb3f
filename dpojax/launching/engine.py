"""What an engine is, and the parts of a shell command that all of them write.

An engine writes one file from jobs, which are data (`jobs.job.Job`). It knows nothing of what a job
means.
"""

from __future__ import annotations

import abc
import argparse
import hashlib
import importlib
import pkgutil
import re
import shlex
from collections.abc import Sequence
from typing import NamedTuple

from dpojax import peers, stopping, storage
from dpojax.config.errors import ConfigError
from dpojax.jobs.job import Job, command
from dpojax.launching import engines as engine_files

KILLED = 128 + 9  # the system killed a process: its machine was taken away, or its memory was full
# A job that ends with one of these goes on where it was, once it is started again. A config may
# choose another code for a stop; a process that is stopped before it has read the config, or that
# SIGTERM kills, still ends with `STOPPED`.
RESTARTED = (stopping.STOPPED, peers.DEAD, KILLED)
PORT = 55527  # of process 0, where an engine leaves the choice to us


class Launch(NamedTuple):
    """What is launched.

    Attributes:
      name: of the whole, from which the engine names its parts.
      jobs: in an order in which each comes after those that it needs.
      plan: the file in which a job finds what it needs (`plans.after`); "" if nothing waits.
      code: the folder from which jobs run, in the engine's machines; "" leaves it to the engine.
      python: the interpreter there.
      setup: shell commands that come first, such as `source env/bin/activate`; "" is none.
      max_restarts: how often a stopped job is started again.
      grace: seconds from SIGTERM to SIGKILL, in which a run saves.
      logs: the folder of what jobs print, where the engine writes files; "" is the current one.
      restarted: the exit codes with which a job is started again.
    """

    name: str
    jobs: tuple[Job, ...]
    plan: str = ""
    code: str = ""
    python: str = "python"
    setup: str = ""
    max_restarts: int = 50
    grace: int = 60
    logs: str = ""
    restarted: tuple[int, ...] = RESTARTED

    def words(self, job: Job) -> tuple[str, ...]:
        """The words of a job's command."""
        return (self.python, *job.command[1:])

    def waiting_words(self, job: Job) -> tuple[str, ...]:
        """The same, for an engine that starts all jobs at once: the job waits for its needs."""
        if not job.needs:
            return self.words(job)
        return (self.python, *command("dpojax.plans.after", plan=self.plan, job=job.name)[1:])

    def shell(self, words: Sequence[str], *exports: str, use_exec: bool = False) -> str:
        """One line of shell: go to the code, set up, run.

        Args:
          exports: `NAME=VALUE`, quoted already.
          use_exec: the command takes the place of the shell, so that signals reach it.
        """
        parts = [f"cd {in_home(self.code)}"] if self.code else []
        parts += [self.setup] if self.setup else []
        parts += [f"export {' '.join(exports)}"] if exports else []
        parts.append(("exec " if use_exec else "") + shlex.join(words))
        return " && ".join(parts)


class Engine(abc.ABC):
    """An engine that runs jobs; it is one file below dpojax/launching/engines.

    Attributes:
      name: what chooses it on the command line.
      about: one line for --help.
      submits_with: the command that submits its file.
      suffix: of the name of its file.
      python: the interpreter of its machines by default; "" is this one.
      code: the folder of the code there by default; "" is the engine's own.
      grace: seconds from SIGTERM to SIGKILL by default.
      shares_files: its machines see the files of this one.
    """

    name: str
    about: str
    submits_with: str
    suffix = ".sh"
    python = "python3"
    code = ""
    grace = 120
    shares_files = False

    @abc.abstractmethod
    def add_options(self, parser: argparse.ArgumentParser) -> None:
        """Add the engine's own flags."""

    def check(self, options: argparse.Namespace) -> None:
        """Raise ConfigError for options that do not fit each other; by default all do."""
        return None

    @abc.abstractmethod
    def is_distributed(self, options: argparse.Namespace) -> bool:
        """Whether a job runs in several processes, which `config.distributed` connects."""

    @abc.abstractmethod
    def text(self, launch: Launch, options: argparse.Namespace) -> str:
        """The file."""

    def submit(self, file: str, launch: Launch) -> tuple[str, ...]:
        """The command that submits the file."""
        return ("bash", file)


def engines() -> dict[str, Engine]:
    """All engines, by name: each file of dpojax/launching/engines has one, its `ENGINE`."""
    found = {}
    for module in pkgutil.iter_modules(engine_files.__path__):
        engine = importlib.import_module(f"{engine_files.__name__}.{module.name}").ENGINE
        found[engine.name] = engine
    return found


def dns_name(text: str, longest: int = 40) -> str:
    """A name as Kubernetes and XPK take it: small letters, digits and hyphens, a letter first.

    A name that had to be changed ends with a mark, so that it still differs from others.
    """
    name = re.sub(r"[^a-z0-9]+", "-", text.lower()).strip("-")
    name = name if name[:1].isalpha() else f"run-{name}".rstrip("-")
    if name == text and len(name) <= longest:
        return name
    mark = hashlib.sha256(text.encode()).hexdigest()[:5]
    return f"{name[: longest - 6].rstrip('-')}-{mark}"


def job_names(launch: Launch, longest: int = 40) -> dict[str, str]:
    """What the engine calls each job, by the job's name."""
    if len(launch.jobs) == 1:
        return {job.name: dns_name(launch.name, longest) for job in launch.jobs}
    return {job.name: dns_name(f"{launch.name}-{job.name}", longest) for job in launch.jobs}


def codes(launch: Launch) -> str:
    """The exit codes that start a job again, with commas between."""
    return ",".join(map(str, launch.restarted))


def option_words(**options: object) -> list[str]:
    """`--NAME=VALUE` for every option that has one; NAME with hyphens, VALUE quoted for a shell."""
    return [
        f"--{name.replace('_', '-')}={shlex.quote(str(value))}"
        for name, value in options.items()
        if value not in (None, "")
    ]


def lines_of(words: Sequence[str]) -> str:
    """One shell command over several lines."""
    return " \\\n  ".join(words)


def in_home(path: str) -> str:
    """A folder quoted for a shell, whose `~` stays the home of the machine that reads it."""
    if path == "~" or path.startswith("~/"):
        return '"$HOME"' + shlex.quote(path[1:]) if path[1:] else '"$HOME"'
    return shlex.quote(path)


def require_bucket(path: str, what: str) -> None:
    """Raise ConfigError for a folder of this machine, which the engine's machines do not see."""
    if storage.is_local(path):
        raise ConfigError(
            f"--workdir={path}: {what} read it from other machines; give a bucket (gs://...)"
        )
