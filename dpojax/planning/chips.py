"""The chips that plans are made for: their peaks, from their makers' pages, and their devices."""

from __future__ import annotations

import dataclasses
import math
import os
import re
from collections.abc import Sequence
from typing import NamedTuple

import jax
from jax.experimental import topologies

from dpojax.config.errors import ConfigError
from dpojax.planning import gpu_target
from dpojax.tpu_flags import use_tpu_flags

GOOGLE = "https://docs.cloud.google.com/tpu/docs/"
NVIDIA = "https://www.nvidia.com/en-us/data-center/"
HOST_CPUS = "cpu"


@dataclasses.dataclass(frozen=True)
class Chip:
    """Peaks of one chip.

    Attributes:
      name: as `--topology` names it.
      kind: as JAX names the device.
      platform: of JAX.
      flops: bfloat16 FLOP/s of matrix products, dense.
      float32_flops: those of float32 numbers at XLA's default precision: a TPU rounds them to
        bfloat16, a GPU to TF32, at half of the speed.
      memory: bytes of its HBM.
      bandwidth: bytes/s of its HBM.
      link: bytes/s that it sends in a ring of chips. A TPU has two ports on each axis of the torus,
        one for each direction; both send. A GPU has NVLink.
      source: the page that gives these numbers.
    """

    name: str
    kind: str
    platform: str
    flops: float
    memory: float
    bandwidth: float
    link: float
    source: str

    @property
    def float32_flops(self) -> float:
        return self.flops if self.platform == "tpu" else self.flops / 2


CHIPS = {
    chip.name: chip
    for chip in (
        Chip("v5e", "TPU v5 lite", "tpu", 197e12, 16e9, 819e9, 100e9, GOOGLE + "v5e"),
        Chip("v5p", "TPU v5", "tpu", 459e12, 95e9, 2765e9, 200e9, GOOGLE + "v5p"),
        Chip("v6e", "TPU v6 lite", "tpu", 918e12, 32e9, 1638e9, 200e9, GOOGLE + "v6e"),
        Chip("h100", "NVIDIA H100", "gpu", 989e12, 80e9, 3350e9, 450e9, NVIDIA + "h100/"),
        Chip("h200", "NVIDIA H200", "gpu", 989e12, 141e9, 4800e9, 450e9, NVIDIA + "h200/"),
    )
}


class TopologyError(ConfigError):
    """A topology that does not exist, or that this machine cannot compile for."""


class Topology(NamedTuple):
    """Devices to compile for, which need not be there.

    Attributes:
      name: such as `v5e:4x8` or `h200:8`.
      chip: what each of them is; None for CPU devices of this host.
      devices: of JAX.
    """

    name: str
    chip: Chip | None
    devices: Sequence[jax.Device]


def topology(name: str) -> Topology:
    """The devices of `v5e:4x8`, `v6e:...`, `v5p:2x2x4`, `h100:8`, `h200:8`, or `cpu:8`.

    Raises:
      TopologyError: there is no such chip or shape; or the package that compiles for it is missing.
    """
    chip_name, _, shape = name.partition(":")
    if not re.fullmatch(r"\d+(x\d+)*", shape) or chip_name not in (*CHIPS, HOST_CPUS):
        raise TopologyError(
            f"{name!r}: no topology; a chip and a shape, such as v5e:4x8 or h200:8, with one of "
            f"{', '.join(CHIPS)}"
        )
    count = math.prod(map(int, shape.split("x")))
    if chip_name == HOST_CPUS:
        return Topology(name, None, _host_devices(count))
    chip = CHIPS[chip_name]
    make = _tpu_devices if chip.platform == "tpu" else _gpu_devices
    return Topology(name, chip, make(chip, shape, count))


def chip_of(device: jax.Device) -> Chip | None:
    """What is known of a device; None where its kind is not in the table."""
    for chip in CHIPS.values():
        if device.device_kind.startswith(chip.kind) and device.platform == chip.platform:
            return chip
    return None


def _host_devices(count: int) -> Sequence[jax.Device]:
    devices = jax.devices("cpu")
    if count > len(devices):
        raise TopologyError(
            f"cpu:{count}: this process has {len(devices)} CPU device(s); set "
            f"XLA_FLAGS=--xla_force_host_platform_device_count={count}"
        )
    return devices[:count]


def _tpu_devices(chip: Chip, shape: str, count: int) -> Sequence[jax.Device]:
    use_tpu_flags()
    os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")  # or libtpu asks a cloud's server, which waits
    try:
        described = topologies.get_topology_desc(
            platform="tpu", topology_name=f"{chip.name}:{shape}"
        )
    except Exception as error:  # of many kinds: no plugin, no such shape
        raise TopologyError(
            f"{chip.name}:{shape}: {_first_line(error)}; compiling for TPUs needs "
            f"pip install 'jax[tpu]=={jax.__version__}'"
        ) from error
    return described.devices


def _gpu_devices(chip: Chip, shape: str, count: int) -> Sequence[jax.Device]:
    """All GPUs of a topology are in one NVLink domain."""
    if "x" in shape:
        raise TopologyError(f"{chip.name}:{shape}: GPUs are counted, as in {chip.name}:{count}")
    try:
        described = topologies.get_topology_desc(
            platform="cuda", target_config=gpu_target.text(chip.name), topology=f"1x1x{count}"
        )
    except Exception as error:
        raise TopologyError(
            f"{chip.name}:{shape}: {_first_line(error)}; compiling for GPUs needs "
            f"pip install 'jax[cuda13]=={jax.__version__}'"
        ) from error
    return described.devices


def _first_line(error: Exception) -> str:
    return str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
