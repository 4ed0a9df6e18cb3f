"""Pytrees of arrays on disk: single trees, and the parameters of a saved state."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator
from typing import Any

from orbax.checkpoint import v1 as ocp

from dpojax import storage
from dpojax.training.checkpoints.arrays import placed, read_state, require_same_tree, saved_tree
from dpojax.training.checkpoints.checkpoints import Checkpoints
from dpojax.training.checkpoints.errors import CheckpointError, Damaged, explained
from dpojax.training.checkpoints.manifest import read_manifest
from dpojax.training.checkpoints.steps import examine_steps, whole_checkpoint

TREE = 0  # the step of a single tree


def save_tree(folder: storage.PathLike, tree: Any, metadata: dict) -> None:
    """Write one pytree of arrays under `folder`. It is complete on return, or absent.

    A folder that already holds a whole tree with equal `metadata` is left as it is. A damaged one
    is written again.

    Raises:
      CheckpointError: the folder holds a tree with other metadata, or the disk is too small.
    """
    with saving_tree(folder, tree, metadata):
        pass


@contextlib.contextmanager
def saving_tree(folder: storage.PathLike, tree: Any, metadata: dict) -> Iterator[None]:
    """Do `save_tree` while the body runs. The tree is complete on exit, or absent.

    The arrays of `tree` may be donated in the body.

    Raises:
      CheckpointError: on entry as `save_tree` does; on exit if the write failed.
    """
    with Checkpoints(folder, max_checkpoints=1, replace_damaged=True) as checkpoints:
        if not checkpoints.save(TREE, tree, metadata=metadata):
            there = checkpoints.metadata()
            if there != json.loads(json.dumps(metadata)):
                raise CheckpointError(
                    f"{checkpoints.folder}: holds a tree with metadata {there}, not {metadata}; "
                    "use another workdir, or delete this folder if no run needs it"
                )
        del tree  # this reference would keep the arrays in memory until the write ends
        yield


def load_tree(folder: storage.PathLike, abstract: Any) -> Any:
    """Return the pytree that `save_tree` wrote, with the shardings and dtypes of `abstract`.

    Args:
      abstract: pytree of `jax.ShapeDtypeStruct`.

    Raises:
      CheckpointError: no whole tree is there, or its arrays differ from those of `abstract`.
    """
    return read_state(whole_checkpoint(folder, None)[0], abstract)


def damaged_tree(folder: storage.PathLike) -> dict | None:
    """Return the metadata of a tree that `save_tree` wrote and whose arrays are damaged.

    None where the tree is whole or not there, and where its metadata are damaged, too. Every
    process makes this call.
    """
    folder = storage.as_path(folder)
    if TREE not in examine_steps(folder).damaged:
        return None
    try:
        return read_manifest(f"{folder}/{TREE}").metadata
    except Damaged:
        return None


def load_params(
    folder: storage.PathLike, abstract_params: Any, step: int | None = None, *, within: str = ""
) -> Any:
    """Return the `params` of a saved state; the optimiser's arrays are not read.

    An export uses this, and the next stage, which starts a new optimiser.

    Args:
      step: the step of a complete checkpoint; None is the newest.
      within: the field of the saved tree that holds the state; "" if the tree is the state.

    Raises:
      CheckpointError: no such checkpoint, or it is damaged, or its parameters differ from
        `abstract_params`.
    """
    path, _ = whole_checkpoint(folder, step)
    saved = saved_tree(path)
    state = saved.get(within) if within and isinstance(saved, dict) else saved
    if not isinstance(state, dict) or "params" not in state:
        missing = f"{within}.params" if within else "params"
        raise CheckpointError(f"{path}: the saved state has no field `{missing}`")
    require_same_tree(path, {"params": state["params"]}, {"params": abstract_params})
    context = ocp.Context()
    context.pytree.loading.partial_load = True
    abstract_tree = {"params": placed(abstract_params)}
    with explained(f"cannot read the parameters in {path}"), context:
        if within:
            return ocp.load(path, {within: abstract_tree})[within]["params"]
        return ocp.load(path, abstract_tree)["params"]
