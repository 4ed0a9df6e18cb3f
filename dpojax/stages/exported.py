"""What an export writes of a stage."""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp

from dpojax import sharding
from dpojax.config.errors import ConfigError

DTYPES = ("float32", "bfloat16", "float16")


class ExportOptions(NamedTuple):
    """What an export writes.

    Attributes:
      step: of the checkpoint; None is the stage's `best_step`.
      adapters: the LoRA adapters alone, for PEFT.
      dtype: to which weights are rounded, one of `DTYPES`.
      base: of adapters alone, the folder or hub name of the run's model.
    """

    step: int | None = None
    adapters: bool = False
    dtype: str = "float32"
    base: str | None = None


def in_dtype(params: dict, dtype: str) -> dict:
    """Parameters rounded to a dtype.

    Raises:
      ConfigError: a finite weight would become infinite; the message names its array.
    """
    rounded = jax.tree.map(lambda x: x.astype(dtype), params)
    for (keys, before), after in zip(
        jax.tree.leaves_with_path(params), jax.tree.leaves(rounded), strict=True
    ):
        if bool(jnp.any(jnp.isfinite(before) & ~jnp.isfinite(after))):
            largest = float(jnp.max(jnp.abs(before)))
            raise ConfigError(
                f"{sharding.path_of(keys)}: {dtype} cannot hold its weight of {largest:g}; export "
                "as bfloat16 or float32"
            )
    return rounded
