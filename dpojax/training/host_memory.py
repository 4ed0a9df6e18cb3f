"""How much memory a host has to give: to all, and to the container or job that a process is in."""

from __future__ import annotations

import math
import pathlib
from typing import NamedTuple

PROC, CGROUPS = pathlib.Path("/proc"), pathlib.Path("/sys/fs/cgroup")


class _Files(NamedTuple):
    """Where a control group's numbers stand (Linux, admin-guide/cgroup-v2 and cgroup-v1/memory)."""

    limit: str
    used: str
    cached: tuple[str, str]  # in memory.stat: files whose pages are dropped when others want them


VERSION_2 = _Files("memory.max", "memory.current", ("active_file", "inactive_file"))
VERSION_1 = _Files(
    "memory.limit_in_bytes", "memory.usage_in_bytes", ("total_active_file", "total_inactive_file")
)


def available() -> float:
    """Bytes that can be had without swapping; infinite where the system does not say."""
    of_host = 1024 * _numbers(PROC / "meminfo").get("MemAvailable:", math.inf)
    return min([of_host, *(_of_group(*group) for group in _groups())])


def _groups() -> list[tuple[pathlib.Path, _Files]]:
    """The control groups that this process is in: its own, and those that hold that."""
    found = []
    for line in _lines(PROC / "self" / "cgroup"):
        number, controllers, name = line.split(":", 2)
        if number == "0":
            root, files = CGROUPS, VERSION_2
        elif "memory" in controllers.split(","):
            root, files = CGROUPS / "memory", VERSION_1
        else:
            continue
        own = root / name.strip("/")
        found += [(folder, files) for folder in (own, *own.parents) if folder.is_relative_to(root)]
    return found


def _of_group(folder: pathlib.Path, files: _Files) -> float:
    limit, used = _lines(folder / files.limit), _lines(folder / files.used)
    if not limit or not used or limit[0] == "max":
        return math.inf
    found = _numbers(folder / "memory.stat")
    cached = sum(found.get(name, 0) for name in files.cached)
    return int(limit[0]) - int(used[0]) + cached


def _numbers(path: pathlib.Path) -> dict[str, int]:
    """name -> number, of lines that begin with these two."""
    words = map(str.split, _lines(path))
    return {name: int(number) for name, number, *_ in words}


def _lines(path: pathlib.Path) -> list[str]:
    return path.read_text().splitlines() if path.exists() else []
