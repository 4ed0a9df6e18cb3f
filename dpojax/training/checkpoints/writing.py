"""A checkpoint on its way to the disk: Orbax writes, then the manifest makes it complete.

Locally all of it happens in the hidden folder `.STEP.unfinished`, which gets its name at the end. A
bucket has no rename: there the manifest is what makes a checkpoint out of files.
"""

from __future__ import annotations

import json
import re
import time
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils
from orbax.checkpoint import v1 as ocp

from dpojax import sharding, storage
from dpojax.training.checkpoints.arrays import STATE
from dpojax.training.checkpoints.errors import CheckpointError, cause_of
from dpojax.training.checkpoints.manifest import Manifest, write_manifest
from dpojax.training.checkpoints.steps import UNFINISHED

SPACE_MARGIN = 1.05  # disk space per byte of the arrays: indices and metadata need some too
OTHERS_SECONDS = 600.0  # how long the first process waits for the checksums of the others
POLL_SECONDS = 0.2
_OWNER = re.compile(r"process_(\d+)(/|$)")  # in the names of files that one process writes alone


def begin_writing(folder: storage.Path, step: int, state: Any) -> Callable[[], None]:
    """Start to write the arrays of a checkpoint; every process makes this call.

    Returns:
      a function that waits until Orbax has written.
    """
    parent = _place(folder, step).parent
    if storage.is_local(folder):
        sharding.on_first_process(_make_empty, parent)
    context = ocp.Context()
    # A folder that cannot be made is an error here. In Orbax's thread others would wait for it.
    context.async_options.create_directories_asynchronously = False
    with context:
        return ocp.save_checkpointables_async(_place(folder, step), {STATE: state}).result


def complete(
    folder: storage.Path, step: int, written: Callable[[], None], record: Manifest
) -> None:
    """Wait until Orbax has written, add the manifest and give the checkpoint its name.

    Each process reads the files that it has written, and the first one does the rest.
    """
    place, error = _place(folder, step), None
    try:
        written()
        checksums = _own_checksums(place)
    except Exception as raised:
        checksums, error = {}, raised
    if jax.process_index() != 0 and storage.is_local(folder):
        _hand_in(place.parent, checksums, error)
    if error is not None:
        raise error
    if jax.process_index() == 0:
        if storage.is_local(folder):
            for process in range(1, jax.process_count()):
                checksums |= _handed_in(place.parent, process)
        write_manifest(place, record._replace(files=checksums))
        if storage.is_local(folder):
            storage.move_folder(place, folder / str(step))
            storage.remove_folder(place.parent)


def remove_unfinished(folder: storage.Path, step: int) -> None:
    """Remove what a save that failed has written."""
    storage.remove_folder(
        _place(folder, step).parent if storage.is_local(folder) else folder / str(step)
    )


def require_space(folder: storage.Path, tree: Any) -> None:
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


def _place(folder: storage.Path, step: int) -> storage.Path:
    """Where a checkpoint is written."""
    if not storage.is_local(folder):
        return folder / str(step)
    return folder / f".{step}{UNFINISHED}" / str(step)


def _make_empty(folder: storage.Path) -> None:
    storage.remove_folder(folder)
    folder.mkdir(parents=True)


def _own_checksums(place: storage.Path) -> dict[str, storage.Checksum]:
    """The checksums of the files that this process wrote; on a bucket the first one has all."""
    names = storage.file_sizes(place)
    if storage.is_local(place):
        names = [name for name in names if _owner(name) == jax.process_index()]
    elif jax.process_index() != 0:
        names = []
    return storage.checksums_of(place, names)


def _owner(name: str) -> int:
    match = _OWNER.search(name)
    return int(match[1]) % jax.process_count() if match else 0


def _hand_in(folder: storage.Path, checksums: dict, error: Exception | None) -> None:
    """Give the first process the checksums of this one's files, or say that there are none."""
    content = {"error": "" if error is None else cause_of(error), "files": checksums}
    storage.write_json(folder / f"checksums.{jax.process_index()}.json", content)


def _handed_in(folder: storage.Path, process: int) -> dict[str, storage.Checksum]:
    path, deadline = folder / f"checksums.{process}.json", time.monotonic() + OTHERS_SECONDS
    while not path.exists():
        if time.monotonic() > deadline:
            raise TimeoutError(f"process {process} has not written its part")
        time.sleep(POLL_SECONDS)
    content = json.loads(path.read_text())
    if content["error"]:
        raise RuntimeError(f"process {process}: {content['error']}")
    return {name: storage.Checksum(*pair) for name, pair in content["files"].items()}
