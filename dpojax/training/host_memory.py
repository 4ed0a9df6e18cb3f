"""How much memory a host has available: in all, and for this process's container or job."""

from __future__ import annotations

import math
import pathlib
from typing import NamedTuple

PROC, CGROUPS = pathlib.Path("/proc"), pathlib.Path("/sys/fs/cgroup")


class _Files(NamedTuple):
    """Names of a control group's files (Linux, admin-guide/cgroup-v2 and cgroup-v1/memory)."""

    limit: str
    used: str
    cached: tuple[str, str]  # in memory.stat: file pages that are dropped when memory is needed


VERSION_2 = _Files("memory.max", "memory.current", ("active_file", "inactive_file"))
VERSION_1 = _Files(
    "memory.limit_in_bytes", "memory.usage_in_bytes", ("total_active_file", "total_inactive_file")
)


def available() -> float:
    """Bytes that are available without swapping; infinite where the system does not say."""
    of_host = 1024 * _numbers(PROC / "meminfo").get("MemAvailable:", math.inf)
    return min([of_host, *(_of_group(*group) for group in _groups())])


def _groups() -> list[tuple[pathlib.Path, _Files]]:
    """The control groups of this process: its own, and all groups around it."""
    groups = []
    for line in _lines(PROC / "self" / "cgroup"):
        number, controllers, name = line.split(":", 2)
        if number == "0":
            root, files = CGROUPS, VERSION_2
        elif "memory" in controllers.split(","):
            root, files = CGROUPS / "memory", VERSION_1
        else:
            continue
        group = root / name.strip("/")
        folders = [group, *group.parents]
        groups += [(folder, files) for folder in folders if folder.is_relative_to(root)]
    return groups


def _of_group(folder: pathlib.Path, files: _Files) -> float:
    """Bytes that a control group has left; infinite without a limit."""
    limit, used = _lines(folder / files.limit), _lines(folder / files.used)
    if not limit or not used or limit[0] == "max":
        return math.inf
    stat = _numbers(folder / "memory.stat")
    cached = sum(stat.get(name, 0) for name in files.cached)
    return int(limit[0]) - int(used[0]) + cached


def _numbers(path: pathlib.Path) -> dict[str, int]:
    """Read lines that begin with a name and a number."""
    words = map(str.split, _lines(path))
    return {name: int(number) for name, number, *_ in words}


def _lines(path: pathlib.Path) -> list[str]:
    return path.read_text().splitlines() if path.exists() else []
