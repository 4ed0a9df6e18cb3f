"""Reads rows from files, folders and the Hugging Face hub, each with an id "FILE:NUMBER".

JSON is read here, line by line, so that an error can name the line. Parquet, saved and hub data
sets are read by `datasets`. Nothing is written beside the data.
"""

from __future__ import annotations

import contextlib
import difflib
import gzip
import hashlib
import json
import os
import re
import zlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from dpojax import storage
from dpojax.data import records
from dpojax.data.records import DataError, Record, Reject
from dpojax.data.report import Report

Row = tuple[dict[str, Any], str]
Path = str | os.PathLike

JSON_SUFFIXES = (".json", ".jsonl", ".json.gz", ".jsonl.gz")
SUFFIXES = (*JSON_SUFFIXES, ".parquet")


def load_records(
    path: Path | Sequence[Path],
    *,
    split: str | None = None,
    form: str = "auto",
    columns: Mapping[str, str] | None = None,
) -> tuple[list[Record], Report]:
    """Read the records of a data set, and count the rows without a preference in a report.

    Args:
      path: what `read` takes.
      split: which part of a saved or hub data set, or of a JSON object of lists.
      form: one of `records.FORMS`, or `auto` to find it from the keys of each row.
      columns: fields to rename before parsing, {name in the file: name in `records.FORMS`}.

    Raises:
      DataError: see `read` and `records.parse`; also when no row states a preference.
    """
    usable: list[Record] = []
    report = Report()
    for row, id in read(path, split=split):
        report.read += 1
        record = records.parse(_renamed(row, id, columns or {}), id, form)
        if isinstance(record, Reject):
            report.count("dropped", record.cause, id)
        else:
            usable.append(record)
    report.require_some()
    return usable, report


def _renamed(row: dict, id: str, columns: Mapping[str, str]) -> dict:
    missing = columns.keys() - row.keys()
    if missing:
        raise DataError(
            f"{id}: columns renames {sorted(missing)}, but the record has {sorted(row)}"
        )
    return {columns.get(name, name): value for name, value in row.items()}


def read(path: Path | Sequence[Path], *, split: str | None = None) -> Iterator[Row]:
    """Yield (row, id) for every record, in file order; ids are "FILE:NUMBER", 1-based.

    Args:
      path: a .json, .jsonl (both also .gz) or .parquet file, a glob pattern, a list of files, a
        folder (written by `datasets.save_to_disk`, or holding data files), or the name of a data
        set on the hub. A .json file may hold an array, an object with a list, or JSON lines.
      split: which part of a folder, hub data set or object with several lists.

    Raises:
      DataError: for a missing, empty or unreadable data set, with the absolute path; for invalid
        JSON, text that is not UTF-8 and rows that are not objects, with file and line.
    """
    paths = _files(path)
    names = _names(paths)
    empty = True
    for file, name in zip(paths, names):
        for row, number in _rows(file, split):
            empty = False
            yield row, f"{name}:{number}"
    if empty:
        raise DataError(f"{', '.join(map(str, paths))}: the data set is empty")


def fingerprint(path: Path | Sequence[Path], *, split: str | None = None) -> str:
    """A hash of the content of a data set, for caches and resumed runs.

    It covers the names and bytes of all files, but not their folders. For a hub data set it is the
    fingerprint that `datasets` gives to the version.

    Raises:
      DataError: something does not exist or cannot be opened.
    """
    digest, paths = hashlib.sha256(), _files(path)
    for file, name in zip(paths, _names(paths)):
        digest.update(f"{name}\n".encode())
        if isinstance(file, str):
            with _reading(file):
                digest.update(_opened(file, split)._fingerprint.encode())
            continue
        local = storage.local_copy(file)
        # `datasets` does not read files whose names begin with a dot.
        parts = sorted(local.rglob("[!.]*")) if local.is_dir() else [local]
        for part in parts:
            if part.is_file():
                try:
                    part_hash = storage.content_hash(part)
                except OSError as error:
                    raise DataError(f"{part}: cannot be read: {error}") from error
                digest.update(f"{part.relative_to(local)} {part_hash}\n".encode())
    return digest.hexdigest()


def _files(path: Path | Sequence[Path]) -> list[storage.Path | str]:
    """The existing files and folders that `path` names. A str is the name of a hub data set."""
    if not isinstance(path, str | os.PathLike):
        if not path:
            raise DataError("the list of data files is empty")
        return [file for part in path for file in _files(part)]
    try:
        place = storage.as_path(path, "the name of a data set")
    except storage.StorageError as error:
        raise DataError(str(error)) from error
    if place.exists():
        return [place]
    if re.search(r"[*?\[]", str(path)):
        matches = storage.matches(place)
        if not matches:
            raise DataError(f"{place}: no file matches this pattern")
        return matches
    on_hub = re.fullmatch(r"[\w-][\w.-]*(/[\w-][\w.-]*)?", str(path)) is not None
    if on_hub and not str(path).endswith(SUFFIXES) and not _suggestion(place):
        return [str(path)]
    raise DataError(f"{place}: no such file or folder{_suggestion(place)}")


def _suggestion(missing: storage.Path) -> str:
    """' (did you mean ...)' with the near names in the missing file's folder, or ''."""
    folder = missing.parent
    if not folder.is_dir():
        return ""
    names = [path.name for path in folder.iterdir()]
    near = difflib.get_close_matches(missing.name, names, cutoff=0.7)
    return f" (did you mean {' or '.join(near)}?)" if near else ""


def _names(paths: list[storage.Path | str]) -> list[str]:
    """A short name for each file: its file name, or with folders if two files share a name."""
    short = [os.path.basename(path) for path in paths]
    if len(set(short)) == len(short):
        return short
    try:
        common = os.path.commonpath([os.path.dirname(path) for path in paths])
    except ValueError:  # local files and a bucket's have no folder in common
        return [str(path) for path in paths]
    return [os.path.relpath(path, common) for path in paths]


def _rows(file: storage.Path | str, split: str | None) -> Iterator[tuple[dict, int]]:
    """Yield (row, number) of one file, folder or hub data set."""
    if isinstance(file, str) or file.is_dir():
        return _numbered(_data_set(file, split))
    if file.name.endswith(".parquet"):
        _refuse_split(file, split)
        return _numbered(_parquet(file))
    if file.name.endswith((".jsonl", ".jsonl.gz")):
        _refuse_split(file, split)
        return _json_lines(file, _content(file))
    if file.name.endswith(JSON_SUFFIXES):
        return _json(file, split)
    raise DataError(f"{file}: expected a folder or a file that ends in {', '.join(SUFFIXES)}")


def _numbered(rows: Any) -> Iterator[tuple[dict, int]]:
    return ((row, number) for number, row in enumerate(rows, start=1))


def _refuse_split(file: storage.Path, split: str | None) -> None:
    if split is not None:
        raise DataError(f"{file}: has no splits, but split {split!r} was asked for; leave it out")


def _content(file: storage.Path) -> bytes:
    """The bytes of a file, decompressed if its name ends in .gz, without a byte order mark."""
    try:
        data = storage.local_copy(file).read_bytes()
        data = gzip.decompress(data) if file.name.endswith(".gz") else data
    except (OSError, EOFError, zlib.error) as error:
        raise DataError(f"{file}: cannot be read: {error}") from error
    return data.removeprefix(b"\xef\xbb\xbf")


def _json_lines(file: storage.Path, content: bytes) -> Iterator[tuple[dict, int]]:
    # Split the bytes, not the text: str.splitlines also splits at U+2028 inside a JSON string.
    for number, line in enumerate(content.split(b"\n"), start=1):
        if line.strip():
            yield _object(_parsed(file, line, first_line=number), f"{file}:{number}"), number


def _json(file: storage.Path, split: str | None) -> Iterator[tuple[dict, int]]:
    """Rows of a .json file: JSON lines if the first line is an object, else one array or object."""
    content = _content(file)
    if not content.strip():
        return
    first, _, rest = content.lstrip().partition(b"\n")
    try:
        row = json.loads(first)
    except ValueError:
        row = None
    if isinstance(row, dict) and (rest.strip() or not _is_container(row)):
        _refuse_split(file, split)
        yield from _json_lines(file, content)
        return
    value = _parsed(file, content)
    if isinstance(value, list):
        _refuse_split(file, split)
        listed = value
    else:
        listed = _listed(file, value, split)
    for number, row in enumerate(listed, start=1):
        yield _object(row, f"{file}: record {number}"), number


def _is_container(value: dict) -> bool:
    """Whether an object contains lists of rows, and is not a row itself."""
    try:
        records.detect(value)
    except DataError:
        return bool(_row_lists(value))
    return False


def _listed(file: storage.Path, value: Any, split: str | None) -> list:
    """The list of rows in an object such as {"data": [...]} or {"train": [...], "test": [...]}."""
    lists = _row_lists(value) if isinstance(value, dict) else {}
    if not lists:
        keys = sorted(value) if isinstance(value, dict) else type(value).__name__
        raise DataError(f"{file}: expected an array of records or an object with one, got {keys}")
    return lists[_choose(lists, split, str(file))]


def _row_lists(value: dict) -> dict[str, list]:
    return {
        name: rows
        for name, rows in value.items()
        if isinstance(rows, list) and all(isinstance(row, dict) for row in rows)
    }


def _choose(splits: Sequence[str] | Mapping[str, Any], split: str | None, name: str) -> str:
    """The name of the split to read: `split`, or None if there is only one."""
    if split is None and len(splits) == 1:
        return next(iter(splits))
    if split is None:
        raise DataError(f"{name}: has the splits {', '.join(splits)}; choose one with split=...")
    if split not in splits:
        raise DataError(f"{name}: has no split {split!r}, only {', '.join(splits)}")
    return split


def _parsed(file: storage.Path, content: bytes, first_line: int = 1) -> Any:
    """Parse JSON; errors name the file and the line (`content` starts at `first_line`)."""
    try:
        return json.loads(content.decode("utf-8"))
    except UnicodeDecodeError as error:
        line = first_line + content[: error.start].count(b"\n")
        raise DataError(f"{file}:{line}: not UTF-8 ({error.reason}); convert the file") from error
    except json.JSONDecodeError as error:
        line = first_line + error.lineno - 1
        raise DataError(
            f"{file}:{line}: not valid JSON ({error.msg}, column {error.colno})"
        ) from error


def _object(row: Any, where: str) -> dict:
    if not isinstance(row, dict):
        raise DataError(f"{where}: expected an object with named fields, got {str(row)[:60]!r}")
    return row


def _parquet(file: storage.Path) -> Iterator[dict]:
    import datasets

    try:
        # Streaming reads the file in place; otherwise a copy of it would go to the cache.
        rows = datasets.load_dataset(
            "parquet", data_files=str(storage.local_copy(file)), split="train", streaming=True
        )
        yield from _with_class_names(rows)
    except (OSError, ValueError, datasets.exceptions.DatasetsError) as error:
        raise DataError(f"{file}: cannot be read as parquet: {error}") from error


def _with_class_names(data_set: Any) -> Iterator[dict]:
    """Yield the rows with the name of a ClassLabel instead of its number; -1, "none", is null."""
    features = data_set.features or {}
    class_names = {name: f.names for name, f in features.items() if hasattr(f, "int2str")}
    for row in data_set:
        named = {}
        for column, names in class_names.items():
            number = row[column]
            known = number is not None and 0 <= number < len(names)
            named[column] = names[number] if known else None
        yield row | named


def _data_set(path: storage.Path | str, split: str | None) -> Iterator[dict]:
    """Yield the rows of a folder (saved by `datasets`, or of data files) or a hub data set."""
    with _reading(path):
        yield from _with_class_names(_opened(path, split))


def _opened(path: storage.Path | str, split: str | None) -> Any:
    """Open a folder or a hub data set with `datasets`: the split, or the whole without splits."""
    import datasets

    on_hub = isinstance(path, str)
    folder = path if on_hub else storage.local_copy(path)
    if not on_hub and any((folder / name).exists() for name in ("state.json", "dataset_dict.json")):
        opened = datasets.load_from_disk(str(folder))
    else:
        opened = datasets.load_dataset(str(folder), streaming=not on_hub)
    if not isinstance(opened, datasets.Dataset):
        return opened[_choose(opened, split, str(path))]
    if split is not None:
        raise DataError(f"{path}: has no splits, but split {split!r} was asked for")
    return opened


@contextlib.contextmanager
def _reading(path: storage.Path | str) -> Iterator[None]:
    """Turn errors of `datasets` into a DataError that names the path."""
    import datasets

    try:
        yield
    except DataError:
        raise
    except (OSError, ValueError, datasets.exceptions.DatasetsError) as error:
        place = storage.as_path(path)
        kind = "a file, nor as a hub data set" if isinstance(path, str) else "a data set"
        raise DataError(f"{place}: cannot be read as {kind}: {error}") from error
