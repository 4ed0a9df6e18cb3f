"""Dry runs of sweeps: groups, memory and hours, from shapes alone."""

import pathlib
import subprocess
import sys
from types import SimpleNamespace

import pytest

from dpojax.config.errors import ConfigError
from dpojax.planning.outline import Outline, hours_of_members
from dpojax.sweeps.dry_run import dry_run

from ..runs.conftest import environment
from .test_programs import small

ROOT = pathlib.Path(__file__).resolve().parents[2]
BETAS = [{"preference.beta": 0.1}, {"preference.beta": 1.0}]


def small_sweep():
    config = small()
    config.mesh.update(data=-1, fsdp=1)
    return config


def test_members_of_one_program_share_a_line_and_others_have_their_own():
    members = [*BETAS, {"preference.beta": 0.1, "preference.loss": "hinge"}]
    outline = Outline()
    lines = [*dry_run(small_sweep(), members, outline)]
    groups = lines[1 : lines.index("Programs:")]
    assert groups == ["  beta-0.1, beta-1", "  beta-0.1-loss-hinge"]
    programs = lines[lines.index("Programs:") + 1 : -1]
    assert [line.split(":")[0] for line in programs] == [
        "preference, loss dpo",
        "preference, loss hinge",
    ]
    assert all(
        ": 10 steps of 8 examples" in line.replace("parameters; ", ": ") for line in programs
    )
    assert all("GiB" in line or "MiB" in line for line in programs)
    assert "--topology=" in lines[-1]


def test_a_member_that_could_not_start_is_refused():
    with pytest.raises(ConfigError, match="beat"):
        list(dry_run(small_sweep(), [{"preference.beat": 0.1}], Outline()))


def of_hours(name, hours, *, members=0, fits=True):
    program = SimpleNamespace(name=name, member_devices=members)
    return SimpleNamespace(program=program, hours=hours, memory=fits or None)


@pytest.mark.parametrize(("fits", "hours"), [(True, 5 + 4 * 1 + 2), (False, 4 * 3 + 4 * 1 + 2)])
def test_members_share_a_step_that_fits_and_always_what_scores_the_reference(fits, hours):
    step, together = of_hours("step", 3.0), of_hours("4", 5.0, members=2, fits=fits)
    others = [of_hours("evaluation", 1.0), of_hours("reference", 2.0)]
    plan = SimpleNamespace(step=step, hours=6.0, programs=[step, together, *others])
    assert hours_of_members(plan, 4) == hours
    assert hours_of_members(plan, 1) == 6.0


CONFIG = """
from dpojax.config.defaults import default_config

def get_config(variant="wide"):
    config = default_config()
    config.stages = ("preference",)
    config.tokenizer = "train:300"
    width = {"wide": 64, "narrow": 16}[variant]
    config.model.update(width=width, layers=1, heads=2, kv_heads=2, mlp_width=32, max_positions=64)
    config.tokens.max_length = 48
    config.max_buckets = 1
    config.preference.batch_size = 8
    config.plan.update(examples=80, prompt=10.0, response=6.0)
    return config

def sweep():
    return [{"preference.beta": 0.1}, {"preference.beta": 1.0}]
"""


@pytest.mark.long
def test_a_variant_of_a_config_has_a_dry_run_without_a_workdir(tmp_path):
    (tmp_path / "own.py").write_text(CONFIG)
    said = {}
    for variant in ("wide", "narrow"):
        command = [sys.executable, ROOT / "scripts/sweep.py", f"--config=own.py:{variant}"]
        done = subprocess.run(
            [*command, "--dry_run", "--cpu_devices=1"],
            cwd=tmp_path,
            env=environment(),
            capture_output=True,
            text=True,
        )
        assert done.returncode == 0, done.stderr
        assert "  beta-0.1, beta-1\n" in done.stdout
        said[variant] = int(done.stdout.split("loss dpo: ")[1].split(" ")[0].replace(",", ""))
    # Embeddings, or these and a head; more in the layer.
    assert said["wide"] > said["narrow"] >= 300 * 16
    beside = {path.name for path in tmp_path.iterdir()} - {"__pycache__"}  # Python's own
    assert beside == {"own.py"}
