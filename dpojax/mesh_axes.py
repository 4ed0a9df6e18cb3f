"""The same computation under every kind of mesh axis: Auto, Explicit, Manual, or no mesh at all.

Auto axes belong to the compiler: it decides how an intermediate array is laid out. Explicit axes
are part of an array's type; `jax.make_mesh` makes them by default. Manual axes are those of
`jax.shard_map`: each shard computes on its own, and an array either varies over an axis or is the
same in all shards.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import jax
from jax import Array
from jax.sharding import AbstractMesh, AxisType, PartitionSpec

Sums = TypeVar("Sums")
AxisName = str | tuple[str, ...]


def with_auto_axes(function: Callable[..., Any], *arrays: Array | None, out: PartitionSpec) -> Any:
    """Call `function(*arrays)` with the Explicit axes of the ambient mesh as Auto ones.

    Args:
      function: of the arrays; its results are laid out as `out` says.
      arrays: None stays None. Their gradients are laid out as they are.
      out: of every result. It has no meaning without Explicit axes.
    """
    mesh = jax.sharding.get_abstract_mesh()
    explicit = tuple(axis for axis, kind in _kinds(mesh) if kind == AxisType.Explicit)
    if not explicit:
        return function(*arrays)
    return jax.sharding.auto_axes(function, axes=explicit, out_sharding=out)(*arrays)


def spec_of(x: Array) -> PartitionSpec:
    """How the Explicit axes lay `x` out, one entry for each of its axes."""
    return jax.typeof(x).sharding.spec


def varying_alike(*arrays: Array | None) -> tuple[Array | None, ...]:
    """The arrays, each of which varies over all Manual axes that any of them varies over.

    The gradient of one that was the same in all shards is the sum over the shards.
    """
    axes = frozenset().union(*(varying_axes(x) for x in arrays if x is not None))
    return tuple(None if x is None else vary_over(x, axes) for x in arrays)


def vary_over(x: Array, axes: frozenset[str]) -> Array:
    """`x`, as an array that varies over these Manual axes."""
    missing = tuple(sorted(axes - varying_axes(x)))
    return jax.lax.pcast(x, missing, to="varying") if missing else x


def varying_axes(x: Array) -> frozenset[str]:
    """The Manual axes that `x` varies over; none outside of `jax.shard_map`."""
    aval = jax.typeof(x)
    kind = getattr(aval, "manual_axis_type", None)
    return aval.vma if kind is None else kind.varying


def shared_axes(mesh: AbstractMesh) -> dict[str, int]:
    """Sizes of the axes over which arrays can be spread; a shard sees nothing of Manual ones."""
    return {axis: mesh.shape[axis] for axis, kind in _kinds(mesh) if kind != AxisType.Manual}


def _kinds(mesh: AbstractMesh) -> list[tuple[str, AxisType]]:
    return list(zip(mesh.axis_names, mesh.axis_types))


def require_axis_name(function: str, x: Array, axis_name: AxisName | None) -> None:
    """Raise ValueError if `x` is a shard of a batch and nobody said which axes share the batch."""
    axes = sorted(varying_axes(x))
    if axes and axis_name is None:
        raise ValueError(
            f"{function}: each shard has a part of the batch, along the mesh axes {axes}; pass "
            "axis_name=... with those that share one batch, or axis_name=() if each shard is one"
        )


def sum_over_batch(sums: Sums, axis_name: AxisName | None) -> Sums:
    """Sums over the shards of a batch; those of this shard alone if `axis_name` is None or ()."""
    return jax.lax.psum(sums, axis_name) if axis_name else sums
