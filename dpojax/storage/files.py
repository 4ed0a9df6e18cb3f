"""Whole files and folders: written completely or not at all."""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import pathlib
import re
import shutil
import tempfile
import time
import uuid
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from dpojax.storage.paths import (
    Path,
    PathLike,
    StorageError,
    filesystem,
    is_local,
    modified,
    objects_below,
)
from dpojax.watchdog import unwatched

DAY = 86400.0  # seconds
REMOVALS = 3  # how often the removal of a folder is tried
UNFINISHED = ".unfinished"  # ends the hidden names of what is being written or removed
_UNFINISHED_NAME = re.compile(rf"\..*\.[0-9a-f]{{8}}{re.escape(UNFINISHED)}")  # of this file


def write_text(path: PathLike, text: str) -> None:
    """Write a file of UTF-8 text: the whole file is there, or what was there before."""
    write_bytes(path, text.encode())


def write_bytes(path: PathLike, data: bytes) -> None:
    """Write a file of bytes: the whole file is there, or what was there before."""
    if not is_local(path):
        filesystem(path).pipe_file(os.fspath(path), data)
        return
    with replacing(path) as unfinished:
        unfinished.write_bytes(data)


def write_json(path: PathLike, content: Any) -> None:
    """Write `content` as JSON, indented by two spaces: the whole file or nothing."""
    write_text(path, json.dumps(content, indent=2) + "\n")


def read_json(path: PathLike, hint: str = "", *, fields: Mapping[str, type] | None = None) -> Any:
    """Return the content of a JSON file.

    Args:
      hint: what the user can do about a damaged file; it ends the error message.
      fields: the content is an object with these fields, and their values have these types.

    Raises:
      StorageError: the file is not JSON, or does not have the fields.
      FileNotFoundError: there is no such file.
    """
    text = Path(path).read_bytes()
    with damage_named(path, hint):
        try:
            content = json.loads(text)
        except (ValueError, RecursionError) as error:  # of JSON, and of bytes that are not UTF-8
            raise ValueError(f"not JSON ({error})") from error
        if fields is not None and not isinstance(content, dict):
            raise ValueError("not a JSON object")
        for name, kind in (fields or {}).items():
            if not isinstance(content.get(name), kind):
                raise ValueError(f"{name!r} is not there, or of another type")
    return content


@contextlib.contextmanager
def damage_named(path: PathLike, hint: str = "") -> Iterator[None]:
    """Name the file in errors of code that takes its content apart.

    Args:
      hint: what the user can do about a damaged file; it ends the error message.

    Raises:
      StorageError: instead of what Python raises where a content has another form.
    """
    try:
        yield
    except StorageError:
        raise
    except (ValueError, TypeError, KeyError, IndexError, AttributeError, EOFError) as error:
        what = f"lacks {error}" if isinstance(error, KeyError) else str(error)
        raise StorageError(f"{path}: {what}" + (f"; {hint}" if hint else "")) from error


def read_text(path: PathLike) -> str:
    """Return the text of a file that is only shown; bytes that are not UTF-8 become U+FFFD."""
    return Path(path).read_bytes().decode(errors="replace")


@contextlib.contextmanager
def replacing(path: PathLike) -> Iterator[pathlib.Path]:
    """Yield a local file name to write to; afterwards the file takes the place of `path`.

    The yielded name ends like `path`. After an error `path` is as it was before.

    Raises:
      StorageError: nothing was written.
    """
    with _unfinished_folder(path) as folder:
        unfinished = folder / Path(path).name
        yield unfinished
        if not unfinished.is_file():
            raise StorageError(f"{path}: nothing was written")
        if is_local(path):
            _sync(unfinished)
            os.replace(unfinished, path)
            _sync(pathlib.Path(path).parent)
        else:
            with unwatched():
                filesystem(path).put_file(str(unfinished), os.fspath(path))


@contextlib.contextmanager
def replacing_folder(path: PathLike) -> Iterator[pathlib.Path]:
    """Yield an empty local folder to fill; afterwards it takes the place of `path`.

    After an error in the body `path` is as it was before.

    A local folder is renamed, so readers see nothing of it or all of it. Where it replaces an older
    folder, readers find neither for the moment between two renames.

    A bucket has no rename: the files are uploaded one after the other, in the order in which they
    were written, so the file that a writer writes last is seen last. Each file is whole.
    Where an older folder is replaced, readers may see old and new files together until the end.
    When an upload fails, a folder that was not there before is removed again.
    """
    with _unfinished_folder(path) as parent:
        unfinished = parent / Path(path).name
        unfinished.mkdir()
        yield unfinished
        if not is_local(path):
            _upload(unfinished, path)
            return
        for file in _files_below(unfinished):
            _sync(unfinished / file)
        _rename_folder(unfinished, pathlib.Path(path))


def share_folder(source: PathLike, target: PathLike) -> None:
    """Give a folder a second name: hard links where the file system has them, else copies.

    Does nothing if `target` is there or `source` is not. Either name can be removed without the
    other; files must be replaced, not changed in place. See `replacing_folder` for what readers
    see meanwhile.
    """
    if Path(target).exists() or not Path(source).is_dir():
        return
    if is_local(source) and is_local(target):
        with _unfinished_folder(target) as parent:
            unfinished = parent / Path(target).name
            shutil.copytree(source, unfinished, copy_function=_link)
            _rename_folder(unfinished, pathlib.Path(target))
    elif is_local(source):
        _upload(pathlib.Path(source), target)
    elif is_local(target):
        with replacing_folder(target) as unfinished:
            download(source, unfinished, _oldest_first(source))
    else:
        _copy_objects(source, target)


def remove_folder(path: PathLike) -> None:
    """Remove a folder with all that it holds; one that is not there is no error.

    A local folder loses its name first, so that a removal that is stopped leaves no half of it.
    """
    if not is_local(path):
        with contextlib.suppress(FileNotFoundError):
            filesystem(path).rm(os.fspath(path), recursive=True)
    elif os.path.islink(path):
        os.unlink(path)
    elif os.path.isdir(path):
        hidden = path if is_unfinished(path) else _unfinished_name(path)
        if hidden != path:
            os.replace(path, hidden)  # a full disk, where no folder can be made, allows it
        _remove_hidden(hidden)


def is_unfinished(path: PathLike) -> bool:
    """Whether a name is that of a write or a removal that has not ended."""
    name = Path(path).name
    return name.startswith(".") and name.endswith(UNFINISHED)


def move_folder(source: PathLike, target: PathLike) -> None:
    """Give a local folder its final name, once all that it holds would survive a power failure.

    Raises:
      OSError: `target` is there already, and not an empty folder.
    """
    for where, _, names in os.walk(source):
        for name in names:
            _sync(pathlib.Path(where) / name)
        _sync(pathlib.Path(where))
    os.replace(source, target)
    _sync(pathlib.Path(target).parent)


def free_bytes(path: PathLike) -> int | None:
    """Return the free space in bytes where `path` is or will be; None on a bucket."""
    if not is_local(path):
        return None
    existing = pathlib.Path(path).absolute()
    while not existing.exists():
        existing = existing.parent
    return shutil.disk_usage(existing).free


def download(folder: PathLike, to: pathlib.Path, names: Iterable[str]) -> None:
    """Write objects below a bucket's folder, given by relative name, into a local folder."""
    fs = filesystem(folder)
    with unwatched():
        for name in names:
            (to / name).parent.mkdir(parents=True, exist_ok=True)
            fs.get_file(f"{os.fspath(folder)}/{name}", str(to / name))


@contextlib.contextmanager
def _unfinished_folder(path: PathLike) -> Iterator[pathlib.Path]:
    """Yield a hidden folder beside a local path, or a temporary one for a bucket's; then remove."""
    if not is_local(path):
        options = {"prefix": "dpojax-upload-", "ignore_cleanup_errors": True}
        with tempfile.TemporaryDirectory(**options) as name:
            yield pathlib.Path(name)
        return
    _remove_left_beside(path)
    folder, descriptor = None, None
    while descriptor is None:  # another process may have cleaned up before the lock was there
        folder = _unfinished_name(path)
        folder.mkdir(parents=True)
        descriptor = _locked(folder)
    try:
        yield folder
    finally:
        _remove_hidden(folder)
        os.close(descriptor)


def remove_unfinished(folder: PathLike) -> None:
    """Remove what killed processes left of writes and removals, in a local folder and below it.

    What a living process writes is locked, and stays. On a file system without locks a name has to
    be a day old.
    """
    if not is_local(folder):
        return
    for where, names, _ in os.walk(folder):
        for name in [name for name in names if _UNFINISHED_NAME.fullmatch(name)]:
            names.remove(name)  # `os.walk` does not go there
            _remove_left(pathlib.Path(where) / name)


def _remove_left_beside(path: PathLike) -> None:
    """Do `remove_unfinished` for earlier writes and removals of the same path alone."""
    folder, prefix = os.path.split(os.path.abspath(path))
    prefix = f".{prefix[:64]}."
    with contextlib.suppress(FileNotFoundError):
        for name in os.listdir(folder):
            if name.startswith(prefix) and _UNFINISHED_NAME.fullmatch(name):
                _remove_left(pathlib.Path(folder) / name)


def _remove_left(path: pathlib.Path) -> None:
    """Remove a hidden folder unless a living process writes to it."""
    if (descriptor := _locked(path, without_locks=_is_old(path))) is not None:
        _remove_hidden(path)
        os.close(descriptor)


def _remove_hidden(folder: PathLike) -> None:
    """Remove a folder that no reader sees. A disk that fails once is asked again."""
    for _ in range(REMOVALS):
        shutil.rmtree(folder, ignore_errors=True)
        if not os.path.lexists(folder):
            return


def _locked(folder: pathlib.Path, *, without_locks: bool = True) -> int | None:
    """Lock a folder; return the descriptor that holds the lock, or None where another one does.

    Args:
      without_locks: return a descriptor also where the file system has no locks.
    """
    try:
        descriptor = os.open(folder, os.O_RDONLY)
    except FileNotFoundError:
        return None
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        is_locked = folder.exists()
    except BlockingIOError:
        is_locked = False
    except OSError:  # some network file systems have no locks
        is_locked = without_locks
    if not is_locked:
        os.close(descriptor)
    return descriptor if is_locked else None


def _is_old(path: pathlib.Path) -> bool:
    with contextlib.suppress(FileNotFoundError):
        return time.time() - path.stat().st_mtime > DAY
    return False


def _unfinished_name(path: PathLike) -> pathlib.Path:
    """A hidden name beside a local path that nobody else uses."""
    unique = f".{Path(path).name[:64]}.{uuid.uuid4().hex[:8]}{UNFINISHED}"
    return pathlib.Path(path).absolute().parent / unique


def _rename_folder(unfinished: pathlib.Path, path: pathlib.Path) -> None:
    """Move a folder to `path`; what was there goes to the unfinished folder's parent."""
    with contextlib.suppress(FileNotFoundError):
        os.replace(path, unfinished.parent / "replaced")
    os.replace(unfinished, path)
    _sync(path.parent)


def _upload(folder: pathlib.Path, path: PathLike) -> None:
    names = _files_below(folder)
    names.sort(key=lambda name: ((folder / name).stat().st_mtime_ns, name))
    fs = filesystem(path)
    with unwatched(), _all_objects(path, names):
        for name in names:
            fs.put_file(str(folder / name), f"{os.fspath(path)}/{name}")


def _copy_objects(source: PathLike, target: PathLike) -> None:
    names = _oldest_first(source)
    with unwatched(), _all_objects(target, names):
        if (fs := filesystem(source)) is filesystem(target):
            for name in names:
                fs.cp_file(f"{os.fspath(source)}/{name}", f"{os.fspath(target)}/{name}")
        else:
            with tempfile.TemporaryDirectory(prefix="dpojax-copy-") as folder:
                download(source, pathlib.Path(folder), names)
                _upload(pathlib.Path(folder), target)


def _oldest_first(folder: PathLike) -> list[str]:
    """Return the relative names of a bucket's objects in the order in which they were written."""
    objects = objects_below(folder)
    return sorted(objects, key=lambda name: (modified(objects[name]), name))


@contextlib.contextmanager
def _all_objects(path: PathLike, names: Sequence[str]) -> Iterator[None]:
    """After the body writes `names` below a bucket's folder, remove what else was there.

    After an error the folder is removed, if it was not there before.
    """
    before = objects_below(path)
    try:
        yield
    except BaseException:
        if not before:
            remove_folder(path)
        raise
    fs = filesystem(path)
    for name in sorted(before.keys() - set(names)):
        fs.rm_file(f"{os.fspath(path)}/{name}")


def _files_below(folder: pathlib.Path) -> list[str]:
    """The relative names of all files below a local folder, sorted."""
    files = (path for path in folder.rglob("*") if path.is_file())
    return sorted(path.relative_to(folder).as_posix() for path in files)


def _link(path: str, to: str) -> None:
    try:
        os.link(path, to)
    except OSError:
        shutil.copy2(path, to)


def _sync(path: pathlib.Path) -> None:
    """Make a file or a folder's list of names survive a power failure."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError:
        if not path.is_dir():  # some network file systems cannot sync a folder
            raise
    finally:
        os.close(descriptor)
