"""Attention by platform: which kernel computes it, and why not another."""

from __future__ import annotations

import functools
import logging

import jax
import jax.numpy as jnp
from jax import Array

from dpojax.models.attention import XLA, Kernel, attend_causally, attention_mask, by_device, scaled
from dpojax.models.config import DecoderConfig
from dpojax.models.flash import FLASH, LARGEST
from dpojax.models.splash import SPLASH


def attend_cudnn(query, key, value, mask, scale, *, softcap=None, implementation="cudnn") -> Array:
    """As `attention.attend`, by cuDNN's flash attention: no scores in memory, but one mask for all
    heads, [R, T, T] in the compute dtype.

    Rows of an odd length go through XLA, scores and all: cuDNN has no gradient of theirs.

    Args:
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
PLATFORM = {"gpu": ("cudnn", "flash"), "tpu": ("splash",)}  # what `auto` tries there, before xla


def choose(
    name: str, config: DecoderConfig, dtype, device: jax.Device, *, vmapped: bool = False
) -> Kernel:
    """The kernel of that name; `auto`: the first of the platform's that can do what is asked, or
    xla.

    On GPUs cuDNN comes first, which its vendor tunes for each of them; `flash` does what it cannot.
    cuDNN's mask takes 2 T^2 bytes a row of T tokens, and it computes all T^2 scores: for long rows,
    and for rows of many examples, of which `flash` skips most, set `flash`.

    Args:
      dtype: the compute dtype. device: one of those that it is to run on.
      vmapped: whether the model may run under `vmap`, as the members of a sweep do.

    Raises:
      ValueError: an unknown name, or a kernel that cannot do this here.
    """
    if name != "auto" and name not in KERNELS:
        raise ValueError(f"{name!r} is not one of auto, {', '.join(KERNELS)}")
    wanted = (*PLATFORM.get(device.platform, ()), "xla") if name == "auto" else (name,)
    reasons = {}
    for candidate in wanted:
        reason = obstacle(candidate, config, dtype, device, vmapped=vmapped)
        if not reason:
            break
        if name != "auto":
            raise ValueError(f"{name!r}: {reason}; set it to auto or xla")
        reasons[candidate] = reason
    for other, reason in reasons.items():
        _say_once(f"attention goes through {candidate} and not {other}: {reason}")
    return KERNELS[candidate]


def obstacle(name: str, config: DecoderConfig, dtype, device, *, vmapped: bool = False) -> str:
    """Why the kernel cannot do this, for a person to read; empty if it can."""
    if name == "splash" and device.platform != "tpu":
        return f"it runs on TPUs, and this is a {device.platform}"
    if name not in ("cudnn", "flash"):
        return ""
    if device.platform != "gpu" or "cuda" not in device.client.platform_version:
        return f"it runs on GPUs of NVIDIA, and this is a {device.platform}"
    if float(getattr(device, "compute_capability", "0")) < 8:
        return "it wants compute capability 8.0 or more"
    if name == "flash":
        wide = config.head_dim > LARGEST
        return f"heads are to have up to {LARGEST} dimensions, not {config.head_dim}" * wide
    if jnp.dtype(dtype) not in (jnp.bfloat16, jnp.float16):
        return f"it computes in bfloat16, not {jnp.dtype(dtype).name}"
    if config.head_dim % 8 or config.head_dim > 128:
        return f"heads are to have a multiple of 8 dimensions, up to 128, not {config.head_dim}"
    if config.attention_softcap is not None:
        return "it has no softcap on scores"
    if vmapped:
        return "it cannot run under vmap, over the members of a sweep"
    return ""


@functools.cache
def _say_once(message: str) -> None:
    logging.getLogger(__name__).warning(message)
