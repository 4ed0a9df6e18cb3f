"""A policy to draw from, by the name that a command line gives it."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
from jax.sharding import Mesh

from dpojax import sharding, storage
from dpojax.config.saved import CONFIG, read_run_config
from dpojax.data.tokenizer_files import read_tokenizer
from dpojax.models import decoder, huggingface
from dpojax.models.decoder import Model, Params
from dpojax.runs.base_files import with_base_files
from dpojax.stages.registry import open_stage, resolve
from dpojax.stages.setup import prepare_setup
from dpojax.stages.tokenizers import stop_tokens


class Policy(NamedTuple):
    """A model with its weights on a mesh, its tokenizer, and the ids that end a response."""

    mesh: Mesh
    model: Model
    params: Params
    tokenizer: Any
    stop: tuple[int, ...]


def load_policy(name: str) -> Policy:
    """A Hugging Face folder, a name of the hub, or WORKDIR[:STAGE] of a run (its last by default).

    The policy lies on the devices of this process alone, so that several processes can work apart.

    Raises:
      ConfigError: a run without that stage.
      CheckpointError: a stage without a checkpoint.
      OSError, ValueError: see `huggingface.load`.
    """
    mesh = sharding.make_mesh(devices=jax.local_devices())
    run, stage = _run_and_stage(name)
    if run is not None:
        return _load_stage(run, stage, mesh)
    huggingface.require_model(name)
    config, params, _ = huggingface.load(name, mesh=mesh)
    tokenizer = read_tokenizer(name)
    return Policy(mesh, decoder.build(config), params, tokenizer, stop_tokens(tokenizer, name))


def _run_and_stage(name: str) -> tuple[storage.Path | None, str]:
    """The workdir and the stage that a name means; None where it means a model."""
    path = storage.as_path(name, "the policy's name")
    if path.is_dir():
        return (path, "") if _is_run(path) else (None, "")
    folder, colon, stage = name.rpartition(":")
    if colon and folder and not stage.startswith("//"):
        return storage.as_path(folder), stage
    return None, ""


def _is_run(folder: storage.Path) -> bool:
    """Whether its config.json is that of a run; a model's has no stages."""
    path = folder / CONFIG
    return path.is_file() and "stages" in storage.read_json(path, fields={})


def _load_stage(run: storage.Path, stage: str, mesh: Mesh) -> Policy:
    """The best or newest checkpoint of a stage, adapters merged."""
    config = with_base_files(read_run_config(run), run)
    setup = prepare_setup(resolve(config, run), mesh=mesh)
    params = open_stage(setup, stage or config.stages[-1]).trained_params()
    return Policy(mesh, setup.model, params, setup.tokenizer, setup.stop_tokens)
