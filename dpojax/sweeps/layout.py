"""How members that train together lie on the devices, and what is kept of that while they do."""

from __future__ import annotations

import json
import pathlib
from collections.abc import Sequence
from typing import NamedTuple

from jax.sharding import Mesh

from dpojax import sharding
from dpojax.config.checks import ConfigError
from dpojax.runs.workdirs import digest
from dpojax.stages.stage import Stage

LANES = "lanes.json"  # in the folder of a group


class Layout(NamedTuple):
    """How members lie on devices."""

    axis: int
    vmapped: int  # on each place of the axis in one call
    at_once: int


def folder_of(workdirs: Sequence[pathlib.Path], folder: pathlib.Path) -> pathlib.Path:
    """Where the checkpoints of runs that train together are, while they do."""
    return folder / digest([workdir.name for workdir in workdirs])


def begun(folder: pathlib.Path) -> Layout | None:
    """How the lanes of the checkpoints in a group's folder lie; None where there are none yet."""
    found = Layout(0, 0, 0)
    if (folder / LANES).exists() and any(path.name.isdigit() for path in folder.glob("*/*")):
        kept = json.loads((folder / LANES).read_text())
        found = Layout(*(kept.get(name, 0) for name in Layout._fields))
    found = Layout(*map(sharding.agreed, found))
    return found if found.axis else None


def mesh_of(every: Sequence[Stage], begun: Layout | None, folder: pathlib.Path) -> Mesh:
    """The mesh with an axis for lanes: as they were begun, else config.sweep.axis, or the largest
    that members fill.

    Raises:
      ConfigError: an axis that does not divide the mesh.
    """
    asked, mesh = every[0].setup.config.sweep, every[0].setup.mesh
    members = min(len(every), asked.at_once or len(every))
    data = mesh.shape["data"]
    largest = max(n for n in range(1, min(data, members) + 1) if data % n == 0)
    axis = begun.axis if begun else asked.axis or largest
    try:
        return sharding.sweep_mesh(mesh, axis)
    except ValueError as error:
        if begun is None:
            raise ConfigError(f"config.sweep.axis: {error}") from error
        raise ConfigError(
            f"{folder} holds checkpoints of members on a sweep axis of {axis}, which does not "
            f"divide the mesh's data axis of {data}: go on with as many devices as before, or "
            "delete that folder to train these members from the start"
        ) from error
