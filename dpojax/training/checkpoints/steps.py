"""The folder of a run's checkpoints: which of them are whole, and what is left of others."""

from __future__ import annotations

import contextlib
import logging
import os
from collections.abc import Iterable
from typing import NamedTuple

from dpojax import sharding, storage
from dpojax.training.checkpoints.errors import CheckpointError, Damaged
from dpojax.training.checkpoints.manifest import (
    MANIFEST,
    Manifest,
    read_manifest,
    require_files,
    require_same_bytes,
)

UNFINISHED, DAMAGED, ORBAX = ".unfinished", ".damaged", ".orbax-checkpoint-tmp"

logger = logging.getLogger(__name__)


class Best(NamedTuple):
    """The step and score of a scored checkpoint."""

    score: float
    step: int


class Steps(NamedTuple):
    """The checkpoints in a folder: the manifests of those that are complete, by step.

    Attributes:
      complete: checkpoints whose files are all there.
      damaged: why others are not.
    """

    complete: dict[int, Manifest]
    damaged: dict[int, str]

    @property
    def latest(self) -> int | None:
        return max(self.complete, default=None)

    @property
    def best(self) -> Best | None:
        return best_of({step: manifest.score for step, manifest in self.complete.items()})


def best_of(scores: dict[int, float | None]) -> Best | None:
    """The highest score, and of equal ones the newest; None where no step has a score."""
    scored = (Best(score, step) for step, score in scores.items() if score is not None)
    return max(scored, default=None)


def find_steps(folder: storage.Path) -> Steps:
    """Look which checkpoints have all their files, without reading them.

    On a bucket a save and a removal take a while: a checkpoint without a manifest is neither
    complete nor damaged there.
    """
    complete, damaged, sizes = {}, {}, {}
    for name, size in storage.file_sizes(folder).items():
        step, _, file = name.partition("/")
        sizes.setdefault(step, {})[file] = size
    for name in {*sizes, *_local_names(folder)}:
        if not _is_step(name):
            continue
        files = sizes.get(name, {})
        if MANIFEST not in files and not storage.is_local(folder):
            continue
        try:
            manifest = read_manifest(f"{folder}/{name}")
            require_files(manifest, files)
            complete[int(name)] = manifest
        except Damaged as error:
            damaged[int(name)] = "it is empty" if not files else str(error)
    return Steps(complete, damaged)


def examine_steps(folder: storage.Path) -> Steps:
    """`find_steps`, and read every byte of the newest complete checkpoint and of the best one.

    One that is damaged is passed over, and the next one is read. Every process makes this call.
    """
    steps, read = find_steps(folder), set()
    while to_read := {steps.latest, steps.best and steps.best.step} - read - {None}:
        step = max(to_read)
        read.add(step)
        try:
            require_same_bytes(f"{folder}/{step}", steps.complete[step])
        except Damaged as error:
            steps.damaged[step] = str(error)
            del steps.complete[step]
    return steps


def whole_checkpoint(folder: storage.PathLike, step: int | None) -> tuple[str, Manifest]:
    """Path and manifest of a checkpoint, the newest where `step` is None; all bytes are read.

    Raises:
      CheckpointError: there is none, or it is damaged.
    """
    folder = storage.as_path(folder)
    steps = find_steps(folder)
    newest = max({*steps.complete, *steps.damaged}, default=None)
    step = newest if step is None else step
    try:
        if step in steps.damaged:
            raise Damaged(steps.damaged[step])
        if step not in steps.complete:
            raise CheckpointError(
                f"{folder}: no complete checkpoint{'' if step is None else f' of step {step}'}; "
                f"complete steps: {sorted(steps.complete) or 'none'}"
            )
        path = f"{folder}/{step}"
        require_same_bytes(path, steps.complete[step])
    except Damaged as error:
        others = sorted(steps.complete.keys() - {step})
        raise CheckpointError(
            f"{folder}/{step} is damaged: {error}; put its files back, "
            + (f"or use one of the steps {others}" if others else _begin_again(folder))
        ) from error
    return path, steps.complete[step]


def best(folder: storage.PathLike) -> Best | None:
    """Return the complete checkpoint with the highest score in a folder; None if none has one."""
    return find_steps(storage.as_path(folder)).best


def metadata_of(folder: storage.PathLike, step: int | None = None) -> dict:
    """Return the metadata of a step (the newest by default) without reading arrays.

    Raises:
      CheckpointError: there is no such checkpoint.
    """
    steps = find_steps(storage.as_path(folder))
    step = steps.latest if step is None else step
    if step not in steps.complete:
        return whole_checkpoint(folder, step)[1].metadata  # which says what is wrong
    return steps.complete[step].metadata


def open_steps(folder: storage.Path, *, replace_damaged: bool) -> Steps:
    """Clean a folder that is going to be written to, and return its whole checkpoints.

    What a killed save or removal left is removed. Damaged checkpoints are set aside as
    `STEP.damaged`, or removed where a newer one is whole. Every process makes this call.

    Args:
      replace_damaged: damaged checkpoints can be written again, so that none has to be left.

    Raises:
      CheckpointError: there are checkpoints, and all of them are damaged.
    """
    sharding.on_first_process(_remove_leftovers, folder)
    steps = examine_steps(folder)
    if steps.damaged and not steps.complete and not replace_damaged:
        reasons = "; ".join(f"{step}: {steps.damaged[step]}" for step in sorted(steps.damaged))
        raise CheckpointError(
            f"{folder}: no checkpoint can be read ({reasons}); put the files back, "
            + _begin_again(folder)
        )
    sharding.on_first_process(_set_aside_damaged, folder, steps)
    return steps


def remove_steps(folder: storage.Path, steps: Iterable[int]) -> None:
    """Remove checkpoints, see `remove_step`."""
    for step in steps:
        remove_step(folder, step)


def remove_step(folder: storage.Path, step: int) -> None:
    """Remove a checkpoint. One that is removed in part is not taken for complete.

    It stays, with a warning, where it cannot be removed: newer ones are complete.
    """
    path = folder / str(step)
    try:
        if not storage.is_local(folder):  # a bucket has no rename: without a manifest it is none
            with contextlib.suppress(FileNotFoundError):
                (path / MANIFEST).unlink()
        storage.remove_folder(path)
    except OSError as error:
        logger.warning("%s: cannot be removed (%s)", path, error)


def remove_set_aside(folder: storage.Path) -> None:
    """Remove damaged checkpoints that were set aside, once a newer one is complete."""
    for name in _local_names(folder):
        if name.endswith(DAMAGED) and _is_step(name.removesuffix(DAMAGED)):
            storage.remove_folder(folder / name)


def _set_aside_damaged(folder: storage.Path, steps: Steps) -> None:
    for step in sorted(steps.damaged):
        is_newest = steps.latest is None or step > steps.latest
        if storage.is_local(folder) and (is_newest or (folder / str(step)).is_file()):
            storage.remove_folder(folder / f"{step}{DAMAGED}")
            storage.move_folder(folder / str(step), folder / f"{step}{DAMAGED}")
            then = f"the folder is now {step}{DAMAGED}, until a newer checkpoint is complete"
        else:
            remove_step(folder, step)
            then = "the damaged one is removed"
        goes_on = "" if steps.latest is None else f"; step {steps.latest} is used instead"
        logger.warning(
            "%s/%s is damaged (%s)%s; %s", folder, step, steps.damaged[step], goes_on, then
        )


def _remove_leftovers(folder: storage.Path) -> None:
    """Remove what killed saves and removals left, and empty folders."""
    if not folder.exists():
        return
    for path in list(folder.iterdir()):
        name, is_folder = path.name, path.is_dir()
        if is_folder and ((name.startswith(".") and name.endswith(UNFINISHED)) or ORBAX in name):
            storage.remove_folder(path)
        elif is_folder and _is_step(name):
            files = storage.file_sizes(path)
            if not files or (MANIFEST not in files and not storage.is_local(folder)):
                storage.remove_folder(path)


def _local_names(folder: storage.Path) -> list[str]:
    """The names in a local folder, those of empty folders too."""
    if not storage.is_local(folder) or not folder.is_dir():
        return []
    return os.listdir(folder)


def _is_step(name: str) -> bool:
    return name.isascii() and name.isdigit() and name == str(int(name))


def _begin_again(folder: storage.Path) -> str:
    return f"or delete {folder.parent} to begin again what it holds"
