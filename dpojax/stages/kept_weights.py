"""Weights that a run keeps beside its checkpoints: the base of adapters, and the reference."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping

from dpojax import storage
from dpojax.training import checkpoints
from dpojax.training.reference import fingerprint

logger = logging.getLogger(__name__)

FINGERPRINT = "fingerprint"  # in the metadata of such weights


def mend(kept: Mapping[storage.Path, Callable[[], dict]]) -> None:
    """Write damaged weights again, if they can be made again with the hash that they had.

    Otherwise their folder stays as it is, and reading it says what to do. Every process calls this.

    Args:
      kept: folder -> what makes its weights again, on the mesh; it is called for damaged ones
        alone. See `Stage.kept_weights`.
    """
    for folder, make_again in kept.items():
        metadata = checkpoints.damaged_tree(folder)
        if metadata is None:
            continue
        weights = make_again()
        if fingerprint(weights) == metadata.get(FINGERPRINT):
            checkpoints.save_tree(folder, weights, metadata)
            logger.warning("%s was damaged: its weights are made again, with the same hash", folder)
