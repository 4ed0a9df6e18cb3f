"""SkyPilot: a managed job, which is recovered after a preemption; several jobs are a pipeline."""

from __future__ import annotations

import argparse
from typing import Any

import yaml

from dpojax.jobs.job import Job
from dpojax.launching.engine import PORT, Engine, Launch, dns_name, job_names

# The machines of a task, in the words that `sharding.start_distributed` reads.
PROCESSES = (
    f'JAX_COORDINATOR_ADDRESS="$(echo "$SKYPILOT_NODE_IPS" | head -n 1):{PORT}"',
    'JAX_NUM_PROCESSES="$SKYPILOT_NUM_NODES"',
    'JAX_PROCESS_ID="$SKYPILOT_NODE_RANK"',
)


class SkyPilot(Engine):
    """sky jobs launch."""

    name, about = "skypilot", "the YAML of a managed job"
    submits_with, suffix = "sky", ".yaml"

    def add_options(self, parser: argparse.ArgumentParser) -> None:
        parser.add_argument("--accelerators", required=True, help="H100:8, tpu-v5litepod-16")
        parser.add_argument("--num_nodes", type=int, default=1)
        parser.add_argument("--infra", default="", help="gcp, aws/us-east-1, k8s, ...")
        parser.add_argument("--spot", action="store_true", help="machines that may be taken")
        parser.add_argument("--image", default="", help="docker:IMAGE, or the cloud's id of one")
        parser.add_argument(
            "--install", default="pip install -e '.[gcs]'", help="run once a machine"
        )

    def is_distributed(self, options: argparse.Namespace) -> bool:
        return options.num_nodes > 1 or options.accelerators.lower().startswith("tpu")

    def text(self, launch: Launch, options: argparse.Namespace) -> str:
        names = job_names(launch)
        documents = [_task(launch, job, names[job.name], options) for job in launch.jobs]
        if len(documents) > 1:  # the first document names the pipeline
            documents.insert(0, {"name": dns_name(launch.name)})
        start = (
            f"# Managed jobs of {launch.name}; tasks of a pipeline run one after another.\n"
            "# Start them with: sky jobs launch FILE\n"
        )
        return start + yaml.safe_dump_all(documents, sort_keys=False, width=10_000)

    def submit(self, file: str, launch: Launch) -> tuple[str, ...]:
        return ("sky", "jobs", "launch", file)


def _task(launch: Launch, job: Job, name: str, options: argparse.Namespace) -> dict[str, Any]:
    """One task: the folder of this machine is copied there, and is where commands run."""
    resources: dict[str, Any] = {"infra": options.infra} if options.infra else {}
    nodes, exports = 1, ("JAX_PLATFORMS=cpu",)
    if job.needs_devices:
        nodes, exports = options.num_nodes, PROCESSES if options.num_nodes > 1 else ()
        resources |= {"accelerators": options.accelerators}
    else:
        resources |= {"cpus": "4+"}
    if options.spot:
        resources["use_spot"] = True
    if options.image:
        resources["image_id"] = options.image
    resources["job_recovery"] = {
        "max_restarts_on_errors": 0,
        "recover_on_exit_codes": sorted(launch.restarted),
    }
    return {
        "name": name,
        "workdir": launch.code or ".",
        "num_nodes": nodes,
        "resources": resources,
        "setup": options.install,
        "run": launch._replace(code="").shell(launch.words(job), *exports),
    }


ENGINE = SkyPilot()
