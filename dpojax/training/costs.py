"""What decides how examples are packed: a micro-batch's costs for a model on a mesh."""

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
    """Costs from shapes alone.

    Attention is to cost as much as all else of a layer in rows of 4 width tokens, whatever the
    kernel: with all T x T scores FLOPs say 6 width; on two CPU cores, by stretches, the clock 1.5.

    Args:
      params: of the model, arrays or their shapes.
      mesh: an abstract one has to say what its devices are.
      trained: what a gradient is of, such as adapters; `params` by default.
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
