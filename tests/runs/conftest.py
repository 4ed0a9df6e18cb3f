"""A run small enough to make many of: a one-layer model on a few reviews."""

from __future__ import annotations

import json
import os
import pathlib
import re
import subprocess
import sys

import jax
import pytest

from dpojax import sharding
from dpojax.config.defaults import default_config

from .. import QUICK_COMPILES

ROOT = pathlib.Path(__file__).resolve().parents[2]
TINY = {
    "model.width": 16,
    "model.layers": 1,
    "model.heads": 2,
    "model.kv_heads": 2,
    "model.mlp_width": 16,
    "model.max_positions": 128,
    "tokens.max_length": 96,
    "sft.data.limit": 60,
    "sft.data.eval_limit": 10,
    "sft.batch_size": 8,
    "sft.steps": 4,
    "sft.learning_rate": 3e-3,
    "preference.data.limit": 60,
    "preference.data.eval_limit": 10,
    "preference.batch_size": 8,
    "preference.steps": 6,
    "max_buckets": 1,
    "log_every": 1,
    "evaluate_every": 3,
    "checkpoint_every": 2,
    "trackers": (),
    # What one test compiled serves the others: see tests/conftest.py.
    "compilation_cache": os.environ["JAX_COMPILATION_CACHE_DIR"],
}


@pytest.fixture(scope="module", autouse=True)
def few_devices(request):
    """Runs use two devices, or as many as the file's DEVICES, in processes that it starts too.

    Eight of them on two cores mostly wait for each other, and for what is saved of each.
    """
    count, original = getattr(request.module, "DEVICES", 2), sharding.make_mesh
    all_devices = jax.devices()  # eight of them, before a flag says otherwise

    def make_mesh(*sizes, devices=None, **axes):
        return original(*sizes, devices=(devices or all_devices)[:count], **axes)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sharding, "make_mesh", make_mesh)
        flags = re.sub(r"(device_count)=\d+", rf"\1={count}", os.environ["XLA_FLAGS"])
        patch.setenv("XLA_FLAGS", flags)
        yield


def tiny_config(**changes):
    config = default_config()
    config.update_from_flattened_dict(TINY | changes)
    return config


@pytest.fixture
def tiny():
    return tiny_config


def command(workdir, **changes) -> list[str]:
    """The command line of scripts/train.py for the tiny run."""
    flags = [f"--config.{key}={value}" for key, value in (TINY | changes).items()]
    script, config = ROOT / "scripts" / "train.py", ROOT / "configs" / "reviews.py"
    return [sys.executable, str(script), f"--config={config}", f"--workdir={workdir}", *flags]


def environment(devices: int = 1, flags: str = QUICK_COMPILES) -> dict:
    flags += f" --xla_force_host_platform_device_count={devices}"
    return os.environ | {"XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu", "PYTHONUNBUFFERED": "1"}


def train(workdir, **changes) -> subprocess.CompletedProcess:
    return subprocess.run(
        command(workdir, **changes), env=environment(), capture_output=True, text=True, timeout=300
    )


def lines(workdir, stage: str) -> list[dict]:
    text = (pathlib.Path(workdir) / stage / "metrics.jsonl").read_text()
    return [json.loads(line) for line in text.splitlines()]
