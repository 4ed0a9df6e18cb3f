"""The checkpoints of one run: saved in the background, removed when they are old, restored."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import jax

from dpojax import sharding, storage
from dpojax.training.checkpoints import steps, writing
from dpojax.training.checkpoints.arrays import read_state
from dpojax.training.checkpoints.errors import CheckpointError, explained
from dpojax.training.checkpoints.manifest import Manifest
from dpojax.training.checkpoints.steps import Best

Scores = dict[int, float | None]  # of the complete checkpoints, by step


class Checkpoints:
    """The checkpoints of one run, in `folder/<step>`. Old ones are removed, the best one stays.

    Use it as a context manager: on exit it waits for the save that is in progress.

    With several processes, every process makes every call, and all of them see the same `folder`.

    Opening a folder removes what a killed process left incomplete and checkpoints that a newer one
    has made old, so only one run may have it open. It reads the newest checkpoint and the best one,
    and compares each file with its checksum. A checkpoint that is damaged is passed over with a
    warning, and set aside as `STEP.damaged` until a newer one is complete; it is removed where that
    is so already.

    Args:
      folder: a local folder or one on `gs://`. Orbax cannot write to `s3://`.
      max_checkpoints: how many of the newest checkpoints are kept, 1 or more.
      replace_damaged: whoever opens the folder can write damaged checkpoints again, so that it is
        no error if all of them are damaged.

    Raises:
      ValueError: `max_checkpoints` is below 1.
      CheckpointError: `folder` is on `s3://`; or it holds checkpoints, and all are damaged.
    """

    def __init__(
        self,
        folder: storage.PathLike,
        *,
        max_checkpoints: int = 2,
        replace_damaged: bool = False,
    ):
        if max_checkpoints < 1:
            raise ValueError(f"{folder}: max_checkpoints must be at least 1, got {max_checkpoints}")
        if str(folder).startswith("s3://"):
            raise CheckpointError(f"{folder}: Orbax writes to local folders and gs:// only")
        self.folder = storage.as_path(folder)
        complete = steps.open_steps(self.folder, replace_damaged=replace_damaged).complete
        scores = {step: manifest.score for step, manifest in complete.items()}
        self._max_checkpoints = max_checkpoints
        # Old ones are there where a save was killed once its checkpoint was complete.
        self._scores, removed = _newest_and_best(scores, max_checkpoints)
        sharding.on_first_process(steps.remove_steps, self.folder, removed)
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
        # Of the save that nobody has waited for: its step, and what is on disk once it is complete.
        self._in_flight: tuple[int, Scores, Future] | None = None

    def __enter__(self) -> Checkpoints:
        return self

    def __exit__(self, kind, error, traceback) -> None:
        if error is None:
            self.close()
            return
        try:
            self._finish_write(together=False)  # other processes may not be here
        except CheckpointError as failed:
            error.add_note(str(failed))  # the error that stopped the run matters more
        self._thread.shutdown()

    @property
    def latest(self) -> int | None:
        """The newest complete step, or None. Waits for the save in progress."""
        self.wait()
        return max(self._scores, default=None)

    @property
    def best(self) -> Best | None:
        """The complete checkpoint with the highest score, or None. Waits for the save."""
        self.wait()
        return steps.best_of(self._scores)

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
            older than the newest on disk; the folder was deleted. Complete checkpoints are
            untouched.
        """
        latest = self.latest
        if latest is not None and step <= latest:
            if step in self._scores:
                return False
            raise CheckpointError(
                f"{self.folder}: cannot save step {step} after step {latest}; resume from the "
                "newest checkpoint, or start in an empty workdir"
            )
        if latest is not None and not sharding.agreed(self.folder.exists()):
            raise CheckpointError(f"{self.folder}: was deleted while the run went on; it ends here")
        writing.require_space(self.folder, state)
        # Every process reads all batches in the same order, so one position serves all of them.
        position = None if data is None else data.get_state()
        score = None if score is None else float(score)
        record = Manifest(dict(metadata), position, score, {})
        try:
            with explained(f"cannot write the checkpoint {self.folder}/{step}"):
                written = writing.begin_writing(self.folder, step, state)
        except CheckpointError:
            self._remove_unfinished(step)
            raise
        scores = self._scores | {step: score}
        remaining, removed = _newest_and_best(scores, self._max_checkpoints)
        future = self._thread.submit(_write, self.folder, step, written, record, removed)
        self._in_flight = (step, remaining, future)
        return True

    def wait(self) -> None:
        """Block until the save in progress is complete on disk.

        Raises:
          CheckpointError: it failed. Earlier checkpoints are complete and still there.
        """
        self._finish_write(together=True)

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
          CheckpointError: no such checkpoint, or it is damaged, or its arrays differ from those of
            `abstract_state`, or `data` has no such position.
        """
        self.wait()
        path, manifest = steps.whole_checkpoint(self.folder, step)
        state = read_state(path, abstract_state)
        if data is not None:
            if manifest.position is None:
                raise CheckpointError(f"{path}: holds no position in the data")
            with explained(f"{path}: the data cannot go on where they were"):
                data.set_state(manifest.position)
        return state, manifest.metadata

    def metadata(self, step: int | None = None) -> dict:
        """Return the metadata of a step (the newest by default) without reading arrays."""
        self.wait()
        return steps.metadata_of(self.folder, step)

    def close(self) -> None:
        """Wait for the save in progress and end the thread. Raises as `wait` does."""
        try:
            self.wait()
        finally:
            self._thread.shutdown()

    def _finish_write(self, *, together: bool) -> None:
        """Wait for this process's part of the save in progress, and the others' if `together`."""
        if self._in_flight is None:
            return
        (step, remaining, future), self._in_flight = self._in_flight, None
        error = None
        try:
            with explained(f"cannot write the checkpoint {self.folder}/{step}"):
                future.result()
        except CheckpointError as raised:
            error = raised
        failed = sharding.any_process(error is not None) if together else error is not None
        if failed:
            self._remove_unfinished(step)
        if error is not None:
            raise error
        if failed:
            raise CheckpointError(
                f"cannot write the checkpoint {self.folder}/{step}: another process failed"
            )
        self._scores = remaining

    def _remove_unfinished(self, step: int) -> None:
        if jax.process_index() == 0:
            with contextlib.suppress(OSError):
                writing.remove_unfinished(self.folder, step)


def _newest_and_best(scores: Scores, max_checkpoints: int) -> tuple[Scores, list[int]]:
    """The checkpoints that stay on disk, the newest ones and the best one; the steps of others."""
    best = steps.best_of(scores)
    remaining = {*sorted(scores)[-max_checkpoints:]} | ({best.step} if best else set())
    return {step: scores[step] for step in remaining}, sorted(scores.keys() - remaining)


def _write(
    folder: storage.Path,
    step: int,
    written: Callable[[], None],
    record: Manifest,
    removed: Sequence[int],
) -> None:
    """Complete a checkpoint, then let the first process remove older ones."""
    writing.complete(folder, step, written, record)
    if jax.process_index() == 0:
        steps.remove_steps(folder, removed)
        steps.remove_set_aside(folder)
