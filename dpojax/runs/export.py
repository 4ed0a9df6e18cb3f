"""A finished or running stage's policy as a Hugging Face folder."""

from __future__ import annotations

import json
import pathlib

from ml_collections import ConfigDict

from dpojax.stages import setup as run_setup
from dpojax.config.checks import ConfigError
from dpojax.config.defaults import default_config
from dpojax.stages.setup import Setup
from dpojax.stages.stage import LABELS, SCORING
from dpojax.methods import reward
from dpojax.models import huggingface, lora_peft
from dpojax.training import checkpoints


def export(
    workdir: str, folder: str, *, stage: str = "", step: int | None = None, adapters: bool = False
) -> pathlib.Path:
    """Write what `transformers.AutoModelForCausalLM.from_pretrained(folder)` loads.

    Weights are float32, with adapters merged, whatever dtype a frozen base was stored in. A reward
    model's head has no bias, so its mean score on the held-out responses stands in a file of its
    own; `evaluation.rewards` subtracts it, and the rewards of those responses have mean 0.

    Args:
      workdir: of a run of scripts/train.py.
      folder: new or empty.
      stage: sft, dpo, ppo, reward or classifier (these two a `...ForSequenceClassification`); "" is
        the run's last.
      step: a checkpoint of the stage; None is the best of a stage that keeps it, else its newest.
      adapters: instead write the stage's LoRA adapters alone, for `peft.PeftModel.from_pretrained`.
        Their base is config.model.path for the run's first stage, and for a later one the export
        of the stage before; load it in the stage's `lora.base_dtype`.

    Raises:
      ConfigError: `workdir` holds no run, or none with that stage, or one without adapters.
      CheckpointError: the stage has no such checkpoint.
      FileExistsError: `folder` is not empty.
    """
    run = pathlib.Path(workdir).resolve()
    config = read_config(run)
    stage = stage or config.stages[-1]
    if stage not in config.stages:
        raise ConfigError(f"{run}: a run of {', '.join(config.stages)}, without a stage {stage!r}")
    setup = run_setup.prepare(config, run)
    if stage in SCORING:
        setup = run_setup.scalar(setup, _labels(run / stage))
    if adapters:
        _export_adapters(setup, folder, stage, step)
        return pathlib.Path(folder).resolve()
    huggingface.save(
        folder,
        setup.model.config,
        run_setup.trained_params(setup, stage, step),
        setup.raw,
        tokenizer=setup.tokenizer,
        generation_config=_generation_config(config.model.path),
        centre=_centre(setup, step) if stage == "reward" else None,
    )
    return pathlib.Path(folder).resolve()


def _labels(stage: pathlib.Path) -> tuple[str, ...]:
    """Of a classifier: the names of its classes."""
    path = stage / LABELS
    return tuple(json.loads(path.read_text())) if path.exists() else ()


def _centre(setup: Setup, step: int | None) -> float | None:
    """The mean score of the held-out responses; None at a checkpoint that was not evaluated."""
    step = run_setup.kept_step(setup, "reward") if step is None else step
    found = checkpoints.metadata_of(setup.workdir / "reward" / "checkpoints", step)
    return found.get("evaluation", {}).get(reward.MEAN)


def read_config(run: pathlib.Path) -> ConfigDict:
    """The config that a run was started with, with whatever mesh and attention this machine has.

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
    config.model.attention = "auto"
    return config


def _export_adapters(setup: Setup, folder: str, stage: str, step: int | None) -> None:
    lora = setup.lora[stage]
    if lora is None:
        raise ConfigError(
            f"{setup.workdir}: its stage {stage} trained all weights and has no adapters; export "
            "it without --adapters"
        )
    trained = checkpoints.load_params(setup.workdir / stage / "checkpoints", lora.abstract, step)
    first = stage == setup.config.stages[0]
    lora_peft.save_peft(
        folder,
        trained,
        lora.config,
        setup.model.config,
        setup.raw,
        base=(setup.config.model.path or None) if first else None,
    )


def _generation_config(path: str):
    """transformers' GenerationConfig of a model that has one."""
    if not path:
        return None
    from transformers import GenerationConfig  # brings torch where that is installed

    try:
        return GenerationConfig.from_pretrained(path)
    except OSError:
        return None  # the model came without one
