"""The arrays of a checkpoint as Orbax stores them: their names and shapes, and where they go."""

from __future__ import annotations

from typing import Any

import jax
from jax.sharding import SingleDeviceSharding
from orbax.checkpoint import v1 as ocp

from dpojax.sharding import path_of
from dpojax.training.checkpoints.errors import CheckpointError, explained

STATE = "state"  # the name under which Orbax keeps the tree
SHOWN_DIFFERENCES = 8


def read_state(path: str, abstract: Any) -> Any:
    """Read the tree of a checkpoint, with the dtypes and shardings of `abstract`.

    Raises:
      CheckpointError: its arrays differ from those of `abstract`.
    """
    require_same_tree(path, saved_tree(path), abstract)
    with explained(f"cannot read the checkpoint {path}"):
        return ocp.load_checkpointables(path, {STATE: placed(abstract)})[STATE]


def saved_tree(path: str) -> Any:
    """The tree of a checkpoint, with shapes in place of arrays."""
    with explained(f"cannot read the checkpoint {path}"):
        return ocp.metadata(path, STATE).metadata


def placed(abstract: Any) -> Any:
    """Give arrays without a sharding this process's first device."""
    default = SingleDeviceSharding(jax.local_devices()[0])

    def one(leaf):
        sharding = default if leaf.sharding is None else leaf.sharding
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)

    return jax.tree.map(one, abstract)


def require_same_tree(path: str, saved: Any, expected: Any) -> None:
    """Raise CheckpointError unless both trees have arrays of the same names and shapes."""
    saved, expected = (
        {path_of(keys): _stored_shape(leaf) for keys, leaf in jax.tree.leaves_with_path(tree)}
        for tree in (saved, expected)
    )
    differences = [
        f"{name}: {saved.get(name, 'absent')} in the checkpoint, "
        f"{expected.get(name, 'absent')} expected"
        for name in sorted(saved.keys() | expected.keys())
        if saved.get(name) != expected.get(name)
    ]
    if differences:
        shown = "\n  ".join(differences[:SHOWN_DIFFERENCES])
        more = len(differences) - SHOWN_DIFFERENCES
        raise CheckpointError(
            f"{path}: written with another config, {len(differences)} arrays differ:\n  {shown}"
            + (f"\n  and {more} more" if more > 0 else "")
            + "\nUse the config that wrote it, or another workdir."
        )


def _stored_shape(leaf) -> tuple[int, ...]:
    """Return the shape on disk: a typed PRNG key is stored as its uint32 words."""
    if jax.dtypes.issubdtype(leaf.dtype, jax.dtypes.prng_key):
        return jax.eval_shape(jax.random.key_data, leaf).shape
    return tuple(leaf.shape)
