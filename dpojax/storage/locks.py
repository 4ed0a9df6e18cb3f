"""Locks on folders: one process at a time writes there."""

from __future__ import annotations

import contextlib
import fcntl
import json
import logging
import os
import pathlib
import signal
import socket
import threading
import time
import urllib.parse
import uuid
from collections.abc import Callable, Iterator
from functools import partial

from dpojax.storage.paths import (
    PathLike,
    StorageError,
    filesystem,
    is_local,
    modified,
    scheme_of,
)
from dpojax.watchdog import unwatched

LOCK = ".lock"
REFRESH_SECONDS = 10.0  # how often the holder of a bucket's lock writes it again
STALE_SECONDS = 45.0  # a bucket's lock that nobody has written for this long can be taken over
POLL_SECONDS = 3.0  # how often a process that waits for a bucket's lock looks at it
TURN_SECONDS = 1.0  # between two tries of `lock_in_turn` and `turn`

_lost: set[str] = set()  # what `lost_locks` returns

logger = logging.getLogger(__name__)


class Locked(StorageError):
    """Another process holds the lock; the message names it."""


@contextlib.contextmanager
def lock(folder: PathLike) -> Iterator[None]:
    """Hold the lock of a folder, which is made if it is not there.

    A local folder has a file `.lock` under `flock`: the lock ends with its process. The file stays.

    A bucket has an object `.lock`. It is written with a precondition on its version, so that of two
    processes one succeeds. The holder writes it again every `REFRESH_SECONDS`. Another process
    watches it: as soon as it changes, its holder is alive, and `Locked` is raised. If nobody has
    written it for `STALE_SECONDS`, its holder is taken for dead, and the other process takes over.

    A holder that did not answer for so long can come back. It must write nothing more, because the
    new holder writes the same files. So it sends itself a SIGTERM, and `lost_locks` names the
    folder: a training loop then ends without a checkpoint (see `training.preemption`), and a
    process without a handler of the signal ends at once. The steps since its last checkpoint are
    lost. The new holder started from that checkpoint and takes these steps again.

    Raises:
      Locked: another process holds the lock. If another process takes it over later, it is raised
        when the body ends.
    """
    with (_local_lock if is_local(folder) else _bucket_lock)(folder, _this_process()):
        yield


@contextlib.contextmanager
def lock_in_turn(folder: PathLike, log: Callable[[str], None]) -> Iterator[None]:
    """Hold the lock of a folder, once no other process does.

    Args:
      log: gets a line if there is another one.
    """
    with _in_turn(partial(lock, folder), log):
        yield


@contextlib.contextmanager
def _in_turn(
    take: Callable[[], contextlib.AbstractContextManager[None]], log: Callable[[str], None]
) -> Iterator[None]:
    """Hold the lock that take() gives, or raises Locked for, once no other process holds it."""
    with contextlib.ExitStack() as stack:
        waits = False
        while True:
            try:
                stack.enter_context(take())
                break
            except Locked as error:
                if not waits:
                    log(f"{str(error).rpartition(';')[0]}; waiting until it has ended")
                waits = True
            with unwatched():  # the other process is watched
                time.sleep(TURN_SECONDS)
        yield


def lost_locks() -> list[str]:
    """Return the folders whose locks were taken over from this process while it still uses them."""
    return sorted(_lost)


@contextlib.contextmanager
def turn(path: PathLike) -> Iterator[None]:
    """Let one process at a time make a file; the others wait until it is there, or its maker gone.

    Whoever gets its turn has to look whether the file is there by now. Local locks are a hidden
    file beside `path`, which is removed again; a bucket's are those of `lock`. A folder that takes
    no lock gives every process its turn at once.
    """
    take = partial(_local_turn if is_local(path) else _bucket_turn, path)
    with contextlib.ExitStack() as held:
        with contextlib.suppress(OSError):  # read-only, or a network file system without locks
            held.enter_context(_in_turn(take, logger.warning))
        yield


@contextlib.contextmanager
def _local_turn(path: PathLike) -> Iterator[None]:
    folder, name = os.path.split(os.path.abspath(path))
    os.makedirs(folder, exist_ok=True)
    lock_file = os.path.join(folder, f".{name[:100]}{LOCK}")
    with open(lock_file, "a+") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.seek(0)
            raise _held(path, file.read().strip()) from None
        # The holder before may have removed the name since it was opened here.
        if not _is_file(lock_file, file.fileno()):
            raise _held(path, "")
        file.truncate(0)
        file.write(_this_process())
        file.flush()
        try:
            yield
        finally:
            with contextlib.suppress(FileNotFoundError):
                os.unlink(lock_file)


def _is_file(path: str, descriptor: int) -> bool:
    """Whether a name is that of an open file."""
    try:
        return os.path.samestat(os.stat(path), os.fstat(descriptor))
    except FileNotFoundError:
        return False


def _bucket_turn(path: PathLike) -> contextlib.AbstractContextManager[None]:
    folder, _, name = os.fspath(path).rpartition("/")
    return _bucket_lock(f"{folder}/.{name}", _this_process())


def _this_process() -> str:
    return f"process {os.getpid()} on {socket.gethostname()}"


def _held(folder: PathLike, holder: str) -> Locked:
    return Locked(f"{folder}: in use by {holder or 'another process'}; wait until it has ended")


@contextlib.contextmanager
def _local_lock(folder: PathLike, holder: str) -> Iterator[None]:
    os.makedirs(folder, exist_ok=True)
    with open(pathlib.Path(folder) / LOCK, "a+") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.seek(0)
            raise _held(folder, file.read().strip()) from None
        file.truncate(0)
        file.write(holder)
        file.flush()
        yield


@contextlib.contextmanager
def _bucket_lock(folder: PathLike, holder: str) -> Iterator[None]:
    lease = _Lease(os.fspath(folder), holder)
    lease.acquire()
    stop = threading.Event()
    thread = threading.Thread(target=lease.refresh_until, args=(stop,), name="lock", daemon=True)
    thread.start()
    try:
        yield
    finally:
        stop.set()
        thread.join()
        lease.release()
        _lost.discard(lease.folder)
        if lease.lost:  # said after an error of the body too: it may come from the new holder
            raise Locked(f"{folder}: another process took over while this one did not answer")


class _Lease:
    """The object `.lock` of a bucket's folder, as its holder sees it."""

    def __init__(self, folder: str, holder: str):
        self.folder, self.path, self.lost = folder, f"{folder}/{LOCK}", False
        self._holder, self._id = holder, uuid.uuid4().hex
        self._version: str | None = None

    def acquire(self) -> None:
        """Write the object once it is not there, or stale. Raises Locked if its holder lives."""
        first, stale_at = None, 0.0  # the version that was seen first; when it will be stale
        while not self._write_new():
            try:
                version, age, holder = self._look()
            except FileNotFoundError:  # released at this moment
                continue
            if first is None:
                first, stale_at = version, time.monotonic() + STALE_SECONDS - age
                if time.monotonic() < stale_at:
                    message = "%s: in use by %s; waiting up to %.0f s to see whether it is alive"
                    logger.warning(message, self.folder, holder, STALE_SECONDS - age)
            elif version != first:
                raise _held(self.folder, holder)
            if (left := stale_at - time.monotonic()) > 0:
                time.sleep(min(POLL_SECONDS, left))
                continue
            logger.warning("%s: %s is taken for dead; taking over its lock", self.folder, holder)
            self._version = self._write(version)
            if self._version is not None:
                return

    def refresh_until(self, stop: threading.Event) -> None:
        """Write the object again and again, until `stop` is set or another process took over."""
        while not stop.wait(REFRESH_SECONDS):
            try:
                version = self._write(self._version)
                is_own = version is not None or self._is_own()
            except Exception as error:  # of the network: the next try may succeed
                logger.warning("%s: cannot refresh the lock (%s); trying again", self.path, error)
                continue
            self._version = version or self._version
            if not is_own:
                self._lose()
                if not stop.is_set():  # the body still runs
                    os.kill(os.getpid(), signal.SIGTERM)
                return

    def release(self) -> None:
        """Remove the object, if it is still this holder's."""
        if not self.lost and self._is_own():
            with contextlib.suppress(FileNotFoundError):
                filesystem(self.path).rm_file(self.path)

    def _write(self, version: str | None) -> str | None:
        """Write the object, see `_write_if`. No two writes have the same bytes.

        On S3 the version is a hash of the bytes: equal ones would look like a holder that is dead.
        """
        content = {"holder": self._holder, "id": self._id, "write": uuid.uuid4().hex}
        return _write_if(self.path, json.dumps(content), version)

    def _write_new(self) -> bool:
        """Write the object if it is not there; whether it now is this holder's."""
        self._version = self._write(None)
        return self._version is not None or self._is_own()

    def _look(self) -> tuple[str, float, str]:
        """The object's version, its age in seconds by the bucket's clock, and its holder."""
        fs = filesystem(self.path)
        info = fs.info(self.path)
        holder = json.loads(fs.cat_file(self.path))["holder"]
        return _precondition(info), _bucket_time(self.path) - modified(info), holder

    def _lose(self) -> None:
        """Note that another process has the lock."""
        self.lost = True
        _lost.add(self.folder)
        logger.error(
            "%s: this process did not answer for too long, and another one took over its lock; "
            "this one stops and saves nothing more",
            self.folder,
        )

    def _is_own(self) -> bool:
        """Whether this holder wrote the object. Notes its version: a reply may have been lost."""
        fs = filesystem(self.path)
        try:
            info = fs.info(self.path)
            is_own = json.loads(fs.cat_file(self.path))["id"] == self._id
        except FileNotFoundError:
            return False
        self._version = _precondition(info) if is_own else self._version
        return is_own


def _precondition(info: dict) -> str:
    """What a conditional write compares: the generation on GCS, the ETag on S3."""
    return str(info["generation"] if "generation" in info else info["ETag"])


def _write_if(path: str, text: str, version: str | None) -> str | None:
    """Write an object if it has this version, or does not exist where `version` is None.

    Returns:
      its new version, or None where the condition does not hold.
    """
    write = {"gs": _write_if_gcs, "s3": _write_if_s3}[scheme_of(path)]
    return write(path, text.encode(), version)


def _write_if_gcs(path: str, data: bytes, version: str | None) -> str | None:
    fs = filesystem(path)
    bucket, _, name = path.removeprefix("gs://").partition("/")
    parts = (json.dumps({"name": name}).encode(), data)
    body = b"".join(b"--=\r\nContent-Type: application/json\r\n\r\n%s\r\n" % x for x in parts)
    try:
        written = fs.call(
            "POST",
            f"{fs._location}/upload/storage/v1/b/{urllib.parse.quote(bucket)}/o",
            uploadType="multipart",
            ifGenerationMatch=version or "0",
            headers={"Content-Type": 'multipart/related; boundary="="'},
            data=body + b"--=--\r\n",
            json_out=True,
        )
    except FileExistsError:  # gcsfs's word for "precondition failed"
        return None
    return str(written["generation"])


def _write_if_s3(path: str, data: bytes, version: str | None) -> str | None:
    bucket, _, name = path.removeprefix("s3://").partition("/")
    condition = {"IfNoneMatch": "*"} if version is None else {"IfMatch": version}
    try:
        written = filesystem(path).call_s3(
            "put_object", Bucket=bucket, Key=name, Body=data, **condition
        )
    except OSError as error:  # s3fs translates the service's errors
        text = f"{error} {error.__cause__}"
        if "PreconditionFailed" in text or "ConditionalRequestConflict" in text:
            return None
        if isinstance(error, FileNotFoundError):  # the version that was expected is gone
            return None
        raise
    return written["ETag"]


def _bucket_time(path: str) -> float:
    """Return the time by the bucket's clock: this host's may be wrong by more than a lock's age."""
    fs = filesystem(path)
    probe = f"{path}.{uuid.uuid4().hex}"
    fs.pipe_file(probe, b"")
    try:
        return modified(fs.info(probe))
    finally:
        fs.rm_file(probe)
