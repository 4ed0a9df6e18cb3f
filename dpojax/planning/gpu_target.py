"""What XLA has to know of a GPU to compile for it where it is not there.

The text form of XLA's message GpuTargetConfig. The numbers are those that the driver reports.
"""

from __future__ import annotations

from typing import NamedTuple


class _Memory(NamedTuple):
    size: int
    bandwidth: int


_MEMORY = {
    "h100": _Memory(84_942_979_072, 3_350_000_000_000),
    "h200": _Memory(151_397_597_184, 4_800_000_000_000),
}

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


def text(name: str) -> str:
    """The target config of `h100` or `h200`."""
    memory = _MEMORY[name]
    fields = _HOPPER | {"memory_bandwidth": memory.bandwidth, "device_memory_size": memory.size}
    title = f"NVIDIA {name.upper()}"
    lines = [f"  {key}: {value}" for key, value in fields.items()]
    lines += [
        "  cuda_compute_capability { major: 9 feature_extension: ACCELERATED_FEATURES }",
        '  device_vendor: "NVIDIA Corporation"',
        '  platform_version: "Compute Capability 9.0a"',
        '  driver_version: "13.0.0"',
        '  runtime_version: "13.0.0"',
        '  compile_time_toolkit_version: "13.0.0"',
        '  dnn_version: "9.10.0"',
        "  device_interconnect_info { active_links: 18 }",
        "  ecc_enabled: true",
        f'  name: "{title}"',
    ]
    return "\n".join(
        [
            "gpu_device_info {",
            *lines,
            "}",
            'platform_name: "CUDA"',
            "dnn_version_info { major: 9 minor: 10 }",
            f'device_description_str: "{title}"',
        ]
    )
