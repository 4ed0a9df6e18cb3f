"""Asynchronous, sharded checkpoints on Orbax v1: what a run needs to go on as if never stopped."""

from __future__ import annotations

import contextlib
import json
import logging
import os
import shutil
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import SingleDeviceSharding
from orbax.checkpoint import v1 as ocp

from dpojax.sharding import path_of

POSITION, SCORE = "data position", "score"
SPACE_MARGIN = 1.05  # of the arrays' bytes, for indices and metadata
SHOWN_DIFFERENCES = 8


class Best(NamedTuple):
    """A checkpoint that was scored."""

    score: float
    step: int


class CheckpointError(RuntimeError):
    """A checkpoint could not be written or read; the message names it and says what to do."""


def _only_problems_of_orbax(record: logging.LogRecord) -> bool:
    return record.levelno >= logging.WARNING or f"{os.sep}orbax{os.sep}" not in record.pathname


# Orbax shares absl's one logger with the user's program and writes dozens of INFO lines per save.
logging.getLogger("absl").addFilter(_only_problems_of_orbax)


class Checkpoints:
    """The checkpoints of one run, `folder/<step>`: the newest `keep` are kept, and the best.

    A context manager: on leaving, it waits for the save in flight. In a run of several processes
    every process makes every call, and `folder` is one that all of them see. What a killed process
    left half-written is removed on opening, so only one run may have a folder open at a time.

    Raises:
      ValueError: `keep` is below 1.
    """

    def __init__(self, folder: str | os.PathLike, *, keep: int = 2):
        if keep < 1:
            raise ValueError(f"checkpoints in {folder}: keep must be at least 1, got {keep}")
        self.folder = os.path.abspath(folder)
        self._keep = keep
        self._orbax = self._open()
        self._in_flight = None  # (path, response) of the save that nobody has waited for

    def __enter__(self) -> Checkpoints:
        return self

    def __exit__(self, kind, error, traceback) -> None:
        try:
            self.close()
        except CheckpointError as failed:
            if error is None:
                raise
            error.add_note(str(failed))  # what stopped the run matters more

    @property
    def latest(self) -> int | None:
        """The newest complete step, None where there is none. Waits for the save in flight."""
        self.wait()
        return max(_complete_steps(self.folder), default=None)

    @property
    def best(self) -> Best | None:
        """The complete checkpoint of the highest score; None where none was scored. Waits."""
        self.wait()
        return best(self.folder)

    def save(
        self,
        step: int,
        state: Any,
        data: Any = None,
        *,
        metadata: dict,
        score: float | None = None,
    ) -> bool:
        """Starts to write `state` and returns while the writing goes on; False if step is there.

        The arrays of `state` may be donated as soon as this returns. Older checkpoints are removed
        only when this one is complete.

        Args:
          step: number of optimiser steps that made `state`; not below the newest on disk.
          state: any pytree of jax arrays, typed PRNG keys included.
          data: a Grain iterator, whose position is saved, or None. It has to be the same in every
            process.
          metadata: small JSON dict, returned by `restore`.
          score: the higher the better. The best that is on disk stays there, however old; of equal
            scores the newest. A checkpoint without one is never the best.

        Raises:
          CheckpointError: the previous save failed; too little disk space for this one; an older
            step than the newest on disk. Complete checkpoints are untouched.
        """
        latest = self.latest
        if latest is not None and step <= latest:
            if step in _complete_steps(self.folder):
                return False
            raise CheckpointError(
                f"{self.folder}: cannot save step {step} after step {latest}; resume from the "
                "newest checkpoint, or start in an empty workdir"
            )
        _require_space(self.folder, state)
        path = f"{self.folder}/{step}"
        described, scored = _described_by(metadata, data), None
        if score is not None:
            scored = {SCORE: float(score)}
            described |= scored
        with _explained(f"cannot write the checkpoint {path}", self._reopen):
            response = self._orbax.save_checkpointables_async(
                step, {"state": state}, force=True, custom_metadata=described, metrics=scored
            )
        self._in_flight = (path, response)
        return True

    def wait(self) -> None:
        """Blocks until the save in flight is complete on disk.

        Raises:
          CheckpointError: it failed; the checkpoints before it are complete and still there.
        """
        if self._in_flight is None:
            return
        (path, response), self._in_flight = self._in_flight, None
        with _explained(f"cannot write the checkpoint {path}", self._reopen):
            response.result()

    def restore(
        self, abstract_state: Any, data: Any = None, step: int | None = None
    ) -> tuple[Any, dict]:
        """The state of `step` (the newest by default), bit for bit, and its metadata.

        Args:
          abstract_state: pytree of `jax.ShapeDtypeStruct`; its shardings (of any mesh) say where
            the arrays go, its dtypes what they are cast to.
          data: a Grain iterator of the same pipeline, moved in place to the saved position.
          step: one of the complete checkpoints.

        Raises:
          CheckpointError: no such checkpoint, or its tree is not that of `abstract_state`.
        """
        self.wait()
        path = _path_of_step(self.folder, step)
        found = _described(path)
        _require_same_tree(path, found.metadata, abstract_state)
        with _explained(f"cannot read the checkpoint {path}"):
            items = ocp.load_checkpointables(path, {"state": _placed(abstract_state)})
        metadata = dict(found.custom_metadata)
        position = metadata.pop(POSITION, None)
        metadata.pop(SCORE, None)
        if data is not None:
            if position is None:
                raise CheckpointError(f"{path}: holds no position in the data")
            data.set_state(position)
        return items["state"], metadata

    def metadata(self, step: int | None = None) -> dict:
        """The metadata that was saved with `step` (the newest by default), without the arrays."""
        self.wait()
        return metadata_of(self.folder, step)

    def close(self) -> None:
        """Waits for the save in flight and ends Orbax's threads. Raises as `wait` does."""
        try:
            self.wait()
        finally:
            self._orbax.close()

    def _open(self) -> ocp.training.Checkpointer:
        policies = ocp.training.preservation_policies
        newest = policies.LatestN(self._keep)
        best = policies.BestN(
            get_metric_fn=lambda metrics: metrics[SCORE],
            n=1,
            keep_checkpoints_without_metrics=False,
        )
        return ocp.training.Checkpointer(
            self.folder,
            preservation_policy=policies.AnyPreservationPolicy([newest, best]),
            cleanup_tmp_directories=True,
        )

    def _reopen(self) -> None:
        """After a failed save: Orbax would raise once more, and has forgotten older checkpoints."""
        with contextlib.suppress(Exception):
            self._orbax.close()
        self._orbax = self._open()


def best(folder: str | os.PathLike) -> Best | None:
    """The complete checkpoint of the highest score in a folder; None where none was scored."""
    folder = os.path.abspath(folder)
    scored = []
    for step in _complete_steps(folder):
        found = _described(_path_of_step(folder, step)).custom_metadata
        if SCORE in found:
            scored.append(Best(found[SCORE], step))
    return max(scored, default=None)


def metadata_of(folder: str | os.PathLike, step: int | None = None) -> dict:
    """The metadata that was saved with `step` (the newest by default), without the arrays.

    Raises:
      CheckpointError: there is no such checkpoint.
    """
    found = dict(_described(_path_of_step(os.path.abspath(folder), step)).custom_metadata)
    return {name: value for name, value in found.items() if name not in (POSITION, SCORE)}


def save_tree(folder: str | os.PathLike, tree: Any, metadata: dict) -> None:
    """Writes one pytree of arrays under `folder`, once: complete when this returns, or not there.

    A folder that holds a complete tree with equal `metadata` is left as it is.

    Raises:
      CheckpointError: the folder holds a tree with other metadata; too little disk space.
    """
    with saving_tree(folder, tree, metadata):
        pass


@contextlib.contextmanager
def saving_tree(folder: str | os.PathLike, tree: Any, metadata: dict) -> Iterator[None]:
    """`save_tree` beside what is done meanwhile: complete when this is left, or not there.

    The arrays of `tree` may be donated as soon as this is entered.

    Raises:
      CheckpointError: as `save_tree`; of a write that failed when this is left.
    """
    with Checkpoints(folder, max_checkpoints=1) as checkpoints:
        if not checkpoints.save(0, tree, metadata=metadata):
            there = checkpoints.metadata()
            if there != json.loads(json.dumps(metadata)):
                raise CheckpointError(
                    f"{checkpoints.folder}: holds a tree with metadata {there}, not {metadata}; "
                    "use another workdir, or delete this folder if no run needs it"
                )
        del tree  # or the arrays would stay until the writing has ended
        yield


def load_tree(folder: str | os.PathLike, abstract: Any) -> Any:
    """The pytree of `save_tree`, laid out and cast as `abstract` (`jax.ShapeDtypeStruct`s) says.

    Raises:
      CheckpointError: nothing complete is there, or its tree is not that of `abstract`.
    """
    path = _path_of_step(os.path.abspath(folder), None)
    _require_same_tree(path, _described(path).metadata, abstract)
    with _explained(f"cannot read {path}"):
        return ocp.load(path, _placed(abstract))


def load_params(
    folder: str | os.PathLike, abstract_params: Any, step: int | None = None, *, within: str = ""
) -> Any:
    """Only the `params` of a state in the checkpoints of `folder`; the rest is not read.

    For an export, and for the next stage, which starts a new optimiser.

    Args:
      within: the field of the saved tree that is the state; "" is the whole of it.

    Raises:
      CheckpointError: no such checkpoint, or its parameters are not those of `abstract_params`.
    """
    path = _path_of_step(os.path.abspath(folder), step)
    saved = _described(path).metadata
    wrap = (lambda tree: {within: tree}) if within else (lambda tree: tree)
    state = saved.get(within) if within and isinstance(saved, dict) else saved
    if not isinstance(state, dict) or "params" not in state:
        missing = f"{within}.params" if within else "params"
        raise CheckpointError(f"{path}: the saved state has no field `{missing}`")
    _require_same_tree(path, {"params": state["params"]}, {"params": abstract_params})
    context = ocp.Context()
    context.pytree.loading.partial_load = True
    with _explained(f"cannot read the parameters in {path}"), context:
        found = ocp.load(path, wrap({"params": _placed(abstract_params)}))
    return (found[within] if within else found)["params"]


def _placed(abstract: Any) -> Any:
    """`abstract`, where an array without a sharding goes to this process's first device."""
    default = SingleDeviceSharding(jax.local_devices()[0])

    def one(leaf):
        sharding = default if leaf.sharding is None else leaf.sharding
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)

    return jax.tree.map(one, abstract)


def _described_by(metadata: dict, data: Any) -> dict:
    """The metadata to write, with the iterator's position.

    All processes read the whole order of batches, so there is one position, whatever their number.
    """
    return dict(metadata) if data is None else metadata | {POSITION: data.get_state()}


def _complete_steps(folder: str) -> list[int]:
    if not os.path.isdir(folder):
        return []
    return sorted(found.step for found in ocp.path.step.standard_name_format().find_all(folder))


def _path_of_step(folder: str, step: int | None) -> str:
    """The folder of a complete checkpoint, of the newest where `step` is None."""
    steps = _complete_steps(folder)
    if not steps or step not in (None, *steps):
        raise CheckpointError(
            f"{folder}: no complete checkpoint{'' if step is None else f' of step {step}'}; "
            f"complete steps: {steps or 'none'}"
        )
    return f"{folder}/{steps[-1] if step is None else step}"


def _described(path: str) -> ocp.CheckpointMetadata:
    """Orbax's record of a checkpoint: `.metadata` (its tree of shapes), `.custom_metadata`."""
    with _explained(f"cannot read the checkpoint {path}"):
        return ocp.metadata(path, "state")


@contextlib.contextmanager
def _explained(what: str, recover: Callable[[], None] | None = None):
    """Turns whatever Orbax raises into a CheckpointError that says what was being done."""
    try:
        yield
    except Exception as error:
        if recover is not None:
            recover()
        cause = error
        while cause.__cause__ is not None:  # Orbax wraps what happened in "incompatible handler"
            cause = cause.__cause__
        raise CheckpointError(f"{what}: {type(cause).__name__}: {cause}") from error


def _stored_shape(leaf) -> tuple[int, ...]:
    """The shape on disk: a typed PRNG key is stored as its uint32 words."""
    if jax.dtypes.issubdtype(leaf.dtype, jax.dtypes.prng_key):
        return jax.eval_shape(jax.random.key_data, leaf).shape
    return tuple(leaf.shape)


def _require_same_tree(path: str, saved: Any, wanted: Any) -> None:
    saved, wanted = (
        {path_of(keys): _stored_shape(leaf) for keys, leaf in jax.tree.leaves_with_path(tree)}
        for tree in (saved, wanted)
    )
    differences = [
        f"{name}: {saved.get(name, 'absent')} in the checkpoint, {wanted.get(name, 'absent')} asked"
        for name in sorted(saved.keys() | wanted.keys())
        if saved.get(name) != wanted.get(name)
    ]
    if differences:
        shown = "\n  ".join(differences[:SHOWN_DIFFERENCES])
        more = len(differences) - SHOWN_DIFFERENCES
        raise CheckpointError(
            f"{path}: written with another config, {len(differences)} arrays differ:\n  {shown}"
            + (f"\n  and {more} more" if more > 0 else "")
            + "\nUse the config that wrote it, or another workdir."
        )


def _require_space(folder: str, tree: Any) -> None:
    """Raises unless `folder` has room for every array of `tree` (all processes write to it)."""
    needed = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))
    needed = int(needed * SPACE_MARGIN)
    free = shutil.disk_usage(folder).free
    if jax.process_count() > 1:  # agree, or the others would wait for a process that has raised
        free = int(multihost_utils.process_allgather(np.float32(free)).min())
    if free < needed:
        raise CheckpointError(
            f"{folder}: {needed:,} bytes are needed for a checkpoint, {free:,} are free; free some "
            "space or set another workdir, and start the same command again: it resumes"
        )
