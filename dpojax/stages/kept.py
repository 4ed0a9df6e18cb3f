"""Which checkpoint of a stage is its result, as config.NAME.keep_best says."""

from __future__ import annotations

from ml_collections import ConfigDict

from dpojax import storage
from dpojax.training import checkpoints, keep_best
from dpojax.training.checkpoints import Checkpoints
from dpojax.training.keep_best import KEEP_BEST, KeepBest


def new_keep_best(config: ConfigDict) -> KeepBest | None:
    """What follows the metric of a stage's `keep_best`; None where the last step is kept."""
    return keep_best.parse(config.keep_best, config.patience)


def kept_best(config: ConfigDict, checkpoint_folder: storage.Path) -> KeepBest | None:
    """`new_keep_best` as the newest checkpoint of the stage has it."""
    followed = new_keep_best(config)
    if followed is not None:
        followed.restore(checkpoints.metadata_of(checkpoint_folder))
    return followed


def has_ended(saved: Checkpoints, steps: int) -> bool:
    """Whether the newest checkpoint is that of the last of `steps`, or of an early stop."""
    latest = saved.latest
    if latest is None or latest == steps:
        return latest is not None
    return (saved.metadata(latest).get(KEEP_BEST) or {}).get("stopped_at") == latest
