"""The chips that plans are made for, as devices that need not be there."""

from __future__ import annotations

import math
import os
import re
from collections.abc import Sequence
from typing import NamedTuple

import jax
from jax.experimental import topologies

from dpojax.chips import CHIPS, Chip
from dpojax.config.errors import ConfigError
from dpojax.planning import gpu_target
from dpojax.tpu_flags import use_tpu_flags

HOST_CPUS = "cpu"
# libtpu's names of chips, where they are not ours; and what makes one device of the two cores of a
# v4, as on a TPU VM.
TPU_NAMES = {"v7x": "tpu7x"}
TPU_OPTIONS = {"v4": {"chip_config_name": "megacore"}}


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

    @property
    def chip_count(self) -> int:
        """Chips; of v7x, each is two devices."""
        return len(self.devices) // (self.chip.devices if self.chip else 1)


def topology(name: str) -> Topology:
    """The devices of `v5e:4x8`, `v6e:...`, `v5p:2x2x4`, `a100:8`, `h200:8`, or `cpu:8`.

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
    options = TPU_OPTIONS.get(chip.name, {})
    if count == 1:  # else a host has 2 x 2 chips
        options = options | {"chips_per_host_bounds": (1, 1, 1)}
    try:
        described = topologies.get_topology_desc(
            platform="tpu",
            topology_name=f"{TPU_NAMES.get(chip.name, chip.name)}:{shape}",
            **options,
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
