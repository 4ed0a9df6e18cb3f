"""The parts of two schemas that scripts/launch.py writes, as small tables of our own.

A field that is not in a table is refused, as the servers refuse it. The tables were read off the
CRD of JobSet (jobset.x-k8s.io/v1alpha2), batch/v1 and core/v1 of Kubernetes, and the task schema of
SkyPilot 0.14.
"""

from __future__ import annotations

import re
from typing import Any, NamedTuple

TEXT, NUMBER, FLAG = str, int, bool


class Choice(NamedTuple):
    """One of several texts."""

    names: tuple[str, ...]


class Pattern(NamedTuple):
    """A text that matches all of a regular expression."""

    expression: str


class Needed(NamedTuple):
    """A field that has to be there."""

    schema: Any


# A name in DNS. JobSet adds `-run-0-0` and five letters to it, 63 characters in all.
NAME = Pattern("[a-z]([-a-z0-9]{0,38}[a-z0-9])?")
MAP = {str: TEXT}

ENVIRONMENT = {
    "name": Needed(TEXT),
    "value": TEXT,
    "valueFrom": {"fieldRef": {"fieldPath": Needed(TEXT)}},
}
POD = {
    "restartPolicy": Needed(Choice(("Never",))),  # a podFailurePolicy needs it
    "terminationGracePeriodSeconds": NUMBER,
    "serviceAccountName": TEXT,
    "nodeSelector": MAP,
    "containers": Needed(
        [
            {
                "name": Needed(NAME),
                "image": Needed(TEXT),
                "command": [TEXT],
                "resources": {"limits": {str: NUMBER}},
                "env": [ENVIRONMENT],
            }
        ]
    ),
}
FAILURE_RULE = {
    "action": Needed(Choice(("FailJob", "Ignore", "Count", "FailIndex"))),
    "onExitCodes": {
        "containerName": TEXT,
        "operator": Needed(Choice(("In", "NotIn"))),
        "values": Needed([NUMBER]),
    },
}
JOB = {
    "parallelism": NUMBER,
    "completions": NUMBER,
    "completionMode": Choice(("Indexed", "NonIndexed")),
    "backoffLimit": NUMBER,
    "podFailurePolicy": {"rules": Needed([FAILURE_RULE])},
    "template": Needed({"spec": Needed(POD)}),
}
JOBSET = {
    "apiVersion": Needed(Choice(("jobset.x-k8s.io/v1alpha2",))),
    "kind": Needed(Choice(("JobSet",))),
    "metadata": Needed(
        {"name": Needed(NAME), "namespace": TEXT, "labels": MAP, "annotations": MAP}
    ),
    "spec": {
        "failurePolicy": {
            "maxRestarts": NUMBER,
            "rules": [
                {
                    "name": Needed(Pattern("[A-Za-z]([A-Za-z0-9_,:]*[A-Za-z0-9_])?")),
                    "action": Needed(
                        Choice(("FailJobSet", "RestartJobSet", "RestartJobSetAndIgnoreMaxRestarts"))
                    ),
                    "onJobFailureReasons": [
                        Choice(("BackoffLimitExceeded", "DeadlineExceeded", "PodFailurePolicy"))
                    ],
                }
            ],
        },
        "replicatedJobs": [
            {
                "name": Needed(NAME),
                "replicas": NUMBER,
                "template": Needed({"spec": Needed(JOB)}),
            }
        ],
    },
}

RESOURCES = {
    "infra": TEXT,
    "accelerators": TEXT,
    "cpus": TEXT,
    "use_spot": FLAG,
    "image_id": TEXT,
    "job_recovery": {"max_restarts_on_errors": NUMBER, "recover_on_exit_codes": [NUMBER]},
}
TASK = {
    "name": NAME,
    "workdir": TEXT,
    "num_nodes": NUMBER,
    "resources": RESOURCES,
    "setup": TEXT,
    "run": TEXT,
}


def check(value: Any, schema: Any, where: str = "") -> None:
    """Raise AssertionError, which says where a value is not what its schema says."""
    if isinstance(schema, Needed):
        check(value, schema.schema, where)
    elif isinstance(schema, Choice):
        assert value in schema.names, f"{where}: {value!r}"
    elif isinstance(schema, Pattern):
        assert re.fullmatch(schema.expression, value), f"{where}: {value!r}"
    elif isinstance(schema, list):
        assert isinstance(value, list), f"{where}: {value!r}"
        for index, item in enumerate(value):
            check(item, schema[0], f"{where}[{index}]")
    elif isinstance(schema, dict):
        _check_fields(value, schema, where)
    else:
        assert type(value) is schema, f"{where}: {value!r} is no {schema.__name__}"


def _check_fields(value: Any, schema: dict, where: str) -> None:
    assert isinstance(value, dict), f"{where}: {value!r}"
    for key, item in value.items():
        assert key in schema or str in schema, f"{where}: an unknown field {key!r}"
        check(item, schema.get(key, schema.get(str)), f"{where}.{key}")
    for key, field in schema.items():
        assert key in value or not isinstance(field, Needed), f"{where}: {key!r} is missing"
