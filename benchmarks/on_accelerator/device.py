"""What the first device is: python -m benchmarks.on_accelerator.device"""

from __future__ import annotations

import importlib.metadata

import jax

from benchmarks.on_accelerator.entries import tell
from dpojax.chips import chip_of

PACKAGES = ("jax", "jaxlib", "flax", "torch", "trl", "transformers")


def main() -> None:
    device = jax.local_devices()[0]
    chip = chip_of(device)
    stats = device.memory_stats() or {}
    tell(
        "device",
        device.device_kind,
        platform=device.platform,
        device_kind=device.device_kind,
        devices=len(jax.local_devices()),
        bytes_limit=stats.get("bytes_limit"),
        peak_flops=None if chip is None else chip.flops,
        packages={name: _version(name) for name in PACKAGES},
    )


def _version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


if __name__ == "__main__":
    main()
