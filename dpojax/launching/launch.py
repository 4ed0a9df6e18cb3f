"""scripts/launch.py: from a command line to the file of an engine."""

from __future__ import annotations

import argparse
import os
import shlex
import shutil
import subprocess
import sys
from collections.abc import Sequence
from typing import NamedTuple

from dpojax import storage
from dpojax.config.command_line import (
    ArgumentParser,
    ConfigWords,
    UsageError,
    command_name,
    gather,
    parse_config_words,
)
from dpojax.config.errors import ConfigError
from dpojax.config.files import shipped_name, split_variant
from dpojax.config.resolved import editable, workdir_path
from dpojax.config.saved import FINISHED
from dpojax.jobs.job import PYTHON, Job
from dpojax.launching.engine import RESTARTED, Engine, Launch, engines, require_bucket
from dpojax.stages.registry import resolve
from dpojax.sweeps.best import parse_best
from dpojax.sweeps.grid import sweep_members
from dpojax.sweeps.launched import begin_sweep
from dpojax.sweeps.plan import PLAN

GRID = "the sweep's members: every combination of KEY=VALUE,VALUE KEY=VALUE,VALUE; with --sweep"
DISTRIBUTED = "--config.distributed=true"


class Asked(NamedTuple):
    """What a command line asks for.

    Attributes:
      engine: that writes the file.
      config: the config and the keys that were set.
      options: of the engine, and those of every engine.
    """

    engine: Engine
    config: ConfigWords
    options: argparse.Namespace


def parse(words: Sequence[str]) -> Asked:
    """Read the command line of scripts/launch.py, without the script's name.

    Raises:
      UsageError, ConfigError: naming the first word that means nothing, or what is missing.
      SystemExit: after --help, or for a flag that does not fit.
    """
    known = engines()
    name, *rest = list(words) or [""]
    if name in ("-h", "--help"):
        print(_overview(known))
        raise SystemExit(0)
    if name not in known:
        shown = f"{name!r}: no such engine" if name else "no engine is named"
        raise UsageError(f"{shown}; begin with one of {', '.join(known)}")
    engine = known[name]
    parser = _parser(engine)
    if {"-h", "--help"} & set(rest):
        parser.print_help()
        raise SystemExit(0)
    config = parse_config_words(gather(rest, ("grid",)))
    options = parser.parse_args(config.rest)
    engine.check(options)
    if not options.name.isprintable():
        raise ConfigError(f"--name={options.name!r}: has a character that cannot be printed")
    if (options.grid or options.seeds or options.best) and not options.sweep:
        raise UsageError("--grid, --seeds and --best are of a sweep: add --sweep")
    if options.max_restarts < 0 or options.grace < 1:
        raise ConfigError("--max_restarts is 0 or more, --grace a second or more")
    return Asked(engine, config, options)


def launch(words: Sequence[str]) -> int:
    """Write the engine's file, say how to submit it, and submit it if asked to.

    Returns:
      the exit status: of the command that submits, if it was called.

    Raises:
      see `parse`; ConfigError: a run that could not start, or an engine that is not installed.
    """
    asked = parse(words)
    engine, options = asked.engine, asked.options
    if options.submit and not shutil.which(engine.submits_with):
        raise ConfigError(
            f"--submit: {engine.submits_with} is not installed here; leave --submit out, and "
            "submit the file from a machine that has it"
        )
    jobs = _jobs_of_sweep(asked) if options.sweep else _job_of_run(asked)
    if not jobs:
        print(f"{options.workdir}: all of it is done, nothing is launched")
        return 0
    launched = _launch(asked, jobs)
    file = _file(asked, launched)
    if launched.logs:  # Slurm starts no job whose log it cannot open
        storage.as_path(launched.logs).mkdir(parents=True, exist_ok=True)
    storage.write_text(file, engine.text(launched, options))
    submit = engine.submit(str(file), launched)
    print(f"{file}: {_described(jobs)}")
    print(f"submit it with: {shlex.join(submit)}", flush=True)
    if not engine.shares_files and storage.is_local(options.workdir):
        print(
            f"--workdir={options.workdir} will be a folder of the job's machines, and lost with "
            "them unless it is a disk of its own; gs://BUCKET/... stays"
        )
    return subprocess.run(submit).returncode if options.submit else 0


def _parser(engine: Engine) -> ArgumentParser:
    parser = ArgumentParser(
        prog=f"{command_name()} {engine.name}",
        description=f"Write {engine.about} that trains a config, or its sweep.",
        epilog="dpojax train --help lists every key of a config.",
    )
    add = parser.add_argument
    add("--config", required=True, help="FILE.py or FILE.py:VARIANT; keys: --config.KEY=VALUE")
    add("--workdir", required=True, help="where the run or the sweep keeps everything")
    add("--sweep", action="store_true", help="a job for each group of the config's sweep()")
    add("--grid", action="extend", nargs="+", default=[], metavar="KEY=VALUES", help=GRID)
    add("--seeds", type=int, default=0, help="of every member of the sweep")
    add("--best", default="", help="name the best member by this metric in the end")
    add("--submit", action="store_true", help="also submit the file")
    add("--name", default="", help="of the launch; default: the last part of the workdir")
    add("--out", default="", help="the file; default: in the workdir, or here if it is a bucket")
    code = "the current one" if engine.shares_files else engine.code or "the engine's own"
    add("--code", default=engine.code, help=f"the folder where jobs run; default: {code}")
    python = engine.python or "this one"
    add("--python", default=engine.python, help=f"the interpreter there; default: {python}")
    add("--setup", default="", help="shell commands before each job: 'source env/bin/activate'")
    add("--max_restarts", type=int, default=50, help="of a stopped job; default: %(default)s")
    add(
        "--grace",
        type=int,
        default=engine.grace,
        help="seconds from the signal to the kill, to save in; default: %(default)s",
    )
    engine.add_options(parser.add_argument_group(engine.name))
    return parser


def _overview(known: dict[str, Engine]) -> str:
    command = command_name()
    lines = [f"usage: {command} ENGINE --config=FILE --workdir=FOLDER [--sweep] [--submit] ...", ""]
    lines += [f"  {engine.name:<10}{engine.about}" for engine in known.values()]
    return "\n".join([*lines, "", f"{command} ENGINE --help shows its flags"])


def _job_of_run(asked: Asked) -> list[Job]:
    """The one job that trains a config; none if it is finished.

    Raises:
      ConfigError: a run that could not start.
    """
    workdir = _workdir(asked)
    resolve(asked.config.value, workdir_path(workdir))
    words = [*PYTHON, "dpojax.runs.run", f"--config={_relative(asked.config.path)}"]
    words += [f"--workdir={workdir}", *asked.config.keys]
    if asked.engine.is_distributed(asked.options) and not asked.config.value.distributed:
        words = [word for word in words if not word.startswith("--config.distributed=")]
        words.append(DISTRIBUTED)
    job = Job(_name(asked), tuple(words), outputs=(f"{workdir}/{FINISHED}",))
    can_look = asked.engine.shares_files or not storage.is_local(workdir)
    return [] if can_look and job.is_done else [job]


def _jobs_of_sweep(asked: Asked) -> list[Job]:
    """The jobs of a sweep that are still to be done; sweep.json is written."""
    workdir = _workdir(asked)
    if not asked.engine.shares_files:
        require_bucket(workdir, "the jobs of a sweep")
    options, config = asked.options, editable(asked.config.value)
    # Of a copy that may be changed, the types of keys that are open are not known any more.
    members = sweep_members(asked.config.path, asked.config.value, options.grid, options.seeds)
    parse_best(options.best, config.stages[-1], members)
    config.distributed = config.distributed or asked.engine.is_distributed(asked.options)
    return begin_sweep(config, members, workdir, best=options.best)


def _launch(asked: Asked, jobs: Sequence[Job]) -> Launch:
    engine, options = asked.engine, asked.options
    workdir = _workdir(asked)
    on_this_disk = engine.shares_files
    code = asked.config.value.exit_code_when_stopped
    return Launch(
        name=_name(asked),
        jobs=tuple(jobs),
        plan=f"{workdir}/{PLAN}" if options.sweep else "",
        code=options.code or (os.getcwd() if on_this_disk else ""),
        python=options.python or sys.executable,
        setup=options.setup,
        max_restarts=options.max_restarts,
        grace=options.grace,
        logs=workdir if on_this_disk and storage.is_local(workdir) else "",
        restarted=tuple(dict.fromkeys((code, *RESTARTED))),
    )


def _workdir(asked: Asked) -> str:
    """--workdir: absolute where this machine's files are seen, else as it was given."""
    given = asked.options.workdir
    path = workdir_path(given)  # also refuses one that no run can have
    return str(path) if asked.engine.shares_files or not storage.is_local(path) else given


def _name(asked: Asked) -> str:
    return asked.options.name or workdir_path(asked.options.workdir).name


def _relative(path: str) -> str:
    """A config's path from here, where the code is.

    One that lies elsewhere stays as it is; one that comes with dpojax is named.
    """
    file, colon, variant = split_variant(path)
    relative = os.path.relpath(file)
    return shipped_name(path) if relative.startswith("..") else f"{relative}{colon}{variant}"


def _file(asked: Asked, launched: Launch) -> storage.Path:
    engine, options = asked.engine, asked.options
    if options.out:
        return storage.as_path(options.out, "--out")
    workdir = workdir_path(options.workdir)
    if storage.is_local(workdir) and engine.shares_files:
        return workdir / f"launch{engine.suffix}"
    return storage.as_path(f"launch-{launched.name}{engine.suffix}")


def _described(jobs: Sequence[Job]) -> str:
    if len(jobs) == 1:
        return "1 job"
    lines = [f"{len(jobs)} jobs"]
    for job in jobs:
        lines.append(f"  {job.name}" + (f", after {', '.join(job.needs)}" if job.needs else ""))
    return "\n".join(lines)
