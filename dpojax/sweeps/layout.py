"""How members that train together lie on the devices; that stays so while they train."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from jax.sharding import Mesh

from dpojax import sharding, storage
from dpojax.config.errors import ConfigError
from dpojax.runs.workdirs import short_hash
from dpojax.stages.setup import Setup

LAYOUT = "layout.json"  # in the folder of a group


class Layout(NamedTuple):
    """How members lie on devices.

    Attributes:
      axis: devices, or groups of devices, that members are spread over.
      vmapped: members on each place of the axis in one call of the step.
      at_once: members that are trained at once, in one call or several.
    """

    axis: int
    vmapped: int
    at_once: int


def group_folder(workdirs: Sequence[storage.Path], folder: storage.Path) -> storage.Path:
    """Where the checkpoints of runs that train together are, while they do."""
    return folder / short_hash([workdir.name for workdir in workdirs])


def begun_layout(folder: storage.Path) -> Layout | None:
    """The layout of the checkpoints in a group's folder; what the first process sees.

    None where there are no checkpoints yet.
    """
    layout = Layout(*map(sharding.agreed, read_layout(folder) or Layout(0, 0, 0)))
    return layout if layout.axis else None


def read_layout(folder: storage.Path) -> Layout | None:
    """`begun_layout`, as this process sees it."""
    path = folder / LAYOUT
    if not path.exists() or not any(step.name.isdigit() for step in folder.glob("*/*")):
        return None
    hint = f"delete {folder} to begin these members again"
    content = storage.read_json(path, hint, fields=dict.fromkeys(Layout._fields, int))
    return Layout(*(content[name] for name in Layout._fields))


def mesh_with_members(
    setup: Setup, members: int, begun: Layout | None, folder: storage.Path
) -> Mesh:
    """The mesh with an axis for members.

    It is as long as it was when the members began, else config.sweep.axis, or the longest that the
    members fill.

    Args:
      begun: of members that have begun.
      folder: of the group, for the message.

    Raises:
      ConfigError: an axis that does not divide the mesh.
    """
    settings, mesh = setup.config.sweep, setup.mesh
    at_once = min(members, settings.at_once or members)
    data = mesh.shape["data"]
    axis = begun.axis if begun else settings.axis or sharding.longest_sweep_axis(data, at_once)
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
