"""A stage of a config as a variant computes it, on the run's own data, or in the small."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import jax
from ml_collections import ConfigDict

from dpojax.certifying.variants import Variant
from dpojax.config.errors import ConfigError
from dpojax.config.resolved import editable
from dpojax.models.config import DecoderConfig
from dpojax.plans.dry_run import NOWHERE
from dpojax.stages.data import StageData
from dpojax.stages.registry import STAGES, open_stage, resolve
from dpojax.stages.setup import build_model, prepare_setup
from dpojax.stages.trained_stage import LanguageStage

# What a small model keeps of a large one.
SMALL_LAYERS, SMALL_HEADS, SMALL_MLP = 2, 4, 4
SMALL_BATCH = 16  # examples of a step
SMALL_DATA = 20  # batches of examples that are read


def certified_stage(config: ConfigDict) -> str:
    """The name of the stage that is measured: the last one that trains a policy on examples.

    Raises:
      ConfigError: the config has no such stage.
    """
    for name in reversed(config.stages):
        if name in STAGES and issubclass(STAGES[name], LanguageStage):
            return name
    raise ConfigError(
        f"config.stages = {tuple(config.stages)!r}: a certificate is made of a stage that trains a "
        "policy on examples (sft, preference), and there is none"
    )


def small(config: ConfigDict, stage: str) -> ConfigDict:
    """The same config with a smaller batch and less data; see also `shrunken`."""
    config = editable(config)
    part = config[stage]
    part.batch_size = min(part.batch_size, SMALL_BATCH)
    most = SMALL_DATA * part.batch_size
    part.data.limit = min(part.data.limit or most, most)
    part.data.eval_limit = min(part.data.eval_limit or part.batch_size, part.batch_size)
    return config


def shrunken(model: DecoderConfig) -> DecoderConfig:
    """A model of the same family, head size and vocabulary with fewer layers and heads.

    What decides a code path stays: norms, positions, tied or separate head, grouped queries, and
    the first windows of attention.
    """
    heads = min(model.heads, SMALL_HEADS)
    group = model.heads // (model.kv_heads or model.heads)
    width = model.width * heads // model.heads
    layers = min(model.layers, SMALL_LAYERS)
    return dataclasses.replace(
        model,
        layers=layers,
        heads=heads,
        kv_heads=max(1, heads // group),
        head_dim=model.head_dim or model.width // model.heads,
        width=width,
        mlp_width=min(model.mlp_width, SMALL_MLP * width),
        windows=tuple(model.windows)[:layers],
    )


def open_variant(
    config: ConfigDict,
    name: str,
    variant: Variant,
    devices: Sequence[jax.Device],
    *,
    is_small: bool = False,
    data: StageData | None = None,
) -> LanguageStage:
    """Open a stage of a config as a variant computes it.

    Args:
      config: of the run; in the small, that of `small`.
      name: of the stage.
      variant: its mesh takes the first devices.
      devices: of this process.
      is_small: whether the model is shrunken; it then has random weights.
      data: of the stage, where another variant has read it.

    Raises:
      ConfigError, DataError: a run that could not start.
    """
    config = editable(config)
    config.stages = (name,)
    config.model.compute_dtype = variant.compute_dtype
    if variant.base_dtype:
        config[name].lora.base_dtype = variant.base_dtype
    if "reference" in config[name]:  # scored beside each step: no cache is written
        config[name].reference.kind = "live"
    run = resolve(config, NOWHERE)
    setup = prepare_setup(run, mesh=variant.make_mesh(devices))
    if is_small:
        model = shrunken(setup.model.config)
        setup = setup._replace(model=build_model(run.config.model, model, setup.mesh))
    stage = open_stage(setup, name)
    stage = stage.with_data(stage.read_data() if data is None else data)
    return stage.with_shape(stage.shape_for([stage.batches]))
