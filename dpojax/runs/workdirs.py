"""What runs leave in their workdirs for each other: how they ended, and stages that they share."""

from __future__ import annotations

import hashlib
import os
import pathlib
import shutil
from collections.abc import Sequence

import jax

from dpojax import sharding
from dpojax.runs.run import FINISHED

FAILED = "failed.txt"  # in the workdir of a run that failed while others went on


def ended(workdir: pathlib.Path) -> bool:
    """Whether the run there is finished, or has failed; what the first process sees."""
    return sharding.agreed((workdir / FINISHED).exists() or (workdir / FAILED).exists())


def failure_of(workdir: pathlib.Path) -> str:
    """Why the run in a workdir failed while others went on; "" if it did not."""
    path = workdir / FAILED
    return path.read_text().strip() if path.exists() else ""


def say_failed(workdir: pathlib.Path, why: str) -> None:
    """Keep why a run failed; it is not tried again as long as that is there."""
    if jax.process_index() == 0:
        unfinished = workdir / f"{FAILED}.unfinished"
        unfinished.write_text(why + "\n")
        os.replace(unfinished, workdir / FAILED)


def digest(names: Sequence[str]) -> str:
    """A short name of several runs."""
    return hashlib.sha256("\n".join(names).encode()).hexdigest()[:12]


def share(workdir: pathlib.Path, to: pathlib.Path, *, but: Sequence[str] = ()) -> None:
    """Give a run the folders of another one, such as the stages that both begin with."""
    for path in sorted(workdir.iterdir()):
        if path.is_dir() and path.name not in but:
            share_folder(path, to / path.name)


def share_folder(folder: pathlib.Path, to: pathlib.Path) -> None:
    """The same files under another name, if they are there and `to` is not: links, which cost no
    space and outlive either name, or copies where the file system has none."""
    if jax.process_index() == 0 and folder.is_dir() and not to.exists():
        unfinished = to.with_name(f".{to.name}.unfinished")
        shutil.rmtree(unfinished, ignore_errors=True)
        shutil.copytree(folder, unfinished, copy_function=_link)
        os.replace(unfinished, to)
    sharding.agreed(True)  # the others wait here until it is there


def _link(path: str, to: str) -> None:
    try:
        os.link(path, to)
    except OSError:
        shutil.copy2(path, to)
