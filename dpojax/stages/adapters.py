"""A stage that trains LoRA adapters: their config, and the frozen base that the run keeps."""

from __future__ import annotations

import zlib
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict

from dpojax import sharding, storage
from dpojax.config.errors import ConfigError, config_errors
from dpojax.config.rules import LORA_RULES, apply_rules
from dpojax.models import lora
from dpojax.models.lora import Adapters, LoraConfig
from dpojax.models.lora_peft import load_peft
from dpojax.stages.kept_weights import FINGERPRINT
from dpojax.stages.setup import Setup
from dpojax.training import checkpoints, reference


class StageAdapters(NamedTuple):
    """Adapters over a frozen base, before either is there.

    Attributes:
      stage: the name of the stage that trains them.
      config: rank, scale and targets.
      base_folder: where the run keeps the base.
      abstract_base: shapes, shardings, and the dtype that the base is stored in.
      abstract: shapes, float32, and shardings of the adapters.
      imported: NumPy arrays of a PEFT folder to start from; None starts with new adapters.
      merge: jitted (base, adapters) -> float32 parameters of the policy.
    """

    stage: str
    config: LoraConfig
    base_folder: storage.Path
    abstract_base: dict
    abstract: Adapters
    imported: Adapters | None
    merge: Callable[[dict, Adapters], dict]

    def start(self, seed: int) -> Adapters:
        """The adapters that training starts from, on the mesh: imported or new ones."""
        if self.imported is None:
            shardings = jax.tree.map(lambda x: x.sharding, self.abstract)
            new = lambda key: lora.init(key, self.abstract_base, self.config)
            key = jax.random.fold_in(jax.random.key(seed), zlib.crc32(self.stage.encode()))
            return jax.jit(new, out_shardings=shardings)(key)
        return jax.tree.map(
            lambda x, like: sharding.put(x, like.sharding), self.imported, self.abstract
        )

    def keep_base(self, params: dict | None) -> dict:
        """The base: `params` in the base's dtype, saved once per run; None reads it back.

        The buffers of `params` are taken over, so that another dtype leaves no second copy of the
        model.
        """
        if params is None:
            return checkpoints.load_tree(self.base_folder, self.abstract_base)
        base = self.as_base(params)
        checkpoints.save_tree(self.base_folder, base, {FINGERPRINT: reference.fingerprint(base)})
        return base

    def as_base(self, params: dict) -> dict:
        """`params` in the base's dtype, see `keep_base`."""

        def stored(x: jax.Array, like: jax.ShapeDtypeStruct) -> jax.Array:
            if x.dtype == like.dtype:
                return x
            cast = x.astype(like.dtype)
            x.delete()
            return cast

        return jax.tree.map(stored, params, self.abstract_base)

    def trained_params(self, folder: storage.Path, step: int | None) -> dict:
        """Merged float32 parameters of a checkpoint in `folder`; None is the newest step."""
        return self.merge(self.keep_base(None), self.trained(folder, step))

    def trained(self, folder: storage.Path, step: int | None) -> Adapters:
        """The adapters of a checkpoint in `folder`; None is the newest step."""
        return checkpoints.load_params(folder, self.abstract, step)


def check_lora(config: ConfigDict, name: str) -> None:
    """Check `config.NAME.lora`.

    Raises:
      ConfigError: naming the key.
    """
    apply_rules(LORA_RULES, config, f"{name}.")
    with config_errors(f"{name}.lora"):
        lora_config(config.lora)


def lora_config(settings: ConfigDict) -> LoraConfig | None:
    """A stage's `lora` as the model wants it; None where it is off.

    Raises:
      ValueError: see `LoraConfig`; `adapters` are named while the rank is 0.
    """
    if not settings.rank:
        if settings.adapters:
            raise ValueError(
                f"adapters = {settings.adapters!r}, but rank = 0 trains none; set rank"
            )
        return None
    return LoraConfig(
        settings.rank, settings.alpha, tuple(settings.targets), settings.rank_stabilised
    )


def open_adapters(
    setup: Setup, name: str, *, base_is_reference: bool = False
) -> StageAdapters | None:
    """The adapters of stage `name`; None where it trains all weights.

    Args:
      base_is_reference: the stage's reference is the base, so that the run keeps it once.

    Raises:
      ConfigError: a target that matches no parameter; a PEFT folder that is not of this model, or
        whose rank or scale is not the config's.
    """
    stage_config, params = setup.config[name], setup.abstract_params
    if "lora" not in stage_config or not stage_config.lora.rank:
        return None
    settings, imported, config = stage_config.lora, None, lora_config(stage_config.lora)
    if settings.adapters:
        with config_errors(f"{name}.lora.adapters"):
            loaded, config = load_peft(settings.adapters, setup.model.config, setup.imported_config)
        _require_same(f"config.{name}.lora", settings, config)
        imported = jax.tree.map(np.asarray, loaded)
    with config_errors(f"{name}.lora"):
        new = jax.eval_shape(lambda: lora.init(jax.random.key(0), params, config))
    shapes = new if imported is None else imported
    base_dtype = jnp.dtype(settings.base_dtype)
    return StageAdapters(
        stage=name,
        config=config,
        base_folder=setup.workdir / name / ("reference" if base_is_reference else "base"),
        abstract_base=jax.tree.map(lambda x: x.update(dtype=base_dtype), params),
        abstract=jax.tree.map(
            lambda x, s: jax.ShapeDtypeStruct(x.shape, jnp.float32, sharding=s),
            shapes,
            sharding.tree_shardings(shapes, setup.mesh, lora.LORA_RULES),
        ),
        imported=imported,
        merge=_build_merge(config, jax.tree.map(lambda x: x.sharding, params)),
    )


def _build_merge(config: LoraConfig, shardings: dict) -> Callable[[dict, Adapters], dict]:
    def merge(base: dict, adapters: Adapters) -> dict:
        whole = lora.apply(base, adapters, config)
        return jax.tree.map(lambda x: x.astype(jnp.float32), whole)

    return jax.jit(merge, out_shardings=shardings)


def _require_same(key: str, settings: ConfigDict, imported: LoraConfig) -> None:
    for name in ("rank", "alpha", "rank_stabilised"):
        if settings[name] != getattr(imported, name):
            raise ConfigError(
                f"{key}.{name} = {settings[name]!r}, but the adapters in {settings.adapters} have "
                f"{getattr(imported, name)!r}; set it to that"
            )
