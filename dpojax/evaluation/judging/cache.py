"""Verdicts that were paid for once: replies of judges, kept in files of JSON lines."""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import math
import os
import socket
import time
import uuid
from collections.abc import Mapping
from typing import Any

from dpojax.evaluation.judging.verdicts import Choice, Question, Reply
from dpojax.storage import LineWriter, Path, as_path, is_local
from dpojax.storage.paths import PathLike, objects_below, version_of

SUFFIX = ".jsonl"
BUCKET_SECONDS = 1.0  # between two uploads of new replies to a bucket
BUCKET_LINES = 1000  # after which a bucket's file is closed: each upload writes all of it again

logger = logging.getLogger(__name__)


def cache_key(fingerprint: str, question: Question, repetition: int = 0) -> str:
    """Return the name of a reply: a hash of the judge, the question's texts and the repetition.

    Args:
      fingerprint: of the judge.
      repetition: 0 for the first time that a question is asked, 1 for the second.
    """
    content = json.dumps([fingerprint, *question, repetition])
    return hashlib.sha256(content.encode()).hexdigest()


class VerdictCache:
    """Replies by key, in a folder that several processes and users may share.

    Each process appends to a file of its own there, so that no two writers meet. A local file holds
    a reply as soon as `put` returns: a process that is killed loses none. A bucket gets new replies
    once a second at most, and on `flush` and `close`: what came in the last second before a process
    is killed is lost there.

    Of several replies with one key the first is used, in the order of the files' names, which begin
    with the time.
    """

    def __init__(self, folder: PathLike | None = None):
        """Read the replies that are there.

        Args:
          folder: local, or on a bucket; it is made with the first reply. None keeps replies in
            memory alone.

        Raises:
          StorageError: the folder's name cannot be used.
        """
        self.folder = None if folder is None else as_path(folder, "the verdict cache")
        self._is_local = self.folder is None or is_local(self.folder)
        self._replies: dict[str, Reply] = {}
        self._versions: dict[str, str] = {}  # of the files that were read, by name
        self._writer: LineWriter | None = None
        self._lines = 0  # that the writer has written
        self._next_upload = 0.0
        self.refresh()

    def __enter__(self) -> VerdictCache:
        return self

    def __exit__(self, kind, error, traceback) -> None:
        self.close()

    def __len__(self) -> int:
        return len(self._replies)

    def __contains__(self, key: str) -> bool:
        return key in self._replies

    def get(self, key: str) -> Reply | None:
        """Return the reply with this key; None where there is none."""
        return self._replies.get(key)

    def put(self, key: str, reply: Reply, judge: str = "") -> None:
        """Keep a reply. One that is there under the same key stays.

        Args:
          judge: a name that is written beside it, for people who read the file.
        """
        if key in self._replies:
            return
        self._replies[key] = reply
        if self.folder is None:
            return
        if self._writer is None:
            self._writer, self._lines = LineWriter(self.folder / _new_file_name()), 0
        self._writer.write(json.dumps({"key": key, "judge": judge, **_to_json(reply)}))
        self._lines += 1
        if self._is_local:
            return
        if self._lines >= BUCKET_LINES:
            self.close()
        elif time.monotonic() >= self._next_upload:
            self.flush()

    def flush(self) -> None:
        """Make every reply visible to other processes."""
        if self._writer is not None:
            self._writer.flush()
            self._next_upload = time.monotonic() + BUCKET_SECONDS

    def refresh(self) -> None:
        """Read what other processes have added."""
        if self.folder is None:
            return
        own_name = None if self._writer is None else self._writer.path.name
        for name, version in sorted(_file_versions(self.folder).items()):
            if name != own_name and self._versions.get(name) != version:
                self._versions[name] = version
                self._read(self.folder / name)

    def close(self) -> None:
        """Write what is left. The next `put` begins another file."""
        if self._writer is not None:
            self._writer.close()
            self._writer = None

    def _read(self, path: Path) -> None:
        """Take over a file's replies; damaged lines are left out, and a warning names them."""
        *lines, torn = path.read_bytes().split(b"\n")
        if torn:
            logger.warning(
                "%s ends within a line: its writer was killed, or is still writing. These last "
                "%d bytes are left out",
                path,
                len(torn),
            )
        for number, line in enumerate(lines, start=1):
            try:
                record = json.loads(line)
                self._replies.setdefault(str(record["key"]), _from_json(record))
            except (ValueError, TypeError, KeyError, RecursionError):
                logger.warning("%s:%d is damaged and left out: %.60r", path, number, line)


def _to_json(reply: Reply) -> dict[str, Any]:
    preference = None if math.isnan(reply.preference) else reply.preference
    return {**reply._asdict(), "choice": reply.choice.value, "preference": preference}


def _from_json(record: Mapping[str, Any]) -> Reply:
    preference = record["preference"]
    return Reply(
        choice=Choice(record["choice"]),
        preference=math.nan if preference is None else float(preference),
        text=str(record["text"]),
        tokens_in=int(record["tokens_in"]),
        tokens_out=int(record["tokens_out"]),
    )


def _new_file_name() -> str:
    """Return a name that no other process uses; names sort by time."""
    moment = time.strftime("%Y%m%dT%H%M%S", time.gmtime())
    host = "".join(letter for letter in socket.gethostname()[:32] if letter.isalnum())
    return f"{moment}-{host}-{os.getpid()}-{uuid.uuid4().hex[:8]}{SUFFIX}"


def _file_versions(folder: Path) -> dict[str, str]:
    """Return a text for each file of replies that changes when the file grows, by name."""
    if not is_local(folder):
        objects = objects_below(folder).items()
        return {name: version_of(x) for name, x in objects if name.endswith(SUFFIX)}
    versions = {}
    with contextlib.suppress(FileNotFoundError), os.scandir(folder) as entries:
        for entry in entries:
            if entry.name.endswith(SUFFIX) and entry.is_file():
                versions[entry.name] = str(entry.stat().st_size)
    return versions
