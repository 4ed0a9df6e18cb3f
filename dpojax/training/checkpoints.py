"""Asynchronous, sharded checkpoints on Orbax v1: a resumed run continues as if never stopped."""

from __future__ import annotations

import contextlib
import json
import logging
import os
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import SingleDeviceSharding
from orbax.checkpoint import v1 as ocp

from dpojax import storage
from dpojax.sharding import path_of

POSITION, SCORE = "data position", "score"  # keys that are added to a checkpoint's metadata
SPACE_MARGIN = 1.05  # disk space per byte of the arrays: indices and metadata need some too
SHOWN_DIFFERENCES = 8
ORBAX_RECORDS = ("_CHECKPOINT_METADATA", "state/_METADATA")  # files of every checkpoint


class Best(NamedTuple):
    """The step and score of a scored checkpoint."""

    score: float
    step: int


class CheckpointError(RuntimeError):
    """A checkpoint could not be written or read; the message names it and says what to do."""


def _only_problems_of_orbax(record: logging.LogRecord) -> bool:
    return record.levelno >= logging.WARNING or f"{os.sep}orbax{os.sep}" not in record.pathname


# Orbax shares absl's one logger with the user's program and writes dozens of INFO lines per save.
logging.getLogger("absl").addFilter(_only_problems_of_orbax)


class Checkpoints:
    """The checkpoints of one run, in `folder/<step>`. Old ones are removed, the best one stays.

    Use it as a context manager: on exit it waits for the save that is in progress.

    With several processes, every process makes every call, and all of them see the same `folder`.
    Opening a folder removes what a killed process left incomplete, so only one run may have it
    open.

    Args:
      folder: a local folder or one on `gs://`. Orbax cannot write to `s3://`.
      max_checkpoints: how many of the newest checkpoints are kept, 1 or more.

    Raises:
      ValueError: `max_checkpoints` is below 1.
      CheckpointError: `folder` is on `s3://`.
    """

    def __init__(self, folder: str | os.PathLike, *, max_checkpoints: int = 2):
        if max_checkpoints < 1:
            raise ValueError(f"{folder}: max_checkpoints must be at least 1, got {max_checkpoints}")
        if str(folder).startswith("s3://"):
            raise CheckpointError(f"{folder}: Orbax writes to local folders and gs:// only")
        self.folder = storage.as_path(folder)
        self._max_checkpoints = max_checkpoints
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
            error.add_note(str(failed))  # the error that stopped the run matters more

    @property
    def latest(self) -> int | None:
        """The newest complete step, or None. Waits for the save in progress."""
        self.wait()
        return max(_complete_steps(self.folder), default=None)

    @property
    def best(self) -> Best | None:
        """The complete checkpoint with the highest score, or None. Waits for the save."""
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
        """Start to write `state`; the writing continues after the return.

        The arrays of `state` may be donated as soon as this returns. Older checkpoints are removed
        only when this one is complete.

        Args:
          step: number of optimiser steps that made `state`; not below the newest on disk.
          state: any pytree of jax arrays; typed PRNG keys are allowed.
          data: a Grain iterator whose position is saved, or None. Every process must be at the same
            position.
          metadata: small JSON dict, returned by `restore`.
          score: higher is better. The checkpoint with the highest score is never removed; of equal
            scores the newest counts. A checkpoint without a score is never the best.

        Returns:
          False if `step` is already on disk; then nothing is written.

        Raises:
          CheckpointError: the previous save failed; there is too little disk space; `step` is
            older than the newest on disk. Complete checkpoints are untouched.
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
        path = self.folder / str(step)
        record, scores = _with_position(metadata, data), None
        if score is not None:
            scores = {SCORE: float(score)}
            record |= scores
        with _explained(f"cannot write the checkpoint {path}", self._reopen):
            response = self._orbax.save_checkpointables_async(
                step, {"state": state}, force=True, custom_metadata=record, metrics=scores
            )
        self._in_flight = (path, response)
        return True

    def wait(self) -> None:
        """Block until the save in progress is complete on disk.

        Raises:
          CheckpointError: it failed. Earlier checkpoints are complete and still there.
        """
        if self._in_flight is None:
            return
        (path, response), self._in_flight = self._in_flight, None
        with _explained(f"cannot write the checkpoint {path}", self._reopen):
            response.result()

    def restore(
        self, abstract_state: Any, data: Any = None, step: int | None = None
    ) -> tuple[Any, dict]:
        """Return the state of a step, bit for bit, and its metadata.

        Args:
          abstract_state: pytree of `jax.ShapeDtypeStruct`. Arrays are cast to its dtypes and placed
            on its shardings, which may belong to another mesh than the saved ones.
          data: a Grain iterator of the same pipeline; it is moved to the saved position.
          step: the step of a complete checkpoint; None is the newest.

        Raises:
          CheckpointError: no such checkpoint, or its arrays differ from those of `abstract_state`.
        """
        self.wait()
        path = _path_of_step(self.folder, step)
        record = _record(path)
        _require_same_tree(path, record.metadata, abstract_state)
        with _explained(f"cannot read the checkpoint {path}"):
            items = ocp.load_checkpointables(path, {"state": _placed(abstract_state)})
        metadata = dict(record.custom_metadata)
        position = metadata.pop(POSITION, None)
        metadata.pop(SCORE, None)
        if data is not None:
            if position is None:
                raise CheckpointError(f"{path}: holds no position in the data")
            data.set_state(position)
        return items["state"], metadata

    def metadata(self, step: int | None = None) -> dict:
        """Return the metadata of a step (the newest by default) without reading arrays."""
        self.wait()
        return metadata_of(self.folder, step)

    def close(self) -> None:
        """Wait for the save in progress and end Orbax's threads. Raises as `wait` does."""
        try:
            self.wait()
        finally:
            self._orbax.close()

    def _open(self) -> ocp.training.Checkpointer:
        policies = ocp.training.preservation_policies
        newest = policies.LatestN(self._max_checkpoints)
        best = policies.BestN(
            get_metric_fn=lambda metrics: metrics[SCORE],
            n=1,
            keep_checkpoints_without_metrics=False,
        )
        return ocp.training.Checkpointer(
            os.fspath(self.folder),
            preservation_policy=policies.AnyPreservationPolicy([newest, best]),
            cleanup_tmp_directories=True,
        )

    def _reopen(self) -> None:
        """Recover from a failed save: Orbax would raise again, and forgets older checkpoints."""
        with contextlib.suppress(Exception):
            self._orbax.close()
        self._orbax = self._open()


def best(folder: str | os.PathLike) -> Best | None:
    """Return the complete checkpoint with the highest score in a folder; None if none has one."""
    scored = []
    for step in _complete_steps(storage.as_path(folder)):
        metadata = _record(_path_of_step(folder, step)).custom_metadata
        if SCORE in metadata:
            scored.append(Best(metadata[SCORE], step))
    return max(scored, default=None)


def metadata_of(folder: str | os.PathLike, step: int | None = None) -> dict:
    """Return the metadata of a step (the newest by default) without reading arrays.

    Raises:
      CheckpointError: there is no such checkpoint.
    """
    metadata = _record(_path_of_step(folder, step)).custom_metadata
    return {name: value for name, value in metadata.items() if name not in (POSITION, SCORE)}


def save_tree(folder: str | os.PathLike, tree: Any, metadata: dict) -> None:
    """Write one pytree of arrays under `folder`. It is complete on return, or absent.

    A folder that already holds a complete tree with equal `metadata` is left as it is.

    Raises:
      CheckpointError: the folder holds a tree with other metadata, or the disk is too small.
    """
    with saving_tree(folder, tree, metadata):
        pass


@contextlib.contextmanager
def saving_tree(folder: str | os.PathLike, tree: Any, metadata: dict) -> Iterator[None]:
    """Do `save_tree` while the body runs. The tree is complete on exit, or absent.

    The arrays of `tree` may be donated in the body.

    Raises:
      CheckpointError: on entry as `save_tree` does; on exit if the write failed.
    """
    with Checkpoints(folder, max_checkpoints=1) as checkpoints:
        if not checkpoints.save(0, tree, metadata=metadata):
            there = checkpoints.metadata()
            if there != json.loads(json.dumps(metadata)):
                raise CheckpointError(
                    f"{checkpoints.folder}: holds a tree with metadata {there}, not {metadata}; "
                    "use another workdir, or delete this folder if no run needs it"
                )
        del tree  # this reference would keep the arrays in memory until the write ends
        yield


def load_tree(folder: str | os.PathLike, abstract: Any) -> Any:
    """Return the pytree that `save_tree` wrote, with the shardings and dtypes of `abstract`.

    Args:
      abstract: pytree of `jax.ShapeDtypeStruct`.

    Raises:
      CheckpointError: no complete tree is there, or its arrays differ from those of `abstract`.
    """
    path = _path_of_step(folder, None)
    _require_same_tree(path, _record(path).metadata, abstract)
    with _explained(f"cannot read {path}"):
        return ocp.load(path, _placed(abstract))


def load_params(
    folder: str | os.PathLike, abstract_params: Any, step: int | None = None, *, within: str = ""
) -> Any:
    """Return the `params` of a saved state; the optimiser's arrays are not read.

    An export uses this, and the next stage, which starts a new optimiser.

    Args:
      step: the step of a complete checkpoint; None is the newest.
      within: the field of the saved tree that holds the state; "" if the tree is the state.

    Raises:
      CheckpointError: no such checkpoint, or its parameters differ from `abstract_params`.
    """
    path = _path_of_step(folder, step)
    saved = _record(path).metadata
    state = saved.get(within) if within and isinstance(saved, dict) else saved
    if not isinstance(state, dict) or "params" not in state:
        missing = f"{within}.params" if within else "params"
        raise CheckpointError(f"{path}: the saved state has no field `{missing}`")
    _require_same_tree(path, {"params": state["params"]}, {"params": abstract_params})
    context = ocp.Context()
    context.pytree.loading.partial_load = True
    abstract_tree = {"params": _placed(abstract_params)}
    with _explained(f"cannot read the parameters in {path}"), context:
        if within:
            return ocp.load(path, {within: abstract_tree})[within]["params"]
        return ocp.load(path, abstract_tree)["params"]


def _placed(abstract: Any) -> Any:
    """Give arrays without a sharding this process's first device."""
    default = SingleDeviceSharding(jax.local_devices()[0])

    def one(leaf):
        sharding = default if leaf.sharding is None else leaf.sharding
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)

    return jax.tree.map(one, abstract)


def _with_position(metadata: dict, data: Any) -> dict:
    """Return the metadata with the data iterator's position.

    Every process reads all batches in the same order, so one position serves all processes.
    """
    return dict(metadata) if data is None else metadata | {POSITION: data.get_state()}


def _complete_steps(folder: storage.Path) -> list[int]:
    """Return the steps of the complete checkpoints, sorted.

    On a bucket neither a save nor a removal happens at once. Orbax marks a save as complete with a
    file that it writes last. A checkpoint that lacks Orbax's records was partly removed.
    """
    if not folder.is_dir():
        return []
    steps = [one.step for one in ocp.path.step.standard_name_format().find_all(os.fspath(folder))]
    if not storage.is_local(folder):
        steps = [
            step
            for step in steps
            if all((folder / str(step) / name).exists() for name in ORBAX_RECORDS)
        ]
    return sorted(steps)


def _path_of_step(folder: str | os.PathLike, step: int | None) -> str:
    """Return the folder of a complete checkpoint, the newest where `step` is None."""
    folder = storage.as_path(folder)
    steps = _complete_steps(folder)
    if not steps or step not in (None, *steps):
        raise CheckpointError(
            f"{folder}: no complete checkpoint{'' if step is None else f' of step {step}'}; "
            f"complete steps: {steps or 'none'}"
        )
    return f"{folder}/{steps[-1] if step is None else step}"


def _record(path: str) -> ocp.CheckpointMetadata:
    """Read Orbax's record of a checkpoint: `.metadata` (a tree of shapes), `.custom_metadata`."""
    with _explained(f"cannot read the checkpoint {path}"):
        return ocp.metadata(path, "state")


@contextlib.contextmanager
def _explained(what: str, recover: Callable[[], None] | None = None):
    """Turn any error of Orbax into a CheckpointError that says what failed."""
    try:
        yield
    except Exception as error:
        if recover is not None:
            recover()
        cause = error
        while cause.__cause__ is not None:  # Orbax wraps the cause in "incompatible handler"
            cause = cause.__cause__
        raise CheckpointError(f"{what}: {type(cause).__name__}: {cause}") from error


def _stored_shape(leaf) -> tuple[int, ...]:
    """Return the shape on disk: a typed PRNG key is stored as its uint32 words."""
    if jax.dtypes.issubdtype(leaf.dtype, jax.dtypes.prng_key):
        return jax.eval_shape(jax.random.key_data, leaf).shape
    return tuple(leaf.shape)


def _require_same_tree(path: str, saved: Any, expected: Any) -> None:
    """Raise unless both trees have arrays of the same names and shapes."""
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


def _require_space(folder: storage.Path, tree: Any) -> None:
    """Raise unless a local `folder` has room for every array of `tree`.

    All processes write to the same folder, so the whole tree counts.
    """
    needed = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))
    needed = int(needed * SPACE_MARGIN)
    free = storage.free_bytes(folder)
    if free is None:  # a bucket is never full
        return
    # Processes agree, because the others would wait forever for one that raises alone.
    if jax.process_count() > 1:
        free = int(multihost_utils.process_allgather(np.float32(free)).min())
    if free < needed:
        raise CheckpointError(
            f"{folder}: {needed:,} bytes are needed for a checkpoint, {free:,} are free; free some "
            "space or set another workdir, and start the same command again: it resumes"
        )
