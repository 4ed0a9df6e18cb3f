"""The one place that knows devices: the mesh, path rules for parameters, shardings of rows."""

from __future__ import annotations

import math
import os
import re
from collections.abc import Sequence
from typing import TypeVar

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

AXES = ("data", "fsdp", "tensor")
ROWS = ("data", "fsdp")  # the mesh axes that rows of tokens are spread over
SWEEP = "sweep"  # the axis that the members of a sweep lie on; nothing is communicated across it

Flag = TypeVar("Flag", bool, int)
Rules = Sequence[tuple[str, PartitionSpec]]


def make_mesh(data: int = -1, fsdp: int = 1, tensor: int = 1, *, devices=None) -> Mesh:
    """A mesh with axes `data`, `fsdp`, `tensor`; one size may be -1 and takes what is left.

    Raises:
      ValueError: more than one -1, or the sizes do not multiply to the number of devices.
    """
    devices = jax.devices() if devices is None else list(devices)
    sizes = {"data": data, "fsdp": fsdp, "tensor": tensor}
    free = [name for name, size in sizes.items() if size == -1]
    known = math.prod(size for size in sizes.values() if size != -1)
    if len(free) > 1 or known < 1:
        raise ValueError(f"at most one axis may be -1, and all others positive; got {sizes}")
    if free:
        sizes[free[0]] = len(devices) // known
    if math.prod(sizes.values()) != len(devices) or 0 in sizes.values():
        shape = " x ".join(f"{name}={size}" for name, size in sizes.items())
        raise ValueError(
            f"{shape} wants {max(known, math.prod(sizes.values()))} devices, but there are "
            f"{len(devices)}; the product of the sizes has to be {len(devices)}"
        )
    return jax.make_mesh(
        tuple(sizes.values()), AXES, axis_types=(AxisType.Auto,) * len(AXES), devices=devices
    )


def sweep_mesh(mesh: Mesh, size: int) -> Mesh:
    """The same devices in the same order with a leading axis `sweep`, taken from `data`.

    Raises:
      ValueError: `size` does not divide the mesh's `data`.
    """
    data, fsdp, tensor = (mesh.shape[name] for name in AXES)
    if size < 1 or data % size:
        raise ValueError(f"a sweep axis of {size} does not divide the {data} of mesh.data")
    devices = mesh.devices.reshape(size, data // size, fsdp, tensor)
    return Mesh(devices, (SWEEP, *AXES), axis_types=(AxisType.Auto,) * (1 + len(AXES)))


def start_distributed() -> None:
    """Join the processes of a run: of a TPU pod, Slurm, Open MPI or Kubernetes by themselves.

    Anywhere else set JAX_COORDINATOR_ADDRESS (host:port of process 0), JAX_NUM_PROCESSES and
    JAX_PROCESS_ID for every process. Does nothing where they are joined already.
    """
    if jax.distributed.is_initialized():
        return
    names = {"num_processes": "JAX_NUM_PROCESSES", "process_id": "JAX_PROCESS_ID"}
    given = {key: int(os.environ[name]) for key, name in names.items() if name in os.environ}
    jax.distributed.initialize(**given)


def agreed(value: Flag) -> Flag:
    """What process 0 holds, so that all processes take the same way; all wait for each other.

    An int has to be of 32 bits.
    """
    if jax.process_count() == 1:
        return value
    return type(value)(multihost_utils.broadcast_one_to_all(np.array(value)))


def constrain(x: jax.Array, *spec) -> jax.Array:
    """x with its dimensions laid over the named axes of the ambient mesh; x itself without one."""
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty:
        return x
    return jax.lax.with_sharding_constraint(x, fit(PartitionSpec(*spec), x.shape, mesh))


def fit(spec: PartitionSpec, shape: Sequence[int], mesh) -> PartitionSpec:
    """`spec` without the axes that do not divide their dimension (a 50,257-word vocabulary)."""
    kept = []
    for size, axes in zip(shape, tuple(spec) + (None,) * (len(shape) - len(spec))):
        names = (axes,) if isinstance(axes, str) else tuple(axes or ())
        kept.append(axes if size % math.prod(mesh.shape[name] for name in names) == 0 else None)
    return PartitionSpec(*kept)


def put_rows(rows, mesh: Mesh):
    """A batch of NumPy rows [micro-batches, rows, ...] on the mesh, its rows over data and fsdp.

    Every process holds the whole batch and copies only its devices' part.
    """
    return put(rows, NamedSharding(mesh, PartitionSpec(None, ROWS)))


def put(tree, where: NamedSharding):
    """NumPy arrays that every process holds whole, each laid out as `where` says."""
    return jax.tree.map(
        lambda x: jax.make_array_from_callback(x.shape, where, lambda index: x[index]), tree
    )


def to_host(tree):
    """Arrays of the mesh as NumPy arrays, whole on every process."""
    if all(x.is_fully_addressable for x in jax.tree.leaves(tree)):
        return jax.device_get(tree)
    return multihost_utils.process_allgather(tree, tiled=True)


def row_shards(mesh: Mesh) -> int:
    """How many parts the rows of a batch are cut into; a micro-batch holds a multiple of it."""
    return math.prod(mesh.shape[axis] for axis in ROWS)


def replicated(mesh: Mesh) -> NamedSharding:
    """The sharding of what every device holds whole."""
    return NamedSharding(mesh, PartitionSpec())


def path_of(keys) -> str:
    """`blocks/attention/query/kernel` for a jax key path."""
    return jax.tree_util.keystr(keys, simple=True, separator="/")


def tree_shardings(tree, mesh: Mesh, rules: Rules):
    """A NamedSharding for every array of `tree`: the first rule whose pattern is found in its path.

    Raises:
      ValueError: no rule matches a path (end a rule table with `(".*", PartitionSpec())`).
    """

    def one(keys, leaf):
        path = path_of(keys)
        for pattern, spec in rules:
            if re.search(pattern, path):
                return NamedSharding(mesh, fit(spec, leaf.shape, mesh))
        raise ValueError(f"no sharding rule matches parameter {path!r}")

    return jax.tree_util.tree_map_with_path(one, tree)
