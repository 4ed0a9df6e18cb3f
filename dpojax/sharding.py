"""Devices: the mesh, path rules that shard parameters, shardings of rows, and processes."""

from __future__ import annotations

import functools
import math
import os
import re
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import jax
import numpy as np
from absl import logging
from jax._src import distributed  # the coordinator's address has no public name
from jax.experimental import multihost_utils
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from dpojax import peers
from dpojax.watchdog import unwatched

AXES = ("data", "fsdp", "tensor")
ROWS = ("data", "fsdp")  # the mesh axes that rows of tokens are spread over
SWEEP = "sweep"  # the axis that the members of a sweep lie on; nothing is communicated across it

Flag = TypeVar("Flag", bool, int)
Rules = Sequence[tuple[str, PartitionSpec]]


def make_mesh(data: int = -1, fsdp: int = 1, tensor: int = 1, *, devices=None) -> Mesh:
    """Make a mesh with axes `data`, `fsdp`, `tensor`; one size may be -1, which takes the rest.

    Raises:
      ValueError: more than one -1, or the sizes do not multiply to the number of devices.
    """
    devices = jax.devices() if devices is None else list(devices)
    sizes = mesh_sizes(data, fsdp, tensor, devices=len(devices))
    return jax.make_mesh(sizes, AXES, axis_types=(AxisType.Auto,) * len(AXES), devices=devices)


def mesh_sizes(data: int, fsdp: int, tensor: int, *, devices: int) -> tuple[int, int, int]:
    """The sizes of the axes of `make_mesh` on so many devices; it raises the same errors."""
    sizes = {"data": data, "fsdp": fsdp, "tensor": tensor}
    free_axes = [name for name, size in sizes.items() if size == -1]
    known = math.prod(size for size in sizes.values() if size != -1)
    if len(free_axes) > 1 or known < 1:
        raise ValueError(f"at most one axis may be -1, and all others positive; got {sizes}")
    if free_axes:
        sizes[free_axes[0]] = devices // known
    if math.prod(sizes.values()) != devices or 0 in sizes.values():
        shape = " x ".join(f"{name}={size}" for name, size in sizes.items())
        raise ValueError(
            f"{shape} needs {max(known, math.prod(sizes.values()))} devices, but there are "
            f"{devices}; the product of the sizes must be {devices}"
        )
    return tuple(sizes.values())


def reordered(mesh: Mesh, permutation: Sequence[int]) -> Mesh:
    """The same mesh whose i-th device is the `permutation[i]`-th one, in row-major order."""
    devices = mesh.devices.ravel()[list(permutation)].reshape(mesh.devices.shape)
    return Mesh(devices, mesh.axis_names, axis_types=mesh.axis_types)


def sweep_mesh(mesh: Mesh, size: int) -> Mesh:
    """Split the axis `data` of a mesh in two, `sweep` and `data`; devices keep their order.

    Raises:
      ValueError: `size` does not divide the mesh's `data`.
    """
    data, fsdp, tensor = (mesh.shape[name] for name in AXES)
    if size < 1 or data % size:
        raise ValueError(f"a sweep axis of {size} does not divide mesh.data, which is {data}")
    devices = mesh.devices.reshape(size, data // size, fsdp, tensor)
    return Mesh(devices, (SWEEP, *AXES), axis_types=(AxisType.Auto,) * (1 + len(AXES)))


def longest_sweep_axis(data: int, members: int) -> int:
    """The longest sweep axis that divides a mesh's `data` and that so many members fill."""
    return max(n for n in range(1, min(data, members) + 1) if data % n == 0)


class DistributedError(RuntimeError):
    """The processes of a run do not find each other."""


def start_distributed() -> None:
    """Connect the processes of a run; do nothing if they are connected already.

    JAX finds them by itself on a TPU pod and under Slurm, Open MPI and Kubernetes. Anywhere else,
    set JAX_COORDINATOR_ADDRESS (host:port of process 0), JAX_NUM_PROCESSES and JAX_PROCESS_ID for
    every process.

    Raises:
      DistributedError: they do not find each other, or a variable is no number.
    """
    if jax.distributed.is_initialized():
        return
    # It would take over SIGTERM, and forget one that comes before the training: see `peers`.
    jax.config.update("jax_enable_preemption_service", False)
    try:
        jax.distributed.initialize(**_distributed_settings())
    except (RuntimeError, ValueError) as error:
        raise DistributedError(
            f"the processes of the run did not find each other: {str(error).splitlines()[0]} (on a "
            "TPU pod and under Slurm JAX finds them by itself; elsewhere set "
            "JAX_COORDINATOR_ADDRESS, JAX_NUM_PROCESSES and JAX_PROCESS_ID)"
        ) from error
    _link_processes()


def _distributed_settings() -> dict[str, int]:
    variables = {"num_processes": "JAX_NUM_PROCESSES", "process_id": "JAX_PROCESS_ID"}
    settings = {}
    for name, variable in variables.items():
        if (value := os.environ.get(variable)) is not None:
            if not value.isdigit():
                raise DistributedError(f"{variable} = {value!r}: not a number")
            settings[name] = int(value)
    return settings


def _link_processes() -> None:
    """Open the line of `peers` between all processes, or none where one of them cannot."""
    index, count = jax.process_index(), jax.process_count()
    if count == 1:
        return
    link, server, port_and_secret = peers.Link(index, count), None, (0, 0)
    if index == 0:
        server, *port_and_secret = peers.listen()
    port_and_secret = multihost_utils.broadcast_one_to_all(np.array(port_and_secret, np.int32))
    port, secret = map(int, port_and_secret)
    try:
        if index == 0:
            peers.accept(link, server, secret)
        else:
            # The one address of process 0 that every process has reached already.
            host = distributed.global_state.coordinator_address.rsplit(":", 1)[0].strip("[]")
            peers.connect(link, host, port, secret)
        stands = True
    except OSError:
        stands = False
    if multihost_utils.process_allgather(np.array(stands)).all():
        peers.use(link)
    else:
        link.close()
        if index == 0:
            logging.warning(
                "the processes cannot open a line of their own (port %d of process 0): one that "
                "is killed is noticed by JAX alone, after 100 seconds",
                port,
            )


def agreed(value: Flag) -> Flag:
    """The value of process 0, so that all processes decide alike; they wait for each other.

    An int must fit into 32 bits.
    """
    if jax.process_count() == 1:
        return value
    return type(value)(multihost_utils.broadcast_one_to_all(np.array(value)))


def any_process(value: bool) -> bool:
    """Whether a value is true in any process; they wait for each other."""
    if jax.process_count() == 1:
        return value
    return bool(multihost_utils.process_allgather(np.array(value)).any())


class FirstProcessFailed(RuntimeError):
    """The first process of a run has failed; its own message says why."""


def on_first_process(action: Callable[..., None], *arguments: Any) -> None:
    """The first process calls action(*arguments); the others wait until it is done.

    Raises:
      what `action` raises, on the first process; FirstProcessFailed on the others.
    """
    error = None
    if jax.process_index() == 0:
        try:
            action(*arguments)
        except Exception as raised:
            error = raised
    with unwatched():  # the first process is watched
        failed = agreed(error is not None)
    if error is not None:
        raise error
    if failed:
        raise FirstProcessFailed("the first process has failed; see what it printed")


def constrain(x: jax.Array, *spec) -> jax.Array:
    """Constrain the sharding of x to `spec` on the ambient mesh; without a mesh, return x.

    Args:
      x: any array.
      spec: for each dimension of x, a name or names of mesh axes, or None.
    """
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty:
        return x
    return jax.lax.with_sharding_constraint(x, fit_spec(PartitionSpec(*spec), x.shape, mesh))


@functools.partial(jax.custom_vjp, nondiff_argnums=(1, 2))
def constrain_with_gradient(x: jax.Array, spec: tuple, gradient_spec: tuple) -> jax.Array:
    """Constrain x to `spec`, and its gradient to `gradient_spec`; see `constrain`.

    `constrain` gives both the same sharding. A weight that is gathered before its use would then
    get a gradient that every device holds whole: an all-reduce where a reduce-scatter will do.
    """
    del gradient_spec
    return constrain(x, *spec)


def _constrain_forward(x, spec, gradient_spec):
    return constrain_with_gradient(x, spec, gradient_spec), None


def _constrain_backward(spec, gradient_spec, _, gradient):
    # First as `constrain` has it: or the partitioner would move what the gradient is made of.
    return (constrain(constrain(gradient, *spec), *gradient_spec),)


constrain_with_gradient.defvjp(_constrain_forward, _constrain_backward)


def fit_spec(spec: PartitionSpec, shape: Sequence[int], mesh) -> PartitionSpec:
    """Drop the mesh axes of `spec` that do not divide their dimension.

    A vocabulary of 50,257 words, for example, is then not sharded.
    """
    fitted = []
    for size, axes in zip(shape, tuple(spec) + (None,) * (len(shape) - len(spec))):
        names = (axes,) if isinstance(axes, str) else tuple(axes or ())
        divides = size % math.prod(mesh.shape[name] for name in names) == 0
        fitted.append(axes if divides else None)
    return PartitionSpec(*fitted)


def put_rows(rows, mesh: Mesh):
    """Put a batch of NumPy rows [micro-batches, rows, ...] on the mesh, rows over data and fsdp.

    Every process holds the whole batch. It copies only the part of its own devices.
    """
    return put(rows, NamedSharding(mesh, PartitionSpec(None, ROWS)))


def put(tree, sharding: NamedSharding):
    """Put NumPy arrays, which every process holds whole, on devices with this sharding."""

    def put_array(x: np.ndarray) -> jax.Array:
        return jax.make_array_from_callback(x.shape, sharding, lambda index: x[index])

    return jax.tree.map(put_array, tree)


def to_host(tree):
    """Copy arrays of the mesh to the host: NumPy arrays, whole on every process."""
    if all(x.is_fully_addressable for x in jax.tree.leaves(tree)):
        return jax.device_get(tree)
    return multihost_utils.process_allgather(tree, tiled=True)


def settle(tree):
    """Wait for these results where several processes compute on CPUs; return them.

    There a program takes one thread for each device until its collectives are done. Programs that
    do not need each other's results may take all threads in halves, and then wait for ever. Whoever
    starts several of them settles each one first.
    """
    if jax.process_count() > 1 and jax.default_backend() == "cpu":
        return jax.block_until_ready(tree)
    return tree


def row_shards(mesh: Mesh) -> int:
    """How many parts the rows of a batch are cut into; it divides the rows of a micro-batch."""
    return math.prod(mesh.shape[axis] for axis in ROWS)


def replicated(mesh: Mesh) -> NamedSharding:
    """The sharding of arrays that every device holds whole."""
    return NamedSharding(mesh, PartitionSpec())


def path_of(keys) -> str:
    """A JAX key path as a string, such as `blocks/attention/query/kernel`."""
    return jax.tree_util.keystr(keys, simple=True, separator="/")


def tree_shardings(tree, mesh: Mesh, rules: Rules):
    """Choose a NamedSharding for every array of `tree`, from the first rule that matches its path.

    Args:
      tree: arrays, or anything with shapes.
      mesh: where they will lie.
      rules: pairs of a pattern, which `re.search` looks for in the path, and a PartitionSpec.

    Raises:
      ValueError: no rule matches a path (end a rule table with `(".*", PartitionSpec())`).
    """

    def sharding_of(keys, leaf):
        path = path_of(keys)
        for pattern, spec in rules:
            if re.search(pattern, path):
                return NamedSharding(mesh, fit_spec(spec, leaf.shape, mesh))
        raise ValueError(f"no sharding rule matches parameter {path!r}")

    return jax.tree_util.tree_map_with_path(sharding_of, tree)
