"""Asynchronous, sharded checkpoints on Orbax v1: a resumed run continues as if never stopped.

A checkpoint is a folder `STEP` with what Orbax writes and a manifest, which is written last: the
checksums of all files. A folder whose files are not those of its manifest is damaged. Whoever
opens the checkpoints of a run gets the newest that is whole.
"""

from dpojax.training.checkpoints.checkpoints import Checkpoints
from dpojax.training.checkpoints.errors import CheckpointError
from dpojax.training.checkpoints.steps import Best, best, metadata_of
from dpojax.training.checkpoints.trees import (
    damaged_tree,
    load_params,
    load_tree,
    save_tree,
    saving_tree,
)

__all__ = [
    "Best",
    "CheckpointError",
    "Checkpoints",
    "best",
    "damaged_tree",
    "load_params",
    "load_tree",
    "metadata_of",
    "save_tree",
    "saving_tree",
]
