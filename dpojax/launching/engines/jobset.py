"""JobSet: Kubernetes runs one JobSet for each job, with or without Kueue."""

from __future__ import annotations

import argparse
from typing import Any

import yaml

from dpojax.config.errors import ConfigError
from dpojax.jobs.job import Job
from dpojax.launching.engine import PORT, Engine, Launch, job_names

ROLE = "run"  # of the one kind of pods that a JobSet has here
INDEX = "metadata.annotations['batch.kubernetes.io/job-completion-index']"
# Another exit code fails the Job with this reason, and with it the JobSet.
FAILS = "PodFailurePolicy"


class JobSet(Engine):
    """kubectl and the JobSet controller."""

    name, about = "jobset", "YAML of JobSets"
    submits_with, suffix = "kubectl", ".yaml"

    def add_options(self, parser: argparse.ArgumentParser) -> None:
        parser.add_argument("--image", required=True, help="the container")
        parser.add_argument("--hosts", type=int, default=1, help="pods of a slice")
        parser.add_argument("--slices", type=int, default=1, help="of TPUs")
        parser.add_argument("--tpu_accelerator", default="", help="such as tpu-v6e-slice")
        parser.add_argument("--tpu_topology", default="", help="of a slice, such as 4x4")
        parser.add_argument("--tpus_per_host", type=int, default=0)
        parser.add_argument("--gpus_per_host", type=int, default=0)
        parser.add_argument("--namespace", default="")
        parser.add_argument("--queue", default="", help="Kueue's local queue")
        parser.add_argument("--service_account", default="", help="that may read the bucket")

    def check(self, options: argparse.Namespace) -> None:
        tpu = (options.tpu_accelerator, options.tpu_topology, options.tpus_per_host)
        if any(tpu) and not all(tpu):
            raise ConfigError(
                "jobset: TPUs need --tpu_accelerator, --tpu_topology and --tpus_per_host"
            )
        if options.tpus_per_host and options.gpus_per_host:
            raise ConfigError("jobset: give one of --tpus_per_host and --gpus_per_host")
        if options.slices > 1 and not options.tpus_per_host:
            raise ConfigError("jobset: --slices are of TPUs; for more machines give --hosts")

    def is_distributed(self, options: argparse.Namespace) -> bool:
        return options.hosts * options.slices > 1

    def text(self, launch: Launch, options: argparse.Namespace) -> str:
        names = job_names(launch)
        documents = [_jobset(launch, job, names[job.name], options) for job in launch.jobs]
        start = f"# The JobSets of {launch.name}. Start them with: kubectl create -f FILE\n"
        return start + yaml.safe_dump_all(documents, sort_keys=False, width=10_000)

    def submit(self, file: str, launch: Launch) -> tuple[str, ...]:
        return ("kubectl", "create", "-f", file)


def _jobset(launch: Launch, job: Job, name: str, options: argparse.Namespace) -> dict[str, Any]:
    """The JobSet of a job.

    A pod that ends with a code of `launch.restarted` counts as failed; the Job then fails at once,
    and the JobSet starts all its pods again. Any other code ends the JobSet.
    """
    metadata: dict[str, Any] = {"name": name}
    if options.namespace:
        metadata["namespace"] = options.namespace
    if options.queue:
        metadata["labels"] = {"kueue.x-k8s.io/queue-name": options.queue}
    if options.tpus_per_host and job.needs_devices:  # each slice has its own pool of nodes
        key = "alpha.jobset.sigs.k8s.io/exclusive-topology"
        metadata["annotations"] = {key: "cloud.google.com/gke-nodepool"}
    hosts = options.hosts if job.needs_devices else 1
    template = {
        "parallelism": hosts,
        "completions": hosts,
        "completionMode": "Indexed",
        "backoffLimit": 0,
        "podFailurePolicy": {"rules": [_failing_rule(launch)]},
        "template": {"spec": _pod(launch, job, name, options)},
    }
    replicas = options.slices if job.needs_devices else 1
    return {
        "apiVersion": "jobset.x-k8s.io/v1alpha2",
        "kind": "JobSet",
        "metadata": metadata,
        "spec": {
            "failurePolicy": {
                "maxRestarts": launch.max_restarts,
                "rules": [
                    {
                        "name": "otherExitCode",
                        "action": "FailJobSet",
                        "onJobFailureReasons": [FAILS],
                    }
                ],
            },
            "replicatedJobs": [
                {"name": ROLE, "replicas": replicas, "template": {"spec": template}}
            ],
        },
    }


def _failing_rule(launch: Launch) -> dict[str, Any]:
    codes = {"containerName": ROLE, "operator": "NotIn", "values": sorted(launch.restarted)}
    return {"action": "FailJob", "onExitCodes": codes}


def _pod(launch: Launch, job: Job, name: str, options: argparse.Namespace) -> dict[str, Any]:
    exports = () if job.needs_devices else ("JAX_PLATFORMS=cpu",)
    command = launch.shell(launch.waiting_words(job), *exports, use_exec=True)
    container: dict[str, Any] = {
        "name": ROLE,
        "image": options.image,
        "command": ["bash", "-c", command],
    }
    pod: dict[str, Any] = {
        "restartPolicy": "Never",
        "terminationGracePeriodSeconds": launch.grace,
    }
    if options.service_account:
        pod["serviceAccountName"] = options.service_account
    if job.needs_devices:
        devices = {"google.com/tpu": options.tpus_per_host, "nvidia.com/gpu": options.gpus_per_host}
        limits = {key: count for key, count in devices.items() if count}
        if limits:
            container["resources"] = {"limits": limits}
        if options.tpus_per_host:
            pod["nodeSelector"] = {
                "cloud.google.com/gke-tpu-accelerator": options.tpu_accelerator,
                "cloud.google.com/gke-tpu-topology": options.tpu_topology,
            }
        elif options.hosts > 1:  # of TPUs, JAX asks GKE
            container["env"] = _processes(name, options.hosts)
    pod["containers"] = [container]
    return pod


def _processes(name: str, count: int) -> list[dict[str, Any]]:
    """How the pods of a JobSet find each other: its first one has a name in the cluster's DNS."""
    return [
        {"name": "JAX_COORDINATOR_ADDRESS", "value": f"{name}-{ROLE}-0-0.{name}:{PORT}"},
        {"name": "JAX_NUM_PROCESSES", "value": str(count)},
        {"name": "JAX_PROCESS_ID", "valueFrom": {"fieldRef": {"fieldPath": INDEX}}},
    ]


ENGINE = JobSet()
