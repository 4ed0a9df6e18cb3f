"""Which kernel computes attention on which platform, and why another one cannot."""

from __future__ import annotations

import functools
import logging

import jax
import jax.numpy as jnp
from jax import Array

from dpojax.models.attention import XLA, Kernel, attend_causally, attention_mask, by_device, scaled
from dpojax.models.config import DecoderConfig
from dpojax.models.flash import FLASH, MAX_HEAD_DIM
from dpojax.models.splash import SPLASH


def attend_cudnn(query, key, value, mask, scale, *, softcap=None, implementation="cudnn") -> Array:
    """Compute `attention.attend` with cuDNN's flash attention.

    No scores are in memory, but a bias for all heads is, made of the mask: [R, T, T] in the compute
    dtype, 2 T^2 bytes a row; and in the backward pass its gradient, as many again, which cuDNN
    writes always. Rows of an odd length go through XLA instead, with their scores, because cuDNN
    has no gradient for them.

    Args:
      query, key, value, mask, scale, softcap: as for `attention.attend`.
      implementation: `xla` makes the same call without a GPU, for tests.
    """
    if query.shape[1] % 2:
        return attend_causally(query, key, value, mask, scale, softcap=softcap)

    def mix(query, key, value, mask):
        return jax.nn.dot_product_attention(
            query, key, value, mask=mask[:, None], scale=1.0, implementation=implementation
        )

    return by_device(mix, scaled(query, scale), key, value, mask)


CUDNN = Kernel(attention_mask, attend_cudnn)
KERNELS = {"xla": XLA, "cudnn": CUDNN, "flash": FLASH, "splash": SPLASH}
AUTO_KERNELS = {"gpu": ("cudnn", "flash"), "tpu": ("splash",)}  # what `auto` tries before xla


def choose(
    name: str, config: DecoderConfig, dtype, device: jax.Device, *, vmapped: bool = False
) -> Kernel:
    """Choose the kernel with this name; `auto` is the platform's first that supports the model.

    On GPUs `auto` tries cuDNN first, which its vendor tunes for each GPU, then `flash`, and then
    xla. cuDNN computes all T^2 scores of a row of T tokens, and needs 4 T^2 bytes for it. So for
    long rows, and for rows of many examples, set `flash`, which skips most of these scores.

    Args:
      name: `auto`, or a name in KERNELS.
      config: of the decoder.
      dtype: the compute dtype.
      device: one of the devices that it will run on.
      vmapped: whether the model may run under `vmap`, as the members of a sweep do.

    Raises:
      ValueError: an unknown name, or a kernel that does not support this model here.
    """
    if name != "auto" and name not in KERNELS:
        raise ValueError(f"{name!r} is not one of auto, {', '.join(KERNELS)}")
    if name != "auto":
        if reason := obstacle(name, config, dtype, device, vmapped=vmapped):
            raise ValueError(f"{name!r}: {reason}; set it to auto or xla")
        return KERNELS[name]
    chosen, reasons = "xla", {}  # why the ones before it were not chosen
    for candidate in AUTO_KERNELS.get(device.platform, ()):
        reason = obstacle(candidate, config, dtype, device, vmapped=vmapped)
        if not reason:
            chosen = candidate
            break
        reasons[candidate] = reason
    for other, reason in reasons.items():
        _warn_once(f"attention goes through {chosen} and not {other}: {reason}")
    return KERNELS[chosen]


def name_of(kernel: Kernel) -> str:
    """The name of a kernel in KERNELS."""
    return next(name for name, other in KERNELS.items() if other is kernel)


def obstacle(name: str, config: DecoderConfig, dtype, device, *, vmapped: bool = False) -> str:
    """Say why the kernel does not support this model on this device; empty if it does."""
    if name == "splash" and device.platform != "tpu":
        return f"it runs on TPUs, and this is a {device.platform}"
    if name not in ("cudnn", "flash"):
        return ""
    if device.platform != "gpu" or not _of_nvidia(device):
        return f"it runs on GPUs of NVIDIA, and this is a {device.platform}"
    if float(getattr(device, "compute_capability", "0")) < 8:
        return "it needs compute capability 8.0 or more"
    if name == "flash":
        if config.head_dim > MAX_HEAD_DIM:
            return f"heads may have up to {MAX_HEAD_DIM} dimensions, not {config.head_dim}"
        return ""
    if jnp.dtype(dtype) not in (jnp.bfloat16, jnp.float16):
        return f"it computes in bfloat16, not {jnp.dtype(dtype).name}"
    if config.head_dim % 8 or config.head_dim > 128:
        return f"heads must have a multiple of 8 dimensions, up to 128, not {config.head_dim}"
    if config.attention_softcap is not None:
        return "it has no softcap on scores"
    if vmapped:
        return "it cannot run under vmap, over the members of a sweep"
    return ""


def _of_nvidia(device) -> bool:
    """Whether a GPU is NVIDIA's. Of one that is compiled for and not there, only its kind says."""
    return "cuda" in device.client.platform_version or device.device_kind.startswith("NVIDIA")


@functools.cache
def _warn_once(message: str) -> None:
    logging.getLogger(__name__).warning(message)
