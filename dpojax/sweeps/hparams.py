"""The tab HParams of TensorBoard: the keys that members change, with the metrics of each.

    tensorboard --logdir=runs/sweep

shows the members' curves and this table.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from dpojax import storage
from dpojax.sweeps.members import Changes
from dpojax.sweeps.seeds import Evaluations
from dpojax.training.metrics import RESERVED
from dpojax.training.trackers.tensorboard import open_events

FOLDER = "hparams"  # of the sweep's workdir


def write_hparams(
    folder: storage.Path, members: Mapping[str, Changes], evaluations: Evaluations
) -> None:
    """Write, anew, the keys and metrics of members into folder/hparams.

    Args:
      members: the changes of each.
      evaluations: those that are kept, of the members that are finished. The others have no metric.
    """
    from tensorboardX.summary import hparams

    storage.remove_folder(folder / FOLDER)
    keys = list(dict.fromkeys(key for changes in members.values() for key in changes))
    names = {name for line in evaluations.values() for name in line} - set(RESERVED)
    for member, changes in members.items():
        line = evaluations.get(member, {})
        values = {f"eval/{name}": line[name] for name in sorted(names) if _is_finite(line, name)}
        hparam_values = {key: _as_hparam(changes.get(key)) for key in keys}
        writer = open_events(folder / FOLDER / member)
        try:
            for summary in hparams(hparam_values, values):
                writer.file_writer.add_summary(summary)
            for name, value in values.items():
                writer.add_scalar(name, value, int(line["step"]))
        finally:
            writer.close()


def _is_finite(line: Mapping[str, float], name: str) -> bool:
    return math.isfinite(line.get(name, math.nan))


def _as_hparam(value: Any) -> str | float | bool:
    """A value as the tab takes it."""
    if isinstance(value, Sequence) and not isinstance(value, str):
        return ",".join(map(str, value))
    return "" if value is None else value
