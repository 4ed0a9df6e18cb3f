"""Weights & Biases: a run for each stage; members of a sweep share a group.

Its own environment variables say where it goes: WANDB_PROJECT (default: dpojax), WANDB_ENTITY,
WANDB_MODE=offline. Files go into the folder `wandb` of the stage, or into WANDB_DIR.
"""

from __future__ import annotations

import math
import os
import secrets
from collections.abc import Mapping

from dpojax import storage
from dpojax.training.trackers.tracker import TrackedRun

PROJECT = "dpojax"
ID_FILE = "wandb_id.txt"  # of the stage's folder


class WeightsAndBiases:
    """Logs SPLIT/METRIC over `step`. A stage that is resumed goes on in the same run."""

    def __init__(self, run: TrackedRun):
        import wandb

        folder = str(run.folder) if storage.is_local(run.folder) else None
        self._run = wandb.init(
            project=os.environ.get("WANDB_PROJECT", PROJECT),
            id=_run_id(run.folder),
            name=run.name,
            group=run.group,
            config=dict(run.config),
            dir=os.environ.get("WANDB_DIR") or folder,
            resume="allow",
            reinit="create_new",  # members of a sweep are open at the same time
            settings=wandb.Settings(silent=True, console="off", x_disable_stats=True),
        )
        # W&B's own step may not go back, as ours does when a run is resumed.
        self._run.define_metric("step", hidden=True)
        self._run.define_metric("*", step_metric="step")

    def write(self, step: int, split: str, values: Mapping[str, float]) -> None:
        finite = {f"{split}/{name}": x for name, x in values.items() if math.isfinite(x)}
        self._run.log({"step": step, **finite})

    def close(self) -> None:
        self._run.finish()


def _run_id(folder: storage.Path) -> str:
    """The id of a stage's run, made when the stage is first tracked.

    It stands in a file: an id made of the path would continue the run of a deleted workdir, or that
    of another machine with the same paths.
    """
    path = folder / ID_FILE
    if not path.is_file():
        storage.write_text(path, secrets.token_hex(8))
    return storage.read_text(path)


def open_wandb(run: TrackedRun) -> WeightsAndBiases:
    return WeightsAndBiases(run)
