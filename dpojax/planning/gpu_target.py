"""What XLA has to know of a GPU to compile for it where it is not there.

The text form of XLA's message GpuTargetConfig. The numbers are those that the driver reports.
"""

from __future__ import annotations

from typing import NamedTuple

_HOPPER = {
    "threads_per_block_limit": 1024,
    "threads_per_warp": 32,
    "threads_per_core_limit": 2048,
    "core_count": 132,
    "fpus_per_core": 128,
    "clock_rate_ghz": 1.98,
    "l2_cache_size": 50 * 2**20,
    "registers_per_core_limit": 65536,
    "registers_per_block_limit": 65536,
    "shared_memory_per_block": 48 * 2**10,
    "shared_memory_per_block_optin": 227 * 2**10,
    "shared_memory_per_core": 228 * 2**10,
    "thread_dim_limit_x": 1024,
    "thread_dim_limit_y": 1024,
    "thread_dim_limit_z": 64,
    "block_dim_limit_x": 2**31 - 1,
    "block_dim_limit_y": 65535,
    "block_dim_limit_z": 65535,
    "device_address_bits": 64,
    "pcie_bandwidth": 32 * 2**30,
}


_AMPERE = _HOPPER | {
    "core_count": 108,
    "fpus_per_core": 64,
    "clock_rate_ghz": 1.41,
    "l2_cache_size": 40 * 2**20,
    "shared_memory_per_block_optin": 163 * 2**10,
    "shared_memory_per_core": 164 * 2**10,
    "pcie_bandwidth": 16 * 2**30,
}


class _Gpu(NamedTuple):
    """What tells a GPU from the others: its driver's name, bytes, bytes/s, and its architecture."""

    name: str
    memory: int
    bandwidth: int
    fields: dict[str, float]
    capability: str
    links: int


_HOPPER_CAPABILITY = "major: 9 feature_extension: ACCELERATED_FEATURES"
_GPUS = {
    "a100": _Gpu(
        "NVIDIA A100-SXM4-80GB", 85_167_243_264, 2_039_000_000_000, _AMPERE, "major: 8", 12
    ),
    "h100": _Gpu("NVIDIA H100", 84_942_979_072, 3_350_000_000_000, _HOPPER, _HOPPER_CAPABILITY, 18),
    "h200": _Gpu(
        "NVIDIA H200", 151_397_597_184, 4_800_000_000_000, _HOPPER, _HOPPER_CAPABILITY, 18
    ),
}


def text(name: str) -> str:
    """The target config of `a100`, `h100` or `h200`."""
    gpu = _GPUS[name]
    fields = gpu.fields | {"memory_bandwidth": gpu.bandwidth, "device_memory_size": gpu.memory}
    version = "8.0" if gpu.fields is _AMPERE else "9.0a"
    lines = [f"  {key}: {value}" for key, value in fields.items()]
    lines += [
        f"  cuda_compute_capability {{ {gpu.capability} }}",
        '  device_vendor: "NVIDIA Corporation"',
        f'  platform_version: "Compute Capability {version}"',
        '  driver_version: "13.0.0"',
        '  runtime_version: "13.0.0"',
        '  compile_time_toolkit_version: "13.0.0"',
        '  dnn_version: "9.10.0"',
        f"  device_interconnect_info {{ active_links: {gpu.links} }}",
        "  ecc_enabled: true",
        f'  name: "{gpu.name}"',
    ]
    return "\n".join(
        [
            "gpu_device_info {",
            *lines,
            "}",
            'platform_name: "CUDA"',
            "dnn_version_info { major: 9 minor: 10 }",
            f'device_description_str: "{gpu.name}"',
        ]
    )
