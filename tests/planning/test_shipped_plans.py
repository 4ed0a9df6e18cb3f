"""The plans of the shipped configs, with small models on eight CPU devices."""

import json
import math
import os
import pathlib
import subprocess
import sys

import pytest

from dpojax.config.files import read_config
from dpojax.planning.chips import topology
from dpojax.planning.plan import make_plan

ROOT = pathlib.Path(__file__).resolve().parents[2]
SHRUNK = {
    "model.path": "",
    "tokenizer": "train:300",
    "model.width": 16,
    "model.layers": 1,
    "model.heads": 2,
    "model.kv_heads": 2,
    "model.mlp_width": 32,
    "model.max_positions": 64,
    "tokens.max_length": 48,
    "tokens.max_prompt_length": 0,
    "plan.prompt": 12.0,
    "plan.response": 6.0,
    "micro_rows": 16,
    "max_buckets": 1,
}


def shrink(config):
    config = config.copy_and_resolve_references()
    with config.unlocked():
        config.update_from_flattened_dict(SHRUNK)
    return config


@pytest.mark.slow
@pytest.mark.parametrize(
    "path", ["llama8b.py:v5p", "hh.py", "tldr.py", "instructions.py", "imdb.py:paper"]
)
def test_every_stage_of_a_shipped_config_has_a_plan(path):
    config = shrink(read_config(str(ROOT / "configs" / path)))
    plans = [*make_plan(config, topology("cpu:8"))]
    assert [one.name for one in plans] == list(config.stages)
    for one in plans:
        stage = config[one.name]
        epoch = math.floor(config.plan.examples / stage.batch_size)
        assert one.planned.steps in (epoch * stage.epochs, (epoch + 1) * stage.epochs)
        assert one.fits
        footprint = one.step.program.footprint
        # Weights and moments are arguments of the step; so are rows, and nothing else.
        state = footprint.weights + footprint.optimizer
        assert state <= one.step.memory.arguments <= 1.5 * state + 2**20


@pytest.mark.slow
def test_the_script_prints_the_plan_of_a_config_and_keeps_its_numbers(tmp_path):
    keys = [f"--config.{key}={value}" for key, value in SHRUNK.items()]
    done = subprocess.run(
        [sys.executable, ROOT / "scripts/plan.py", f"--config={ROOT}/configs/llama8b.py", *keys]
        + ["--topology=cpu:2", f"--json={tmp_path}/plan.json"],
        env=os.environ
        | {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": "--xla_force_host_platform_device_count=2"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert "preference on cpu:2 (fsdp 2)" in done.stdout
    (stage,) = json.loads((tmp_path / "plan.json").read_text())
    names = [program["name"] for program in stage["programs"]]
    assert names == ["step", "evaluation", "reference"]
    for program in stage["programs"]:
        assert program["memory"]["arguments"] > 0
        assert program["name"] in done.stdout
