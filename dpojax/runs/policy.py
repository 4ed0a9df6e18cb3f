"""A policy to draw from, by the name that a command line gives it."""

from __future__ import annotations

import json
import pathlib
from typing import Any, NamedTuple

import jax
from jax.sharding import Mesh

from dpojax import sharding
from dpojax.stages import setup as run_setup
from dpojax.config.checks import ConfigError
from dpojax.runs.export import read_config
from dpojax.models import decoder, huggingface
from dpojax.models.decoder import Model, Params


class Policy(NamedTuple):
    """A model with its weights on a mesh, its tokenizer, and the ids that end a response."""

    mesh: Mesh
    model: Model
    params: Params
    tokenizer: Any
    stop: tuple[int, ...]


def load_policy(name: str) -> Policy:
    """A Hugging Face folder, a name of the hub, or WORKDIR[:STAGE] of a run: its last by default.

    It lies on the devices of this process alone, so that several can work apart.

    Raises:
      ConfigError: a run without that stage.
      CheckpointError: a stage without a checkpoint.
      OSError, ValueError: see `huggingface.load`.
    """
    mesh = sharding.make_mesh(devices=jax.local_devices())
    workdir, colon, stage = (name, "", "") if pathlib.Path(name).is_dir() else name.rpartition(":")
    if colon or _is_run(pathlib.Path(name)):
        return _load_stage(pathlib.Path(workdir).resolve(), stage, mesh)
    from transformers import AutoTokenizer  # brings torch where that is installed

    config, params, _ = huggingface.load(name, mesh=mesh)
    tokenizer = AutoTokenizer.from_pretrained(name)
    return Policy(mesh, decoder.build(config), params, tokenizer, stop_tokens(tokenizer, name))


def _is_run(folder: pathlib.Path) -> bool:
    """Whether its config.json is that of a run; a model's has no stages."""
    path = folder / "config.json"
    return path.is_file() and "stages" in json.loads(path.read_text())


def _load_stage(run: pathlib.Path, stage: str, mesh: Mesh) -> Policy:
    """The newest checkpoint of a stage, adapters merged."""
    config = read_config(run)
    stage = stage or config.stages[-1]
    if stage not in config.stages:
        raise ConfigError(f"{run}: a run of {', '.join(config.stages)}, without a stage {stage!r}")
    setup = run_setup.prepare(config, run)._replace(mesh=mesh)
    params = run_setup.trained_params(setup, stage)
    stop = stop_tokens(setup.tokenizer, config.model.path)
    return Policy(mesh, setup.model, params, setup.tokenizer, stop)


def stop_tokens(tokenizer, path: str) -> tuple[int, ...]:
    """The tokenizer's EOS, and what the generation config at `path`, if any, names beside it."""
    from transformers import GenerationConfig  # brings torch where that is installed

    try:
        given = GenerationConfig.from_pretrained(path).eos_token_id if path else None
    except OSError:
        given = None  # the model came without one
    given = given if isinstance(given, list) else [given]
    return tuple(sorted({tokenizer.eos_token_id, *given} - {None}))
