"""A finished or running stage's policy as a Hugging Face folder."""

from __future__ import annotations

import json
import pathlib

from ml_collections import ConfigDict
from transformers import GenerationConfig

from dpojax.launch import setup as run_setup
from dpojax.launch.config import ConfigError
from dpojax.launch.defaults import default_config
from dpojax.models import huggingface
from dpojax.training import checkpoints


def export(workdir: str, folder: str, *, stage: str = "", step: int | None = None) -> pathlib.Path:
    """Write what `transformers.AutoModelForCausalLM.from_pretrained(folder)` loads.

    Args:
      workdir: of a run of scripts/train.py.
      folder: new or empty.
      stage: sft or dpo; "" is the run's last.
      step: a checkpoint of the stage; None is its newest.

    Raises:
      ConfigError: `workdir` holds no run, or none with that stage.
      CheckpointError: the stage has no such checkpoint.
      FileExistsError: `folder` is not empty.
    """
    run = pathlib.Path(workdir).resolve()
    config = read_config(run)
    stage = stage or config.stages[-1]
    if stage not in config.stages:
        raise ConfigError(f"{run}: a run of {', '.join(config.stages)}, without a stage {stage!r}")
    setup = run_setup.prepare(config, run)
    params = checkpoints.load_params(run / stage / "checkpoints", setup.abstract_params, step)
    huggingface.save(
        folder,
        setup.model.config,
        params,
        setup.raw,
        tokenizer=setup.tokenizer,
        generation_config=_generation_config(config.model.path),
    )
    return pathlib.Path(folder).resolve()


def read_config(run: pathlib.Path) -> ConfigDict:
    """The config that a run was started with, with whatever mesh this machine has.

    Raises:
      ConfigError: there is none, or it is of another version of this library.
    """
    path = run / "config.json"
    if not path.is_file():
        raise ConfigError(f"{path} is not there: {run} is not the workdir of a run")
    config = default_config()
    given = json.loads(path.read_text())
    try:
        with config.unlocked():
            config.update(given)
    except (KeyError, TypeError, AttributeError) as error:
        raise ConfigError(f"{path}: not a config of this version ({error})") from error
    config.mesh.update(data=-1, fsdp=1, tensor=1)
    return config


def _generation_config(path: str) -> GenerationConfig | None:
    try:
        return GenerationConfig.from_pretrained(path) if path else None
    except OSError:
        return None  # the model came without one
