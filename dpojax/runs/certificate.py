"""A certificate beside a run: which meshes, precisions and XLA flags were compared with float32.

`dpojax.certifying` makes it. A run whose own conditions have failed there is refused.
"""

from __future__ import annotations

import hashlib
import json
import os
import shlex
from collections.abc import Mapping
from typing import NamedTuple

import jax
from absl import logging
from ml_collections import ConfigDict

from dpojax import sharding, storage
from dpojax.config.errors import ConfigError, config_errors
from dpojax.config.resolved import ResolvedRun

CERTIFICATE = "certificate.json"
MADE_AGAIN = "delete it, or make it again with scripts/certify.py"
FLAGS = ("XLA_FLAGS", "LIBTPU_INIT_ARGS")
# Flags that change no number: how many devices a CPU pretends to have, and what is written down.
NO_NUMERICS = ("--xla_force_host_platform_device_count", "--xla_dump_")
ANY = "any"  # precision: float32 failed with exact products, so that no other can be trusted


class Conditions(NamedTuple):
    """What decides the rounding of a run's steps, besides its config's model and data.

    Attributes:
      mesh: sizes of its axes, as in `data 1 x fsdp 8 x tensor 1`.
      compute_dtype: of matrix products.
      base_dtype: of the frozen weights under LoRA; "" where nothing is frozen.
      precision: JAX's default for products of float32; "" leaves it to the platform.
      attention: the config's name of a kernel.
      flags: of XLA and libtpu, sorted.
      jax: versions of jax and jaxlib.
      platform: what the driver says of itself.
      device: its kind.
      devices: how many there are.
    """

    mesh: str
    compute_dtype: str
    base_dtype: str
    precision: str
    attention: str
    flags: str
    jax: str
    platform: str
    device: str
    devices: int

    @property
    def hash(self) -> str:
        text = json.dumps(self._asdict(), sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()[:16]

    def in_any_precision(self) -> Conditions:
        """The same mesh, flags and devices, whatever is computed in."""
        return self._replace(compute_dtype=ANY, base_dtype=ANY, precision=ANY)


def conditions_here(config: ConfigDict, stage: str, mesh: tuple[int, int, int]) -> Conditions:
    """The conditions of a stage on a mesh of this process's devices, with the flags in force."""
    lora, devices = config[stage].get("lora"), jax.devices()
    return Conditions(
        mesh=" x ".join(f"{name} {size}" for name, size in zip(sharding.AXES, mesh)),
        compute_dtype=config.model.compute_dtype,
        base_dtype=lora.base_dtype if lora is not None and lora.rank else "",
        precision=jax.config.jax_default_matmul_precision or "",
        attention=config.model.attention,
        flags=flags_in_force(os.environ),
        jax=f"{jax.__version__}, jaxlib {jax.lib.__version__}",
        platform=" ".join(devices[0].client.platform_version.split()),
        device=devices[0].device_kind,
        devices=len(devices),
    )


def flags_in_force(environment: Mapping[str, str]) -> str:
    """The flags of XLA and libtpu in an environment that may change numbers, sorted."""
    words = [word for name in FLAGS for word in environment.get(name, "").split()]
    return " ".join(sorted({word for word in words if not word.startswith(NO_NUMERICS)}))


def require_certified(run: ResolvedRun, folder: storage.Path | None = None) -> None:
    """Refuse a run whose conditions failed in the certificate beside it; without one do nothing.

    Args:
      run: that is about to train.
      folder: that has the certificate; None is the workdir.

    Raises:
      ConfigError: it failed, and config.numerics.allow_failed is not set.
      StorageError: the certificate is damaged.
    """
    allowed = run.config.numerics.allow_failed
    path = (run.workdir if folder is None else folder) / CERTIFICATE
    if not path.exists():
        return
    certificate = read_certificate(path)
    stage = certificate["stage"]
    if stage not in run.config.stages:
        return
    with config_errors("mesh"):
        mesh = sharding.mesh_sizes(**run.config.mesh, devices=jax.device_count())
    here = conditions_here(run.config, stage, mesh)
    keys = {here.hash, here.in_any_precision().hash}
    for variant in certificate["variants"]:
        if variant["key"] in keys and not variant["passes"]:
            _refuse(path, stage, variant, allowed)


def read_certificate(path: storage.Path) -> dict:
    """The content of a certificate.

    Raises:
      StorageError: it is damaged.
    """
    certificate = storage.read_json(path, MADE_AGAIN, fields={"stage": str, "variants": list})
    fields = {"name": str, "key": str, "passes": bool, "why": str}
    with storage.damage_named(path, MADE_AGAIN):
        for variant in certificate["variants"]:
            for name, kind in fields.items():
                if not isinstance(variant[name], kind):
                    raise TypeError(f"{name!r} of a variant is of another type")
    return certificate


def _refuse(path: storage.Path, stage: str, variant: dict, allowed: bool) -> None:
    what = f"{path}: {stage} under {shlex.quote(variant['name'])} failed: {variant['why']}"
    if not allowed:
        raise ConfigError(
            f"{what}. Change the mesh, the precision or the flags (XLA_FLAGS, LIBTPU_INIT_ARGS), "
            "make the certificate again with scripts/certify.py, or train all the same with "
            "--config.numerics.allow_failed"
        )
    logging.warning("%s; config.numerics.allow_failed trains all the same", what)
