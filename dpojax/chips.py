"""Peaks of accelerators, from their makers' pages."""

from __future__ import annotations

import dataclasses

import jax

GOOGLE = "https://docs.cloud.google.com/tpu/docs/"
NVIDIA = "https://www.nvidia.com/en-us/data-center/"


@dataclasses.dataclass(frozen=True)
class Chip:
    """Peaks of one device of JAX: a chip, but for v7x, whose chips are two devices each.

    Attributes:
      name: as `--topology` names it.
      kinds: the names that JAX gives the device (`device_kind`).
      platform: of JAX.
      flops: bfloat16 FLOP/s of matrix products, dense.
      float32_flops: those of float32 numbers at XLA's default precision: a TPU rounds them to
        bfloat16, a GPU to TF32, at half of the speed.
      memory: bytes of its HBM.
      bandwidth: bytes/s of its HBM.
      link: bytes/s that it sends in a ring of chips. A TPU has two ports on each axis of the torus,
        one for each direction; both send. A GPU has NVLink.
      source: the page that gives these numbers.
      devices: of JAX on a chip.
    """

    name: str
    kinds: tuple[str, ...]
    platform: str
    flops: float
    memory: float
    bandwidth: float
    link: float
    source: str
    devices: int = 1

    @property
    def float32_flops(self) -> float:
        return self.flops if self.platform == "tpu" else self.flops / 2


# A TPU's names are those of jax/_src/pallas/mosaic/tpu_info.py. "NVIDIA H100" alone is that of a
# topology to compile for; the driver names the module of 700 W "NVIDIA H100 80GB HBM3".
V4, V5E, V5P = ("TPU v4",), ("TPU v5 lite", "TPU v5e"), ("TPU v5", "TPU v5p")
V6E, V7X = ("TPU v6 lite", "TPU v6e"), ("TPU7x",)
A100 = ("NVIDIA A100-SXM4-80GB",)
H100, H200 = ("NVIDIA H100 80GB HBM3", "NVIDIA H100"), ("NVIDIA H200",)
CHIPS = {
    chip.name: chip
    for chip in (
        # The links of v4, six of 50 GB/s, are those of Jouppi et al. 2023 (arXiv:2304.01433).
        Chip("v4", V4, "tpu", 275e12, 32 * 2**30, 1200e9, 100e9, GOOGLE + "v4"),
        Chip("v5e", V5E, "tpu", 197e12, 16e9, 819e9, 100e9, GOOGLE + "v5e"),
        Chip("v5p", V5P, "tpu", 459e12, 95e9, 2765e9, 200e9, GOOGLE + "v5p"),
        Chip("v6e", V6E, "tpu", 918e12, 32e9, 1638e9, 200e9, GOOGLE + "v6e"),
        # Half of a chip, but for the links: a ring through both halves crosses each of them once.
        Chip("v7x", V7X, "tpu", 1153.5e12, 96 * 2**30, 3690e9, 200e9, GOOGLE + "tpu7x", devices=2),
        Chip("a100", A100, "gpu", 312e12, 80e9, 2039e9, 300e9, NVIDIA + "a100/"),
        Chip("h100", H100, "gpu", 989e12, 80e9, 3350e9, 450e9, NVIDIA + "h100/"),
        Chip("h200", H200, "gpu", 989e12, 141e9, 4800e9, 450e9, NVIDIA + "h200/"),
    )
}


def chip_of(device: jax.Device) -> Chip | None:
    """What is known of a device; None where its kind is not in the table.

    The name has to be equal: an H100 for PCIe ("NVIDIA H100 PCIe") is slower than the one on a
    board of eight.
    """
    for chip in CHIPS.values():
        if device.device_kind in chip.kinds and device.platform == chip.platform:
            return chip
    return None
