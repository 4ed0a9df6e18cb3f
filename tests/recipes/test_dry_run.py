"""Dry runs: every program of a recipe is built from shapes alone, and its jobs are listed."""

import json
import pathlib
import subprocess
import sys

import pytest

from dpojax.config.errors import ConfigError
from dpojax.config.files import read_config
from dpojax.recipes.dry_run import dry_run
from dpojax.recipes.recipe import read_recipe

from ..runs.conftest import environment
from .conftest import small_config, small_recipe

ROOT = pathlib.Path(__file__).resolve().parents[2]
# What transformers writes for these models, and the number of parameters that it counts.
GPT2 = {"model_type": "gpt2", "vocab_size": 50257, "n_positions": 1024, "n_embd": 1024}
GPT2 |= {"n_layer": 24, "n_head": 16, "activation_function": "gelu_new"}
GPT2_LARGE = GPT2 | {"n_embd": 1280, "n_layer": 36, "n_head": 20}
PYTHIA = {"model_type": "gpt_neox", "vocab_size": 50304, "hidden_size": 2560}
PYTHIA |= {"num_hidden_layers": 32, "num_attention_heads": 32, "intermediate_size": 10240}
PYTHIA |= {"max_position_embeddings": 2048, "rotary_pct": 0.25, "hidden_act": "gelu"}
PYTHIA |= {"use_parallel_residual": True, "tie_word_embeddings": False, "layer_norm_eps": 1e-5}
PAPER = {
    "tldr": (PYTHIA, "2,775,208,960 parameters"),
    "hh": (GPT2_LARGE, "774,030,080 parameters"),
    "instructions": (GPT2, "354,823,168 parameters"),
}
PROGRAMS = {
    "tldr": {"sft", "preference, loss dpo", "reward", "ppo", "sampler"},
    "hh": {"sft", "preference, loss dpo", "reward", "sampler"},
    "instructions": {"sft", "preference, loss dpo", "sampler"},
}


def lines_of(name, variant, **changes):
    path = f"{ROOT}/configs/{name}.py:{variant}"
    config = read_config(path)
    config.update_from_flattened_dict(changes)
    lines = [*dry_run(config, read_recipe(path, config), "folder")]
    jobs = lines.index(next(line for line in lines if "Jobs" in line))
    return {line.split(":")[0]: line for line in lines[1:jobs]}, lines[jobs + 1 :]


@pytest.mark.long
@pytest.mark.parametrize("name", PROGRAMS)
def test_the_papers_programs_are_built_from_shapes_and_their_memory_is_told(name, tmp_path):
    raw, parameters = PAPER[name]
    (tmp_path / "config.json").write_text(json.dumps(raw))
    programs, jobs = lines_of(
        name, "paper", **{"model.path": str(tmp_path), "recipe.comparisons": "pairs.json"}
    )
    assert programs.keys() == PROGRAMS[name]
    assert parameters in programs["sft"]
    assert "GiB" in programs["sft"]
    assert jobs[0].startswith("data: python -m dpojax.recipes.data ")
    assert any("preference" in job or "dpo-beta" in job for job in jobs)


@pytest.mark.long
@pytest.mark.parametrize("name", PROGRAMS)
def test_the_small_programs_are_built_from_shapes(name, shared):
    programs, jobs = lines_of(name, "small", **{"recipe.data": str(shared / "data")})
    assert programs.keys() == PROGRAMS[name]
    assert jobs[-1].startswith("report: python -m dpojax.recipes.report ")


@pytest.mark.long
def test_a_dry_run_writes_nothing_and_says_how_long_each_run_is(tmp_path, comparisons):
    config = small_config(comparisons)
    lines = [*dry_run(config, small_recipe(config), tmp_path / "none")]
    assert any(line.startswith("sft (6 steps, batches of 8): python -m") for line in lines)
    assert any(line.startswith("ppo (2 iterations, batches of 8): ") for line in lines)
    assert not (tmp_path / "none").exists()


@pytest.mark.long
def test_a_config_without_a_recipe_is_told_in_a_sentence(tmp_path):
    path = str(ROOT / "configs" / "reviews.py")
    with pytest.raises(ConfigError, match=r"reviews\.py: has no function recipe\(config\)"):
        read_recipe(path, read_config(path))
    script = [sys.executable, str(ROOT / "scripts" / "recipe.py"), f"--workdir={tmp_path / 'x'}"]
    ended = subprocess.run(
        [*script, f"--config={ROOT}/configs/hh.py:tiny"],
        env=environment(),
        capture_output=True,
        text=True,
    )
    assert ended.returncode == 1
    assert "hh.py:tiny: one of paper, small" in ended.stderr
    assert "Traceback" not in ended.stderr
