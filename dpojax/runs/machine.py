"""What a run computes on: devices, mesh, versions, and the flags of XLA that are in force."""

from __future__ import annotations

import importlib.metadata
import os
import textwrap
from typing import Any

import jax

from dpojax import tpu_flags
from dpojax.chips import chip_of
from dpojax.models import kernels
from dpojax.stages.setup import Setup
from dpojax.stages.stage import mesh_text

WIDTH = 100  # columns of what is printed
PACKAGES = ("jax", "jaxlib", "libtpu", "jax-cuda13-plugin", "jax-cuda12-plugin")


def machine_of(setup: Setup) -> dict[str, Any]:
    """What the run computes on, as JSON can hold it.

    Every process has to see the same; this is what this one sees. Flags that are not set, and
    packages that are not installed, are left out.
    """
    devices, model = setup.mesh.devices.flat, setup.config.model
    # Variables that change what XLA compiles; the second is set everywhere, and read on TPUs alone.
    variables = ["XLA_FLAGS"] + [tpu_flags.VARIABLE] * (devices[0].platform == "tpu")
    chip = chip_of(devices[0])
    return {
        "devices": setup.mesh.size,
        "kind": devices[0].device_kind,
        "processes": jax.process_count(),
        "peak_flops": None if chip is None else chip.flops,
        "mesh": mesh_text(setup),
        "compute_dtype": model.compute_dtype,
        "attention": kernels.name_of(setup.model.kernel),
        "remat": model.remat,
        "versions": {name: version for name in PACKAGES if (version := _version(name))},
        "flags": {name: value for name in variables if (value := os.environ.get(name, "").strip())},
    }


def machine_text(machine: dict[str, Any]) -> str:
    """The lines to print, of at most `WIDTH` columns but for longer flags."""
    processes = machine["processes"]
    devices = f"{machine['devices']} x {machine['kind']} in {processes} process"
    devices += "es" if processes > 1 else ""
    peak = machine["peak_flops"]
    devices += f", peak {peak / 1e12:,.0f} TFLOP/s each in bfloat16" if peak else ""
    versions = ", ".join(f"{name} {version}" for name, version in machine["versions"].items())
    lines = [
        f"devices   {devices}",
        f"mesh      {machine['mesh']}",
        f"compute   {machine['compute_dtype']}, attention {machine['attention']}, "
        f"remat {machine['remat']}",
        f"versions  {versions}",
    ]
    for name, value in machine["flags"].items():
        lines += textwrap.wrap(
            f"flags     {name}={value}",
            WIDTH,
            subsequent_indent=" " * 10,
            break_long_words=False,
            break_on_hyphens=False,
        )
    return "\n".join(lines)


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return ""
