"""A stage that trains LoRA adapters: their config, and the frozen base that the run keeps."""

from __future__ import annotations

import pathlib
import zlib
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from ml_collections import ConfigDict

from dpojax import sharding
from dpojax.config.checks import ConfigError, lora_config, naming
from dpojax.models import lora
from dpojax.models.config import DecoderConfig
from dpojax.models.lora import Adapters, LoraConfig
from dpojax.models.lora_peft import load_peft
from dpojax.training import checkpoints, reference


class Lora(NamedTuple):
    """Adapters over a frozen base, before either is there."""

    stage: str
    config: LoraConfig
    base_folder: pathlib.Path  # where the run keeps the base
    abstract_base: dict  # shapes, shardings, and the dtype that the base is stored in
    abstract: Adapters  # shapes, float32, and shardings
    given: Adapters | None  # NumPy arrays of peft's folder, to start from
    merge: Callable  # jitted: base, adapters -> float32 parameters of the policy

    def start(self, seed: int) -> Adapters:
        """What training starts from, on the mesh: the given adapters, or new ones."""
        if self.given is None:
            shardings = jax.tree.map(lambda x: x.sharding, self.abstract)
            new = lambda key: lora.init(key, self.abstract_base, self.config)
            key = jax.random.fold_in(jax.random.key(seed), zlib.crc32(self.stage.encode()))
            return jax.jit(new, out_shardings=shardings)(key)
        return jax.tree.map(
            lambda x, to: jax.make_array_from_callback(x.shape, to.sharding, lambda i: x[i]),
            self.given,
            self.abstract,
        )

    def keep_base(self, params: dict | None) -> dict:
        """The base: `params` in its dtype, saved once per run, or read back where they are None.

        Takes over the buffers of `params`: another dtype leaves no second copy of the model.
        """
        if params is None:
            return checkpoints.load_tree(self.base_folder, self.abstract_base)

        def stored(x, like):
            if x.dtype == like.dtype:
                return x
            cast = x.astype(like.dtype)
            x.delete()
            return cast

        base = jax.tree.map(stored, params, self.abstract_base)
        checkpoints.save_tree(self.base_folder, base, {"fingerprint": reference.fingerprint(base)})
        return base


def prepare(
    name: str,
    config: ConfigDict,
    folder: pathlib.Path,
    *,
    mesh: Mesh,
    decoder: DecoderConfig,
    raw: dict | None,
    abstract_params: dict,
) -> Lora | None:
    """The adapters of stage `name`, whose config and folder are given; None where it has none.

    The base of a preference stage is its reference, unless that is another model.

    Raises:
      ConfigError: a target that finds nothing; a folder of peft's that is not of this model, or
        whose rank or scale is not the config's.
    """
    wanted = lora_config(config.lora) if "lora" in config else None
    if wanted is None:
        return None
    given = None
    if config.lora.adapters:
        with naming(f"{name}.lora.adapters"):
            loaded, found = load_peft(config.lora.adapters, decoder, raw)
        _require_same(f"config.{name}.lora", config.lora, found)
        given, wanted = jax.tree.map(np.asarray, loaded), found
    abstract_base = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(
            x.shape, jnp.dtype(config.lora.base_dtype), sharding=x.sharding
        ),
        abstract_params,
    )
    with naming(f"{name}.lora"):
        new = jax.eval_shape(lambda: lora.init(jax.random.key(0), abstract_params, wanted))
    shapes = new if given is None else given
    abstract = jax.tree.map(
        lambda x, s: jax.ShapeDtypeStruct(x.shape, jnp.float32, sharding=s),
        shapes,
        sharding.tree_shardings(shapes, mesh, lora.LORA_RULES),
    )
    is_reference = name == "dpo" and not config.reference.path
    return Lora(
        stage=name,
        config=wanted,
        base_folder=folder / ("reference" if is_reference else "base"),
        abstract_base=abstract_base,
        abstract=abstract,
        given=given,
        merge=_merge(wanted, jax.tree.map(lambda x: x.sharding, abstract_params)),
    )


def _merge(config: LoraConfig, shardings) -> Callable[[dict, Adapters], dict]:
    def merge(base: dict, adapters: Adapters) -> dict:
        whole = lora.apply(base, adapters, config)
        return jax.tree.map(lambda x: x.astype(jnp.float32), whole)

    return jax.jit(merge, out_shardings=shardings)


def _require_same(key: str, config: ConfigDict, found: LoraConfig) -> None:
    for name in ("rank", "alpha", "rank_stabilised"):
        if config[name] != getattr(found, name):
            raise ConfigError(
                f"{key}.{name} = {config[name]!r}, but the adapters in {config.adapters} have "
                f"{getattr(found, name)!r}; set it to that"
            )
