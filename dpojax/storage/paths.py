"""Paths: local ones and those of buckets, and what a bucket tells of its objects."""

from __future__ import annotations

import glob
import importlib.util
import os
from typing import Any

import fsspec
from etils import epath

Path = epath.Path
PathLike = str | os.PathLike

BUCKETS = {"gs": "gcsfs", "s3": "s3fs"}  # scheme: the package that speaks its protocol
EXTRAS = {"gs": "gcs", "s3": "s3"}  # scheme: the extra of dpojax that installs the package

# Other processes write to the same bucket, so a cached listing would hide their files.
for _protocol in ("gcs", "gs", "s3"):
    fsspec.config.conf.setdefault(_protocol, {}).setdefault("use_listings_cache", False)


class StorageError(ValueError):
    """A path that cannot be used, or a file that is damaged; the message names it."""


def as_path(name: PathLike, what: str = "path") -> epath.Path:
    """Return the path that a user named: `~` expanded, local paths absolute.

    Args:
      name: a local path, or `gs://BUCKET/...` or `s3://BUCKET/...`.
      what: the option or config key that holds the name, for error messages.

    Raises:
      StorageError: the name is empty, or its scheme is not supported here.
    """
    text = os.fspath(name)
    if not text.strip():
        raise StorageError(f"{what} is empty: name a folder or a file")
    if any(ord(letter) < 32 or letter == "\x7f" for letter in text):
        raise StorageError(f"{what} = {text!r}: has a control character, such as a new line")
    scheme, separator, rest = text.partition("://")
    if separator:
        _require_bucket(text, scheme, rest, what)
        return Path(text)
    for scheme in BUCKETS:
        if text.startswith(f"{scheme}:/"):
            raise StorageError(f"{what} = {text}: a bucket begins with {scheme}://")
    expanded = os.path.expanduser(text)
    if expanded.startswith("~"):
        user = expanded.partition("/")[0]
        raise StorageError(
            f"{what} = {text}: there is no user {user[1:]}; write ./{text} for a file"
        )
    try:
        return Path(expanded).resolve()
    except (RuntimeError, OSError) as error:  # a loop of links
        raise StorageError(f"{what} = {text}: {error}") from error


def is_local(path: PathLike) -> bool:
    """Whether a path is on this machine's file systems, not on a bucket."""
    return "://" not in os.fspath(path)


def _require_bucket(text: str, scheme: str, rest: str, what: str) -> None:
    if scheme not in BUCKETS:
        raise StorageError(f"{what} = {text}: {scheme}:// is not supported; use gs://, s3:// or /")
    if not rest.strip("/") or rest.startswith("/"):
        raise StorageError(f"{what} = {text}: no bucket is named; write {scheme}://BUCKET/FOLDER")
    if importlib.util.find_spec(BUCKETS[scheme]) is None:
        raise StorageError(
            f"{what} = {text}: needs {BUCKETS[scheme]}; pip install 'dpojax[{EXTRAS[scheme]}]'"
        )


def matches(pattern: PathLike) -> list[epath.Path]:
    """Return the paths that match a glob pattern, sorted; `**` stands for any folders."""
    text = os.fspath(pattern)
    if is_local(text):
        return [Path(name) for name in sorted(glob.glob(text, recursive=True))]
    return [Path(f"{scheme_of(text)}://{name}") for name in sorted(filesystem(text).glob(text))]


def filesystem(path: PathLike) -> fsspec.AbstractFileSystem:
    """Return the fsspec file system of a bucket."""
    return fsspec.filesystem({"gs": "gcs"}.get(scheme := scheme_of(path), scheme))


def scheme_of(path: PathLike) -> str:
    """Return `gs` or `s3` of a bucket's path."""
    return os.fspath(path).partition("://")[0]


def version_of(info: dict[str, Any]) -> str:
    """Return a text that changes when an object of a bucket is written again."""
    mark = info.get("generation") or info.get("ETag") or info.get("etag")
    return f"{mark} {info['size']}"


def modified(info: dict[str, Any]) -> float:
    """Return when an object of a bucket was last written: seconds by the bucket's clock."""
    return (info.get("mtime") or info["LastModified"]).timestamp()


def objects_below(folder: PathLike) -> dict[str, dict[str, Any]]:
    """Return fsspec's record of each object below a bucket's folder, by relative name."""
    fs = filesystem(folder)
    root = fs._strip_protocol(os.fspath(folder)).rstrip("/") + "/"
    # Some tools write an empty object named like the folder itself, with a slash at its end.
    return {
        name.removeprefix(root): info
        for name, info in fs.find(root, detail=True).items()
        if name.startswith(root) and not name.endswith("/") and info["type"] == "file"
    }
