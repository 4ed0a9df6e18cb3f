"""The costs of a micro-batch for a model on a mesh; they decide how examples are packed."""

from __future__ import annotations

from typing import Any

from jax.sharding import AbstractMesh, Mesh

from dpojax.data.packing import Costs
from dpojax.models.attention import XLA, Kernel
from dpojax.models.config import DecoderConfig
from dpojax.training.memory import gradient_in_tokens
from dpojax.training.throughput import product_weights


def packing_costs(
    config: DecoderConfig,
    params: Any,
    mesh: Mesh | AbstractMesh,
    *,
    trained: Any = None,
    remat: str,
    dtype: str,
    kernel: Kernel = XLA,
) -> Costs:
    """Compute the costs from shapes alone.

    In a row of 4 * width tokens, attention is taken to cost as much as the rest of a layer,
    whatever the kernel. By FLOPs with all T x T scores that would be 6 * width; by the clock on two
    CPU cores, with a kernel that works by stretches, 1.5 * width.

    Args:
      config: of the model.
      params: of the model, arrays or their shapes.
      mesh: of the run. An abstract one has to name its devices.
      trained: what the gradient belongs to, such as adapters; `params` by default.
      remat, dtype, kernel: as `models.decoder.build` takes them.
    """
    body, head = product_weights(params)
    platform = mesh.abstract_mesh.abstract_device.platform
    return Costs(
        attention=4 * config.width,
        head=head / body,
        overhead=64 if platform == "cpu" else 512,
        step={"cpu": 16, "tpu": 128}.get(platform, 64),
        gradient=gradient_in_tokens(
            config,
            params if trained is None else trained,
            mesh,
            remat=remat,
            dtype=dtype,
            kernel=kernel,
        ),
    )
