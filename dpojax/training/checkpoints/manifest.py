"""The manifest of a checkpoint: what it is of, and the checksum of each of its files.

It is written when all else is on disk. A checksum of its own guards it.
"""

from __future__ import annotations

import errno
import json
from typing import Any, NamedTuple

import jax

from dpojax import sharding, storage
from dpojax.training.checkpoints.errors import Damaged

MANIFEST = "manifest.json"
ORBAX_RECORDS = ("_CHECKPOINT_METADATA", "state/_METADATA")  # of every checkpoint
SHOWN = 80  # characters of a file's name in a message


class Manifest(NamedTuple):
    """What a checkpoint holds besides its arrays.

    Attributes:
      metadata: what `Checkpoints.save` was given.
      position: of the data iterator, or None.
      score: higher is better, or None.
      files: the checksum of each file by its name, relative to the checkpoint's folder.
    """

    metadata: dict[str, Any]
    position: dict[str, Any] | None
    score: float | None
    files: dict[str, storage.Checksum]


def write_manifest(folder: storage.PathLike, manifest: Manifest) -> None:
    """Write the manifest of a checkpoint whose files are all there."""
    record = _canonical(manifest._asdict())
    content = {"crc32c": storage.crc32c(record.encode()), "manifest": json.loads(record)}
    storage.write_json(f"{folder}/{MANIFEST}", content)


def read_manifest(folder: storage.PathLike) -> Manifest:
    """Read the manifest of a checkpoint.

    Raises:
      Damaged: it is not there, or is not what was written.
    """
    path = storage.Path(f"{folder}/{MANIFEST}")
    try:
        content = json.loads(path.read_bytes())
        record = content["manifest"]
        same = content["crc32c"] == storage.crc32c(_canonical(record).encode())
        manifest = Manifest(**record)
        files = {name: storage.Checksum(*pair) for name, pair in manifest.files.items()}
    except (FileNotFoundError, NotADirectoryError, IsADirectoryError):
        raise Damaged(f"it has no {MANIFEST}{_of_older_version(folder)}") from None
    except OSError as error:
        if error.errno != errno.EIO:  # the disk answers, but not now
            raise
        raise Damaged(f"{MANIFEST} cannot be read ({error})") from error
    except (ValueError, KeyError, TypeError, AttributeError):
        raise Damaged(f"{MANIFEST} is not what was written") from None
    if not same:
        raise Damaged(f"{MANIFEST} is not what was written")
    return manifest._replace(files=files)


def _of_older_version(folder: storage.PathLike) -> str:
    """What to do about a checkpoint of a version that wrote no manifest; "" if it is none."""
    if not all(storage.Path(f"{folder}/{name}").exists() for name in ORBAX_RECORDS):
        return ""
    return (
        ": an older version of dpojax wrote it, without checksums; resume it with that version, or "
        "export it there and give the exported folder as config.model.path to a new run"
    )


def require_files(manifest: Manifest, sizes: dict[str, int]) -> None:
    """Raise Damaged unless every file of a manifest is there in its size.

    Args:
      sizes: bytes of the files that are there, by name; others than the manifest's may be there.
    """
    for name, (size, _) in sorted(manifest.files.items()):
        if name not in sizes:
            raise Damaged(f"{name[:SHOWN]} is missing")
        if sizes[name] != size:
            raise Damaged(f"{name[:SHOWN]} has {sizes[name]:,} bytes instead of {size:,}")


def require_same_bytes(folder: storage.PathLike, manifest: Manifest) -> None:
    """Raise Damaged unless every file of a manifest has its checksum.

    Several processes read a share of the files each, and all of them raise. All files are read to
    their end.
    """
    names = sorted(manifest.files)
    share = names[jax.process_index() :: jax.process_count()]
    reason = ""
    try:
        checksums = storage.checksums_of(folder, share)
        changed = [name for name in share if checksums[name] != manifest.files[name]]
        if changed:
            reason = f"the bytes of {changed[0][:SHOWN]} are not those that were written"
    except FileNotFoundError as error:
        reason = f"{error.filename} is missing"
    except OSError as error:
        if error.errno != errno.EIO:
            raise
        reason = f"it cannot be read ({error})"
    if sharding.any_process(bool(reason)):
        raise Damaged(reason or "another process found a file that is not what was written")


def _canonical(content: Any) -> str:
    """One text for equal JSON contents."""
    return json.dumps(content, sort_keys=True)
