"""TPU VMs without a cluster: `gcloud ... ssh --worker=all`, one job after another."""

from __future__ import annotations

import argparse
import shlex

from dpojax.jobs.job import Job
from dpojax.launching.engine import Engine, Launch, lines_of, option_words


class TpuVm(Engine):
    """gcloud's ssh to all hosts of a TPU."""

    name, about = "tpu-vm", "a script of `gcloud compute tpus tpu-vm ssh --worker=all`"
    submits_with = "gcloud"
    code = "~/dpojax"

    def add_options(self, parser: argparse.ArgumentParser) -> None:
        parser.add_argument("--tpu", required=True, help="name of the TPU")
        parser.add_argument("--zone", required=True)
        parser.add_argument("--project", default="")

    def is_distributed(self, options: argparse.Namespace) -> bool:
        return True

    def text(self, launch: Launch, options: argparse.Namespace) -> str:
        lines = [
            "#!/usr/bin/env bash",
            f"# Runs {launch.name} on all hosts of {options.tpu}. Nothing starts it again by",
            "# itself: after a stop, the same file goes on.",
            "set -euo pipefail",
        ]
        for job in launch.jobs:
            lines += ["", lines_of(_ssh(launch, job, options))]
        return "\n".join(lines) + "\n"


def _ssh(launch: Launch, job: Job, options: argparse.Namespace) -> list[str]:
    exports = () if job.needs_devices else ("JAX_PLATFORMS=cpu",)
    return [
        f"gcloud compute tpus tpu-vm ssh {shlex.quote(options.tpu)}",
        *option_words(
            zone=options.zone,
            project=options.project,
            worker="all" if job.needs_devices else "0",
            command=launch.shell(launch.words(job), *exports),
        ),
    ]


ENGINE = TpuVm()
