"""The ways in which the first steps of a run are computed, to be compared with float32."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import jax
import numpy as np
from jax.sharding import Mesh
from ml_collections import ConfigDict

from dpojax import sharding
from dpojax.config.errors import config_errors

GIVEN, REVERSED, SHUFFLED = "given", "reversed", "shuffled"
FLOAT32, BFLOAT16 = "float32", "bfloat16"
HIGHEST, DEFAULT = "highest", "default"


class Variant(NamedTuple):
    """One way to compute the same steps; all fields can be written as JSON.

    Attributes:
      name: unique in a certificate.
      mesh: sizes of the axes data, fsdp and tensor. A mesh of fewer devices than there are takes
        the first ones.
      order: of the devices on the mesh: given, reversed or shuffled (marin's issue 4903: LoRA-DPO
        that stayed at ln 2 in one order of the devices and learned in another).
      compute_dtype: of matrix products. The trained weights are float32 in every run.
      base_dtype: of the frozen weights under LoRA; "" where nothing is frozen.
      precision: `highest` computes float32 products in float32. `default` leaves that to the
        platform: TPUs round the factors to bfloat16, GPUs to TF32.
      flags: of XLA, added to those in force.
    """

    name: str
    mesh: tuple[int, int, int]
    order: str = GIVEN
    compute_dtype: str = FLOAT32
    base_dtype: str = ""
    precision: str = HIGHEST
    flags: tuple[str, ...] = ()

    def make_mesh(self, devices: Sequence[jax.Device]) -> Mesh:
        """The mesh on the first of these devices, in the variant's order."""
        mesh = sharding.make_mesh(*self.mesh, devices=devices[: math.prod(self.mesh)])
        return mesh if self.order == GIVEN else sharding.reordered(mesh, self.permutation)

    @property
    def permutation(self) -> list[int]:
        """The place in the mesh of the given order, for each place of the variant's mesh."""
        count = math.prod(self.mesh)
        if self.order == REVERSED:
            return list(reversed(range(count)))
        if self.order == SHUFFLED:
            return np.random.default_rng(0).permutation(count).tolist()
        return list(range(count))


def as_configured(config: ConfigDict, stage: str, devices: int) -> Variant:
    """What the run itself would compute.

    Raises:
      ConfigError: the config's mesh does not fit the devices.
    """
    with config_errors("mesh"):
        sizes = sharding.mesh_sizes(**config.mesh, devices=devices)
    return Variant(
        "as configured",
        sizes,
        compute_dtype=config.model.compute_dtype,
        base_dtype=_base_dtype(config, stage),
        precision=DEFAULT,
    )


def baseline(config: ConfigDict, stage: str, mesh: tuple[int, int, int] = (1, 1, 1)) -> Variant:
    """What the others are compared with: float32 with exact products."""
    base = FLOAT32 if _base_dtype(config, stage) else ""
    return Variant(f"float32, {mesh_name(mesh)}", mesh, base_dtype=base)


def variants_here(config: ConfigDict, stage: str, devices: int) -> list[Variant]:
    """The variants that one process can compute with the flags in force.

    Other meshes and device orders compute in float32, where a fault of a collective is far above
    rounding. Other precisions are computed on the mesh of the config.
    """
    configured = as_configured(config, stage, devices)
    exact = baseline(config, stage)
    meshes = [mesh for mesh in _meshes(devices) if mesh != exact.mesh]
    variants = [configured]
    variants += [exact._replace(name=mesh_name(mesh), mesh=mesh) for mesh in meshes]
    if meshes:
        for mesh, order in ((configured.mesh, REVERSED), (meshes[-1], SHUFFLED)):
            name = f"{mesh_name(mesh)}, {order}"
            variants.append(exact._replace(name=name, mesh=mesh, order=order))
    variants += _other_precisions(configured)
    return variants


def with_flags(variant: Variant, flags: str) -> Variant:
    """The same variant under further flags of XLA, as one line of text has them."""
    return variant._replace(name=flags, flags=tuple(flags.split()))


def mesh_name(mesh: tuple[int, int, int]) -> str:
    """`fsdp 4 x tensor 2`; `one device`."""
    sizes = [f"{name} {size}" for name, size in zip(sharding.AXES, mesh) if size > 1]
    return " x ".join(sizes) or "one device"


def _other_precisions(configured: Variant) -> list[Variant]:
    """bfloat16 products, and a bfloat16 base, where the config has neither."""
    others = []
    if configured.compute_dtype != BFLOAT16:
        others.append(configured._replace(name="bfloat16 compute", compute_dtype=BFLOAT16))
    if configured.base_dtype == FLOAT32:
        others.append(configured._replace(name="bfloat16 base", base_dtype=BFLOAT16))
    return others


def _meshes(devices: int) -> list[tuple[int, int, int]]:
    """Meshes of all devices: each axis alone, then two and three of them together."""
    meshes = [(devices, 1, 1), (1, devices, 1)]
    if devices % 2 == 0:
        meshes.append((1, devices // 2, 2))
    if devices % 4 == 0 and devices > 4:
        meshes.append((devices // 4, 2, 2))
    return list(dict.fromkeys(meshes))


def _base_dtype(config: ConfigDict, stage: str) -> str:
    lora = config[stage].get("lora")
    return lora.base_dtype if lora is not None and lora.rank else ""
