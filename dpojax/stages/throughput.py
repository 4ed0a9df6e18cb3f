"""The FLOPs of a run's batches, and the peak that they are held against."""

from __future__ import annotations

from collections.abc import Callable

from jax.sharding import Mesh

from dpojax.data.rows import Rows
from dpojax.stages.setup import Setup
from dpojax.training import throughput


def flops_of_batch(abstract_params: dict) -> Callable[[Rows], float]:
    """Model FLOPs of a batch's forward and backward pass, from the parameters' shapes."""
    body, head = throughput.product_weights(abstract_params)

    def flops(rows: Rows) -> float:
        tokens, scored = int((rows.segment > 0).sum()), int((rows.response >= 0).sum())
        return throughput.model_flops(body, head, tokens, scored)

    return flops


def peak_flops(setup: Setup) -> float:
    """FLOP/s of a matmul on all devices of the run together, measured at the first call."""
    one_device = throughput.matmul_flops_per_second(setup.config.model.compute_dtype)
    return one_device * _independent_devices(setup.mesh)


def _independent_devices(mesh: Mesh) -> int:
    """Devices with arithmetic units of their own; CPU devices of a host share its cores."""
    if mesh.devices.flat[0].platform != "cpu":
        return mesh.size
    return len({device.process_index for device in mesh.devices.flat})
