"""Weights that a run keeps beside its checkpoints: the base of adapters, and the reference."""

from __future__ import annotations

import logging
from collections.abc import Callable

from dpojax import storage
from dpojax.training import checkpoints
from dpojax.training.reference import fingerprint

logger = logging.getLogger(__name__)

FINGERPRINT = "fingerprint"  # in the metadata of such weights


def mend(folder: storage.Path, make_again: Callable[[], dict]) -> None:
    """Write damaged weights again, if they can be made again with the hash that they had.

    Otherwise the folder stays as it is, and reading it says what to do. Every process calls this.

    Args:
      make_again: the weights, on the mesh; it is called for damaged ones alone.
    """
    metadata = checkpoints.damaged_tree(folder)
    if metadata is None:
        return
    weights = make_again()
    if fingerprint(weights) == metadata.get(FINGERPRINT):
        checkpoints.save_tree(folder, weights, metadata)
        logger.warning("%s was damaged: its weights are made again, with the same hash", folder)
