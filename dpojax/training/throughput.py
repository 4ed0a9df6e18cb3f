"""Speed and size of a run: model FLOPs, the matmul speed to compare them with, peak memory."""

from __future__ import annotations

import functools
import math
import resource
import sys
import time
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax.sharding import Mesh
from jax.typing import DTypeLike

from dpojax.chips import chip_of
from dpojax.data.rows import Rows
from dpojax.sharding import make_mesh, path_of


def model_flops(
    matmul_params: int,
    head_params: int,
    tokens: int,
    scored: int,
    *,
    backward: bool = True,
    frozen: bool = False,
) -> float:
    """Count the FLOPs of a batch: 2 per parameter and token forward, and twice that backward.

    Kaplan et al. 2020, table 1, without the attention scores, whose share is small for rows much
    shorter than six times the width. Recomputation is not counted, so that utilisation is
    comparable between rematerialisation policies.

    Args:
      matmul_params: parameters that multiply every token; no embedding table, no LM head.
      head_params: width x vocabulary; only scored tokens go through it.
      tokens: tokens of the batch, without padding.
      scored: tokens whose log-prob is computed.
      backward: also count the gradient.
      frozen: these parameters get none, as the base of adapters: only what they multiply does. The
        adapters' own products are not counted.
    """
    forward = 2.0 * (matmul_params * tokens + head_params * scored)
    if not backward:
        return forward
    return forward * (2.0 if frozen else 3.0)


def matmul_flops_per_second(
    dtype: DTypeLike, *, size: int | None = None, seconds: float = 0.3
) -> float:
    """Measure the matmul speed of this process's first device: the ceiling of utilisation.

    It is the best of several runs of square products [size, size] after a warm-up, measured once
    per dtype and size. A CPU device stands for the whole host, because all CPU devices share its
    cores.

    Args:
      dtype: of the factors, e.g. `"bfloat16"`.
      size: 1024 on a CPU and 8192 elsewhere by default.
      seconds: how long to repeat; at least three runs are made.
    """
    return _measured(jnp.dtype(dtype).name, size, seconds)


@functools.cache
def _measured(dtype: str, size: int | None, seconds: float) -> float:
    device = jax.local_devices()[0]
    on_cpu = device.platform == "cpu"
    size = size or (1024 if on_cpu else 8192)
    products = 1 if on_cpu else 16  # in one call, so that dispatch does not count

    @jax.jit
    def multiply(x, w):
        return jax.lax.fori_loop(0, products, lambda _, x: x @ w, x)

    with jax.set_mesh(make_mesh(devices=[device])):  # not the run's mesh, of all devices
        # Random factors, since constant ones draw less power and run faster than a model can; the
        # scale keeps products at variance 1.
        keys = jax.random.split(jax.random.key(0))
        x, w = (jax.random.normal(key, (size, size), dtype) for key in keys)
        w = (w / math.sqrt(size)).astype(dtype)
        multiply(x, w).block_until_ready()
        times, stop = [], time.perf_counter() + seconds
        while len(times) < 3 or time.perf_counter() < stop:
            began = time.perf_counter()
            multiply(x, w).block_until_ready()
            times.append(time.perf_counter() - began)
    return products * 2.0 * size**3 / min(times)


def product_weights(params: dict) -> tuple[int, int]:
    """Count the weights that a token is multiplied by, in the layers and in the head."""
    leaves = jax.tree_util.tree_flatten_with_path(params)[0]
    sizes = {path_of(keys): leaf.size for keys, leaf in leaves}
    body = sum(size for path, size in sizes.items() if path.startswith("blocks/"))
    head = 0 if "score/kernel" in sizes else sizes.get("head/kernel", sizes["embed/tokens"])
    return body, head


def memory_bytes() -> dict[str, int]:
    """Read the peak memory in bytes.

    Returns:
      `peak_device_bytes` of the fullest local device, if the backend counts it. Otherwise
      `peak_host_rss_bytes` of this process.
    """
    stats = [device.memory_stats() or {} for device in jax.local_devices()]
    peaks = [stat["peak_bytes_in_use"] for stat in stats if "peak_bytes_in_use" in stat]
    if peaks:
        return {"peak_device_bytes": max(peaks)}
    unit = 1 if sys.platform == "darwin" else 1024  # Linux counts in KiB
    return {"peak_host_rss_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit}


def flops_of_batch(abstract_params: dict, *, frozen: bool = False) -> Callable[[Rows], float]:
    """Model FLOPs of a batch's forward and backward pass, from the parameters' shapes.

    `frozen` as in `model_flops`.
    """
    body, head = product_weights(abstract_params)

    def flops(rows: Rows) -> float:
        tokens, scored = int((rows.segment > 0).sum()), int((rows.response >= 0).sum())
        return model_flops(body, head, tokens, scored, frozen=frozen)

    return flops


def makers_peak(mesh: Mesh) -> float | None:
    """Dense bfloat16 FLOP/s of a mesh's devices together, by the table of `dpojax.chips`.

    It is the peak that MFU is a share of, whatever the compute dtype. None where the kind of the
    devices is not in the table, as of CPUs.
    """
    chip = chip_of(mesh.devices.flat[0])
    return None if chip is None else chip.flops * mesh.size


def peak_flops(mesh: Mesh, dtype: DTypeLike) -> float:
    """FLOP/s of a matmul on all devices of a mesh together; the first call measures it."""
    return matmul_flops_per_second(dtype) * _independent_devices(mesh)


def _independent_devices(mesh: Mesh) -> int:
    """Devices with arithmetic units of their own; CPU devices of a host share its cores."""
    if mesh.devices.flat[0].platform != "cpu":
        return mesh.size
    return len({device.process_index for device in mesh.devices.flat})
