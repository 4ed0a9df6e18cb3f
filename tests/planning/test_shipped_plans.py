"""The plans of the shipped configs, with small models on eight CPU devices."""

import ast
import json
import math
import os
import pathlib
import re
import subprocess
import sys

import pytest

from benchmarks.plans import PAIRS
from dpojax.config.files import read_config
from dpojax.planning.chips import topology
from dpojax.planning.plan import make_plan
from tests import further

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
    "path", ["llama8b.py:v5p", "instructions.py", "imdb.py:paper", *further("hh.py", "tldr.py")]
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


@pytest.mark.long
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


FULL_SIZE = ("llama8b.py", "hh.py", "tldr.py", "imdb.py")


def text_of(config):
    source = (ROOT / "configs" / config).read_text()
    return " ".join(ast.get_docstring(ast.parse(source)).split())


@pytest.mark.parametrize("config", FULL_SIZE)
def test_a_config_at_full_size_names_chips_and_the_commands_that_plan_and_launch_it(config):
    text = text_of(config)
    assert re.search(r"(v5e|v5p|v6e|h100|h200):\d", text)
    assert re.search(r"scripts/(launch|frontier)\.py .*--config=configs/" + config, text)
    assert "docs/plans.md" in text


def test_numbers_of_a_compiled_plan_in_a_config_are_those_that_are_kept():
    """As benchmarks/plans.py keeps them, and docs/plans.md has them."""
    found = {}
    for config in FULL_SIZE:
        for said in re.findall(r"(\w+:[\dx]+): ([\d.]+) GiB, ([\d.]+) h, ", text_of(config)):
            found[config, said[0]] = said[1:]
    kept = {}
    for pair in PAIRS:
        config = pair.config.removeprefix("configs/").partition(":")[0]
        if (config, pair.topology) in found:
            stages = json.loads(pair.file.read_text())
            memory = max(sum(p["memory"].values()) for stage in stages for p in stage["programs"])
            hours = sum(stage["hours"] for stage in stages)
            kept[config, pair.topology] = f"{memory / 2**30:.1f}", f"{hours:.2f}"
    assert found == kept
    assert ("llama8b.py", "h200:8") in found
