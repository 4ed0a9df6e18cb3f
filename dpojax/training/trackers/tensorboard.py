"""TensorBoard: event files in the folder `tensorboard` of each stage.

`tensorboard --logdir=runs` shows them, and those of a sweep in its tab HParams.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

from dpojax import storage
from dpojax.training.trackers.tracker import TrackedRun

FOLDER = "tensorboard"


class TensorBoard:
    """Writes scalars called SPLIT/METRIC."""

    def __init__(self, folder: storage.Path, resume_step: int | None = None):
        purge_step = None if resume_step is None else resume_step + 1
        self._events = open_events(folder / FOLDER, purge_step)

    def write(self, step: int, split: str, values: Mapping[str, float]) -> None:
        for name, value in values.items():
            if math.isfinite(value):  # of others tensorboardX warns on the terminal
                self._events.add_scalar(f"{split}/{name}", value, step)

    def close(self) -> None:
        self._events.close()


def open_tensorboard(run: TrackedRun) -> TensorBoard:
    return TensorBoard(run.folder, run.resume_step)


def open_events(folder: storage.Path, purge_step: int | None = None):
    """Return a `SummaryWriter` of tensorboardX that writes to a local folder or to a bucket."""
    from tensorboardX import SummaryWriter, record_writer  # costs a second and a protobuf runtime

    for scheme in ("gs", "s3"):  # its own writers for buckets need packages that we do not
        record_writer.register_writer_factory(scheme, _BucketEvents)
    return SummaryWriter(str(folder), purge_step=purge_step)


class _BucketEvents:
    """An event file on a bucket, as tensorboardX opens one: each flush writes the whole object."""

    def __init__(self, path: str):
        self._path, self._content = path, bytearray()

    @classmethod
    def open(cls, path: str) -> _BucketEvents:
        return cls(path)

    @staticmethod
    def directory_check(path: str) -> None:
        """A bucket needs no folders."""

    def write(self, record: bytes) -> None:
        self._content += record

    def flush(self) -> None:
        storage.write_bytes(self._path, bytes(self._content))

    close = flush
