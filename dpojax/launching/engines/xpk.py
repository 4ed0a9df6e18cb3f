"""XPK: a `xpk workload create` for each job, on a GKE cluster of TPUs or GPUs."""

from __future__ import annotations

import argparse
import shlex

from dpojax.config.errors import ConfigError
from dpojax.launching.engine import (
    Engine,
    Launch,
    codes,
    job_names,
    lines_of,
    option_words,
)

# XPK tells GPU machines of each other under names that JAX does not read.
GPU_PROCESSES = (
    'JAX_COORDINATOR_ADDRESS="$JAX_COORDINATOR_ADDRESS:$JAX_COORDINATOR_PORT"',
    'JAX_NUM_PROCESSES="$NNODES"',
    'JAX_PROCESS_ID="$NODE_RANK"',
)
CAPACITY = ("on-demand", "spot", "flex")


class XPK(Engine):
    """xpk, which makes a JobSet of each workload."""

    name, about = "xpk", "a script of `xpk workload create`"
    submits_with = "xpk"

    def add_options(self, parser: argparse.ArgumentParser) -> None:
        parser.add_argument("--cluster", required=True, help="the GKE cluster")
        parser.add_argument("--tpu_type", default="", help="such as v5litepod-256")
        parser.add_argument("--device_type", default="", help="of GPUs: h100-80gb-8")
        parser.add_argument("--num_slices", type=int, default=1, help="of TPUs")
        parser.add_argument("--num_nodes", type=int, default=1, help="of GPUs")
        parser.add_argument(
            "--image", default="", help="the container; default: xpk makes one of this folder"
        )
        parser.add_argument("--project", default="")
        parser.add_argument("--zone", default="")
        parser.add_argument("--priority", default="")
        parser.add_argument(
            "--capacity", default="", help="on-demand, spot, flex, or the name of a reservation"
        )

    def check(self, options: argparse.Namespace) -> None:
        if bool(options.tpu_type) == bool(options.device_type):
            raise ConfigError("xpk: give one of --tpu_type and --device_type")

    def is_distributed(self, options: argparse.Namespace) -> bool:
        return bool(options.tpu_type) or options.num_nodes > 1

    def text(self, launch: Launch, options: argparse.Namespace) -> str:
        names = job_names(launch)
        lines = [
            "#!/usr/bin/env bash",
            f"# Creates the workloads of {launch.name}. Run it with: bash FILE",
            "set -euo pipefail",
        ]
        exports = GPU_PROCESSES if options.device_type and options.num_nodes > 1 else ()
        for job in launch.jobs:
            if not job.needs_devices:
                continue
            command = launch.shell(launch.waiting_words(job), *exports, use_exec=True)
            lines += ["", lines_of(_create(launch, names[job.name], command, options))]
        for job in launch.jobs:
            if not job.needs_devices:
                here = launch._replace(python="python").waiting_words(job)
                lines += ["", f"# Needs no devices: waits here for {', '.join(job.needs)}."]
                lines.append(f"JAX_PLATFORMS=cpu {shlex.join(here)}")
        return "\n".join(lines) + "\n"


def _create(launch: Launch, name: str, command: str, options: argparse.Namespace) -> list[str]:
    """The words of the command that makes a workload."""
    words = ["xpk workload create"]
    words += option_words(
        cluster=options.cluster,
        project=options.project,
        zone=options.zone,
        workload=name,
        tpu_type=options.tpu_type,
        device_type=options.device_type,
        num_slices=options.num_slices if options.tpu_type else "",
        num_nodes=options.num_nodes if options.device_type else "",
        docker_image=options.image,
        priority=options.priority,
        max_restarts=launch.max_restarts,
        restart_on_exit_codes=codes(launch),
        termination_grace_period_seconds=launch.grace,
    )
    if options.capacity in CAPACITY:
        words.append(f"--{options.capacity}")
    elif options.capacity:
        words += option_words(reservation=options.capacity)
    return words + option_words(command=command)


ENGINE = XPK()
