"""Locks on folders: one process at a time writes there."""

from __future__ import annotations

import contextlib
import fcntl
import json
import logging
import os
import pathlib
import socket
import threading
import urllib.parse
import uuid
from collections.abc import Iterator

from dpojax.storage.paths import (
    PathLike,
    StorageError,
    filesystem,
    is_local,
    modified,
    scheme_of,
)

LOCK = ".lock"
REFRESH_SECONDS = 20.0  # how often the holder of a bucket's lock writes it again
STALE_SECONDS = 120.0  # a bucket's lock that nobody has written for this long can be taken over

logger = logging.getLogger(__name__)


class Locked(StorageError):
    """Another process holds the lock; the message names it."""


@contextlib.contextmanager
def lock(folder: PathLike, owner: str = "") -> Iterator[None]:
    """Hold the lock of a folder, which is made if it is not there.

    A local folder has a file `.lock` under `flock`: the lock ends with its process. The file stays.

    A bucket has an object `.lock`. It is written with a precondition on its version, so that of two
    processes one succeeds. The holder writes it again every `REFRESH_SECONDS`. If it is older than
    `STALE_SECONDS` by the bucket's clock, its holder is taken for dead, and another process takes
    over.

    Args:
      owner: what holds the lock, for the messages; the process and its host are added.

    Raises:
      Locked: another process holds it, or took it over from this one: then after the body.
    """
    process = f"process {os.getpid()} on {socket.gethostname()}"
    holder = f"{owner} ({process})" if owner else process
    with (_local_lock if is_local(folder) else _bucket_lock)(folder, holder):
        yield


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
    lease = _Lease(f"{os.fspath(folder)}/{LOCK}", holder)
    lease.acquire(folder)
    stop = threading.Event()
    thread = threading.Thread(target=lease.refresh_until, args=(stop,), name="lock", daemon=True)
    thread.start()
    try:
        yield
    finally:
        stop.set()
        thread.join()
        lease.release()
    if lease.lost:
        raise Locked(f"{folder}: another process took over while this one did not answer")


class _Lease:
    """The object `.lock` of a bucket's folder, as its holder sees it."""

    def __init__(self, path: str, holder: str):
        self.path, self.lost = path, False
        # The id makes each holder's bytes unique, which on S3 makes the version unique.
        self._text = json.dumps({"holder": holder, "id": uuid.uuid4().hex})
        self._version: str | None = None

    def acquire(self, folder: PathLike) -> None:
        """Write the object if it is not there, or stale. Raises Locked otherwise."""
        self._version = _write_if(self.path, self._text, version=None)
        if self._version is not None or self._is_own():
            return
        fs = filesystem(self.path)
        try:
            info = fs.info(self.path)
            holder = json.loads(fs.cat_file(self.path))["holder"]
        except FileNotFoundError:  # released at this moment
            raise _held(folder, "") from None
        if _bucket_time(self.path) - modified(info) > STALE_SECONDS:
            logger.warning("%s: %s is taken for dead; taking over its lock", folder, holder)
            self._version = _write_if(self.path, self._text, _precondition(info))
        if self._version is None:
            raise _held(folder, holder)

    def refresh_until(self, stop: threading.Event) -> None:
        """Write the object again and again, until `stop` is set or another process took over."""
        while not stop.wait(REFRESH_SECONDS):
            try:
                version = _write_if(self.path, self._text, self._version)
            except Exception as error:  # of the network: the next try may succeed
                logger.warning("%s: cannot refresh the lock (%s); trying again", self.path, error)
                continue
            if version is None and not self._is_own():
                self.lost = True
                logger.error("%s: another process took over this lock", self.path)
                return
            self._version = version or self._version

    def release(self) -> None:
        """Remove the object, if it is still this holder's."""
        if not self.lost and self._is_own():
            with contextlib.suppress(FileNotFoundError):
                filesystem(self.path).rm_file(self.path)

    def _is_own(self) -> bool:
        """Whether the object holds this text. Notes its version: a reply may have been lost."""
        fs = filesystem(self.path)
        try:
            info = fs.info(self.path)
            is_own = fs.cat_file(self.path).decode() == self._text
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
