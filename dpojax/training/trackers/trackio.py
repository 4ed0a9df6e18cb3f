"""Trackio: a run for each stage in a local database; members of a sweep share a group.

Its own environment variables say where it goes: TRACKIO_PROJECT (default: dpojax), TRACKIO_DIR,
TRACKIO_SPACE_ID. `trackio show --project=dpojax` shows it.
"""

from __future__ import annotations

import contextlib
import io
import math
import os
from collections.abc import Mapping

from dpojax.training.trackers.tracker import TrackedRun

PROJECT = "dpojax"


class Trackio:
    """Logs SPLIT/METRIC. A stage that is resumed goes on in the same run."""

    def __init__(self, run: TrackedRun):
        import trackio

        goes_on = run.resume_step is not None and run.resume_step >= 0
        with contextlib.redirect_stdout(io.StringIO()):  # it would print five lines
            self._run = trackio.init(
                project=os.environ.get("TRACKIO_PROJECT", PROJECT),
                name=f"{run.group}/{run.name}",
                group=run.group,
                config=dict(run.config),
                resume="allow" if goes_on else "never",
                auto_log_gpu=False,
                auto_log_cpu=False,
                embed=False,
            )
        with contextlib.suppress(AttributeError):
            trackio.context_vars.current_run.set(None)  # else it finishes the run again at exit

    def write(self, step: int, split: str, values: Mapping[str, float]) -> None:
        finite = {f"{split}/{name}": x for name, x in values.items() if math.isfinite(x)}
        self._run.log(finite, step=step)

    def close(self) -> None:
        with contextlib.redirect_stdout(io.StringIO()):
            self._run.finish()


def open_trackio(run: TrackedRun) -> Trackio:
    return Trackio(run)
