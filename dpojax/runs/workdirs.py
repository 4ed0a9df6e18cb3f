"""What runs leave in their workdirs for each other: a lock, how they ended, shared stages."""

from __future__ import annotations

import contextlib
import hashlib
import os
from collections.abc import Iterator, Sequence

import jax

from dpojax import sharding, storage
from dpojax.config.errors import ConfigError
from dpojax.config.saved import FINISHED

FAILED = "failed.txt"  # in the workdir of a run that failed while others went on
LONGEST_NAME = 255  # bytes, on all usual file systems


@contextlib.contextmanager
def workdir_lock(workdir: storage.Path) -> Iterator[None]:
    """Keep a second run out of the workdir; the first process of this run holds the lock.

    What killed processes left unfinished there is removed.

    Raises:
      ConfigError: another run is at work there; it names its host and process.
    """
    with contextlib.ExitStack() as held:

        def lock() -> None:
            try:
                held.enter_context(storage.lock(workdir))
            except storage.Locked as error:
                raise ConfigError(str(error)) from error
            storage.remove_unfinished(workdir)

        sharding.on_first_process(lock)
        yield


def require_writable(workdir: storage.Path) -> None:
    """Refuse, before data are read, a workdir in which nothing can be written.

    Raises:
      ConfigError: it is a file, the root of the file system, or may not be written to.
    """
    if not storage.is_local(workdir):
        return
    if workdir == workdir.parent:
        raise ConfigError(f"--workdir={workdir}: the root of all files; name a folder of its own")
    if any(len(os.fsencode(part)) > LONGEST_NAME for part in workdir.parts):
        raise ConfigError(f"--workdir={workdir}: a name in it is too long")
    there = next(path for path in (workdir, *workdir.parents) if path.exists())
    if not there.is_dir():
        raise ConfigError(f"--workdir={workdir}: {there} is a file; name a folder")
    if not os.access(there, os.W_OK | os.X_OK):
        raise ConfigError(f"--workdir={workdir}: {there} may not be written to")


def has_ended(workdir: storage.Path) -> bool:
    """Whether the run there is finished, or has failed; what the first process sees."""
    return sharding.agreed(ended_here(workdir))


def ended_here(workdir: storage.Path) -> bool:
    """`has_ended`, as this process sees it."""
    return (workdir / FINISHED).exists() or (workdir / FAILED).exists()


def failure_of(workdir: storage.Path) -> str:
    """Why the run in a workdir failed while others went on; "" if it did not."""
    path = workdir / FAILED
    return storage.read_text(path).strip() if path.exists() else ""


def write_failure(path: storage.Path, why: str) -> None:
    """Keep why a run failed. It is not tried again as long as the file is there."""
    if jax.process_index() == 0:
        storage.write_text(path, why + "\n")


def short_hash(names: Sequence[str]) -> str:
    """A short name of several runs."""
    return hashlib.sha256("\n".join(names).encode()).hexdigest()[:12]


def share_stages(
    workdir: storage.Path, target: storage.Path, *, ignore: Sequence[str] = ()
) -> None:
    """Give a run the folders of another one, such as the stages that both begin with."""
    for path in sorted(workdir.iterdir()):
        hidden = path.name.startswith(".")  # a write that was not finished
        if path.is_dir() and not hidden and path.name not in ignore:
            share_folder(path, target / path.name)


def share_folder(source: storage.Path, target: storage.Path) -> None:
    """The same files under another name, see `storage.share_folder`; the first process does it."""
    if jax.process_index() == 0:
        storage.share_folder(source, target)
    sharding.agreed(True)  # the other processes wait here until it is there
