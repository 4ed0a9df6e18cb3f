"""Slurm: an sbatch script for one job, or a script that calls sbatch for each of several."""

from __future__ import annotations

import argparse
import shlex

from dpojax.config.errors import ConfigError
from dpojax.jobs.job import Job
from dpojax.launching.engine import Engine, Launch, codes, job_names

# The end of the file that sbatch reads from the script; no line of a job is this one.
END = "END_OF_JOB"

# `--requeue` lets Slurm start a job again after a preemption or a lost node, and `scontrol requeue`
# do so by hand. A job's own exit code requeues nothing by itself, so the script looks at it.
# `Incomplete` leaves a job alone that was cancelled meanwhile.
REQUEUE = """\
status=0
{command} || status=$?
case $status in
  {patterns})
    if (( ${{SLURM_RESTART_COUNT:-0}} < {max_restarts} )); then
      echo "status $status: the job goes back into the queue, and goes on from its last checkpoint"
      # Slurm ends this script while it waits.
      scontrol requeue Incomplete "$SLURM_JOB_ID" && sleep 300
    else
      echo "status $status: restarted ${{SLURM_RESTART_COUNT:-0}} times already, so not again"
    fi ;;
esac
exit $status
"""


class Slurm(Engine):
    """sbatch and srun."""

    name, about = "slurm", "an sbatch script"
    submits_with, suffix = "sbatch", ".sbatch"
    python = ""
    grace = 60
    shares_files = True

    def add_options(self, parser: argparse.ArgumentParser) -> None:
        parser.add_argument("--nodes", type=int, default=1, help="of each job; default: 1")
        parser.add_argument("--gpus_per_node", type=int, default=0, help="default: none")
        parser.add_argument(
            "--tasks_per_node",
            type=int,
            default=0,
            help="processes; default: one for each GPU, as JAX takes them under Slurm, or one",
        )
        for name in ("partition", "account", "qos", "time", "mem"):
            parser.add_argument(f"--{name}", default="", help=f"as sbatch has --{name}")
        parser.add_argument("--cpus_per_task", type=int, default=0, help="default: Slurm's own")
        parser.add_argument(
            "--sbatch", default="", help="more options of sbatch: '--constraint=h100 --exclusive'"
        )

    def check(self, options: argparse.Namespace) -> None:
        for name, least in (("nodes", 1), ("gpus_per_node", 0), ("tasks_per_node", 0)):
            if getattr(options, name) < least:
                raise ConfigError(f"--{name}={getattr(options, name)}: {least} or more")
        try:
            words = shlex.split(options.sbatch)
        except ValueError as error:
            raise ConfigError(f"--sbatch={options.sbatch}: {error}") from error
        if odd := [word for word in words if not word.startswith("-")]:
            raise ConfigError(f"--sbatch: {odd[0]!r} is no option; write --NAME=VALUE")

    def is_distributed(self, options: argparse.Namespace) -> bool:
        return options.nodes * _tasks(options) > 1

    def text(self, launch: Launch, options: argparse.Namespace) -> str:
        if len(launch.jobs) > 1:
            return _submission(launch, options)
        (name,) = job_names(launch).values()
        return _script(launch, launch.jobs[0], name, options)

    def submit(self, file: str, launch: Launch) -> tuple[str, ...]:
        return ("sbatch" if len(launch.jobs) == 1 else "bash", file)


def _tasks(options: argparse.Namespace) -> int:
    return options.tasks_per_node or options.gpus_per_node or 1


def _submission(launch: Launch, options: argparse.Namespace) -> str:
    """A script that submits all jobs, each after those that it needs."""
    names = job_names(launch)
    numbers = {job.name: f"job_{index}" for index, job in enumerate(launch.jobs, 1)}
    lines = [
        "#!/usr/bin/env bash",
        f"# Submits the {len(launch.jobs)} jobs of {launch.name}. Run it with: bash FILE",
        "# A job starts once those that it needs have ended well.",
        "set -euo pipefail",
    ]
    for job in launch.jobs:
        needs = [numbers[name] for name in job.needs if name in numbers]
        order = ""
        if needs:
            order = f" --dependency=afterok:{':'.join(f'${{{name}}}' for name in needs)}"
            order += " --kill-on-invalid-dep=yes"
        lines += [
            "",
            f"{numbers[job.name]}=$(sbatch --parsable{order} <<'{END}'",
            _script(launch, job, names[job.name], options).rstrip("\n"),
            END,
            ")",
            f"{numbers[job.name]}=${{{numbers[job.name]}%%;*}}  # without the cluster's name",
            f'echo "${numbers[job.name]} {names[job.name]}"',
        ]
    return "\n".join(lines) + "\n"


def _script(launch: Launch, job: Job, name: str, options: argparse.Namespace) -> str:
    """The batch script of a job."""
    folder = f"{launch.logs}/" if launch.logs else ""
    directives = {
        "job-name": name,
        "output": shlex.quote(f"{folder}{name}-%j.out"),
        "open-mode": "append",  # a job that is started again goes on with its file
        "requeue": None,
        "signal": f"TERM@{launch.grace}",
        "nodes": 1,
        "ntasks-per-node": 1,
        **{key: getattr(options, key) for key in ("partition", "account", "qos", "time", "mem")},
    }
    command = f"JAX_PLATFORMS=cpu {shlex.join(launch.words(job))}"
    if job.needs_devices:
        directives |= {"nodes": options.nodes, "ntasks-per-node": _tasks(options)}
        directives |= {"gpus-per-node": options.gpus_per_node or ""}
        directives |= {"cpus-per-task": options.cpus_per_task or ""}
        # The processes end by themselves once one has; those that still save are not to be killed.
        command = shlex.join(("srun", "--kill-on-bad-exit=0", *launch.words(job)))
    lines = ["#!/usr/bin/env bash"]
    for key, value in directives.items():
        if value != "":
            lines.append(f"#SBATCH --{key}" + ("" if value is None else f"={value}"))
    lines += [f"#SBATCH {word}" for word in shlex.split(options.sbatch)]
    lines += [f"# Exit codes that start the job again: {codes(launch)}.", "set -uo pipefail"]
    lines += [f"cd {shlex.quote(launch.code)} || exit"] if launch.code else []
    lines += [launch.setup] if launch.setup else []
    lines.append(
        REQUEUE.format(
            command=command,
            patterns="|".join(map(str, launch.restarted)),
            max_restarts=launch.max_restarts,
        )
    )
    return "\n".join(lines)


ENGINE = Slurm()
