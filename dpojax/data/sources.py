"""Reads rows from files, folders and the Hugging Face hub, each with an id "FILE:NUMBER".

Rows are read one after the other, so that memory does not grow with a file. Errors name file and
line. Nothing is written beside the data.
"""

from __future__ import annotations

import difflib
import hashlib
import itertools
import os
import re
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

from dpojax import storage
from dpojax.data import data_sets, json_files, table_files, text_files
from dpojax.data.parsing import AS_IT_IS, ParseConfig, parse_rows
from dpojax.data.records import DataError, Record
from dpojax.data.report import Report

Row = tuple[dict[str, Any], str]
Path = str | os.PathLike

COMPRESSED = ("", *text_files.OPENERS)
LINE_SUFFIXES = tuple(f"{kind}{more}" for kind in (".jsonl", ".ndjson") for more in COMPRESSED)
JSON_SUFFIXES = tuple(f".json{more}" for more in COMPRESSED) + LINE_SUFFIXES
CSV_SUFFIXES = tuple(f".csv{more}" for more in COMPRESSED)
TSV_SUFFIXES = tuple(f".tsv{more}" for more in COMPRESSED)
ARROW_SUFFIXES = (".arrow", ".feather")
SUFFIXES = (*JSON_SUFFIXES, *CSV_SUFFIXES, *TSV_SUFFIXES, ".parquet", *ARROW_SUFFIXES)
SHOWN_SUFFIXES = ".json, .jsonl, .csv, .tsv (also .gz, .bz2, .xz, .zst), .parquet, .arrow, .feather"

HUB = "hub:"  # in front of a name: it is not looked for on disk
HUB_NAME = re.compile(
    r"(?P<path>[\w-][\w.-]*(/[\w-][\w.-]*)?)(:(?P<subset>[^:@/]+))?(@(?P<revision>[\w./-]+))?"
)
SLICE = re.compile(r"(?P<split>.*)\[(?P<first>\d*):(?P<end>\d*)\]")


class Source(NamedTuple):
    """A place of records, and which of its records are meant.

    Attributes:
      path: a .json, .jsonl, .csv or .tsv file (also compressed: .gz, .bz2, .xz, .zst), a .parquet,
        .arrow or .feather file, a glob pattern, a folder (written by `datasets.save_to_disk`, or
        holding data files), or NAME, NAME:SUBSET or NAME:SUBSET@REVISION on the hub. "hub:" before
        a name says that it is none on disk. A .json file may hold an array, an object with a list,
        or JSON lines.
      split: which part of a folder, hub data set or object with several lists; "train[:1000]" are
        the first 1,000 rows of it. "" is the only one.
      subset: of a folder or hub data set with named subsets.
      revision: branch, tag or commit of a hub data set.
      data_dir: a folder inside of a folder or hub data set.
    """

    path: Path
    split: str = ""
    subset: str = ""
    revision: str = ""
    data_dir: str = ""


def listed(text: str, **selection: str) -> list[Source]:
    """The sources in a text, which commas separate; a name that is there with its comma is one.

    Args:
      text: "pairs.jsonl", "a.jsonl,b/*.parquet" or "NAME:SUBSET@REVISION".
      selection: `split`, `subset`, `revision` and `data_dir` of every source.

    Raises:
      DataError: a name is missing, or there twice.
    """
    parts = [part.strip() for part in text.split(",")]
    if len(parts) == 1 or _place(text).exists() or storage.matches(_place(text)):
        return [Source(text, **selection)]
    if not all(parts):
        raise DataError(f"{text!r}: a name is missing before or after a comma")
    if len(set(parts)) < len(parts):
        raise DataError(f"{text!r}: a source is named twice; weigh it with data.weights instead")
    return [Source(part, **selection) for part in parts]


def load_records(
    path: Path | Source | Sequence[Path | Source], *, config: ParseConfig = AS_IT_IS
) -> tuple[list[Record], Report]:
    """Read the records of a data set, and count those that cannot be used in a report.

    Args:
      path: what `read` takes.
      config: how the rows are parsed.

    Raises:
      DataError: see `read` and `parse_rows`; also when no record can be used.
    """
    report = Report()
    usable = list(parse_rows(read(path), report, config))
    report.require_some()
    return usable, report


def read(
    path: Path | Source | Sequence[Path | Source], *, split: str | None = None
) -> Iterator[Row]:
    """The (row, id) of every record, in file order; ids are "FILE:NUMBER", 1-based.

    Args:
      path: a source, or what a `Source` takes as its path, or a list of them.
      split: of a path that is no `Source`.

    Raises:
      DataError: for a missing, empty or unreadable data set, with the absolute path; for invalid
        JSON, text that is not UTF-8 and rows that are not objects, with file and line.
    """
    return itertools.chain.from_iterable(read_each(_sources(path, split)))


def read_each(sources: Sequence[Source]) -> list[Iterator[Row]]:
    """The rows of each source, like `read`; no two sources have equal ids."""
    sources = [_named(source) for source in sources]
    parts = [_parts(source) for source in sources]
    names = iter(short_names([part.place for some in parts for part in some]))
    return [
        _rows_of(source, some, [next(names) for _ in some]) for source, some in zip(sources, parts)
    ]


def _rows_of(source: Source, parts: Sequence[_Part], names: Sequence[str]) -> Iterator[Row]:
    """Yield (row, id) of one source."""
    _, first, end = _slice_of(source.split)
    empty = True
    for row, id in itertools.islice(_named_rows(source, parts, names), first, end):
        empty = False
        yield row, id
    if empty:
        raise DataError(f"{', '.join(str(part.place) for part in parts)}: the data set is empty")


def _named_rows(source: Source, parts: Sequence[_Part], names: Sequence[str]) -> Iterator[Row]:
    for part, name in zip(parts, names):
        for row, number in _rows(part, source):
            yield row, f"{name}:{number}"


def fingerprint(path: Path | Source | Sequence[Path | Source], *, split: str | None = None) -> str:
    """A hash of the content of a data set, for caches and resumed runs.

    It covers the names and bytes of all files, but not their folders, and which subset of them is
    meant. For a hub data set it is the commit that its revision stands for.

    Raises:
      DataError: something does not exist or cannot be opened.
    """
    digest, sources = hashlib.sha256(), [_named(source) for source in _sources(path, split)]
    places = [_places(source) for source in sources]
    names = iter(short_names([place for some in places for place in some]))
    for source, some in zip(sources, places):
        for place in some:
            meant = [source.split, source.subset, source.data_dir]
            digest.update(f"{next(names)} {meant}\n".encode())
            if isinstance(place, str):
                digest.update(data_sets.hub_fingerprint(place, **_selection(source)).encode())
            else:
                _add_files(digest, place)
    return digest.hexdigest()


def _add_files(digest: Any, place: storage.Path) -> None:
    """Add the names and the bytes of a file, or of all files of a folder."""
    local = storage.local_copy(place)
    # `datasets` does not read files whose names begin with a dot.
    files = sorted(local.rglob("[!.]*")) if local.is_dir() else [local]
    for file in files:
        if file.is_file():
            try:
                file_hash = storage.content_hash(file)
            except OSError as error:
                raise DataError(f"{file}: cannot be read: {error.strerror}") from error
            digest.update(f"{file.relative_to(local)} {file_hash}\n".encode())


def labels(sources: Sequence[Source]) -> list[str]:
    """A name for each source that no other one has: its file name without what it ends in."""
    short = short_names([str(source.path).rstrip("/") for source in sources])
    bare = [_bare(name) for name in short]
    return bare if len(set(bare)) == len(bare) else short


def _bare(name: str) -> str:
    ending = max((suffix for suffix in SUFFIXES if name.endswith(suffix)), key=len, default="")
    bare = name.removesuffix(ending)
    return bare if re.search(r"\w", bare) else name  # a pattern may be "*.jsonl"


def short_names(places: Sequence[storage.Path | str]) -> list[str]:
    """A short name for each place: its file name, or with folders if two places share a name."""
    short = [os.path.basename(place) for place in places]
    if len(set(short)) == len(short):
        return short
    try:
        common = os.path.commonpath([os.path.dirname(place) for place in places])
    except ValueError:  # local files and a bucket's have no folder in common
        return [str(place) for place in places]
    return [os.path.relpath(place, common) for place in places]


def _sources(path: Path | Source | Sequence[Path | Source], split: str | None) -> list[Source]:
    if isinstance(path, Source):
        return [path]
    if isinstance(path, str | os.PathLike):
        return [Source(path, split or "")]
    if not path:
        raise DataError("the list of data files is empty")
    return [source for part in path for source in _sources(part, split)]


class _Part(NamedTuple):
    """A file, a folder that `datasets` saved or (a str) a name on the hub, and the split to read.

    The files that a folder has for a split have no splits themselves.
    """

    place: storage.Path | str
    split: str


def _parts(source: Source) -> list[_Part]:
    """What has to be read of a source, in order."""
    parts, selection = [], _selection(source)
    split, subset, data_dir = (selection[name] for name in ("split", "subset", "data_dir"))
    for place in _places(source):
        if not isinstance(place, str) and place.is_dir():
            files = data_sets.files_of(place, split=split, subset=subset, data_dir=data_dir)
            if files is not None:
                parts += [_Part(file, "") for file in files]
                continue
        elif not isinstance(place, str) and (subset or data_dir):
            raise DataError(
                f"{place}: is a file and has no subsets and folders; name them in the source that "
                "has them (NAME:SUBSET) instead of in data.subset or data.data_dir"
            )
        parts.append(_Part(place, split))
    return parts


def _named(source: Source) -> Source:
    """The source with the subset and revision that its path names beside the folder or name."""
    text = str(source.path)
    if not text.startswith(HUB) and _place(source.path).exists():
        return source
    folder, colon, subset = text.rpartition(":")
    if colon and not text.startswith(HUB) and folder and _place(folder).is_dir():
        return source._replace(path=folder, subset=subset)
    match = HUB_NAME.fullmatch(text.removeprefix(HUB))
    if match is None or (":" not in text and "@" not in text):
        return source
    parts = {name: value for name, value in match.groupdict().items() if value}
    return source._replace(**parts | {"path": HUB + match["path"]})


def _places(source: Source) -> list[storage.Path | str]:
    """The existing files and folders that a source names. A str is the name of a hub data set."""
    text = str(source.path)
    if text.startswith(HUB):
        return [text.removeprefix(HUB)]
    place = _place(source.path)
    if place.exists():
        if not place.is_dir():
            text_files.require_regular(place)
        return [place]
    if re.search(r"[*?\[]", text):
        matches = storage.matches(place)
        if not matches:
            raise DataError(f"{place}: no file matches this pattern")
        return matches
    if os.path.islink(str(place)):
        raise DataError(f"{place}: is a symbolic link that leads nowhere, or in a circle")
    near = _suggestion(place)
    if HUB_NAME.fullmatch(text) and not text.endswith(SUFFIXES) and not near:
        return [text]
    raise DataError(f"{place}: no such file or folder{near}")


def _place(path: Path) -> storage.Path:
    try:
        place = storage.as_path(path, "the name of a data set")
        place.exists()
    except storage.StorageError as error:
        raise DataError(str(error)) from error
    except (OSError, RuntimeError, ValueError) as error:  # loops of links, too long, NUL, ~nobody
        raise DataError(f"{str(path)[:200]!r}: not usable as a path: {error}") from error
    return place


def _suggestion(missing: storage.Path) -> str:
    """' (did you mean ...)' with the near names in the missing file's folder, or ''."""
    folder = missing.parent
    if not folder.is_dir():
        return ""
    names = [path.name for path in folder.iterdir()]
    near = difflib.get_close_matches(missing.name, names, cutoff=0.7)
    return f" (did you mean {' or '.join(near)}?)" if near else ""


def _slice_of(split: str) -> tuple[str, int, int | None]:
    """ "train[5:10]" is ("train", 5, 10)."""
    match = SLICE.fullmatch(split)
    if match is None:
        if "[" in split:
            raise DataError(
                f"split {split!r}: a part of a split is written as train[:1000] or "
                "train[1000:2000], in rows"
            )
        return split, 0, None
    end = int(match["end"]) if match["end"] else None
    return match["split"], int(match["first"] or 0), end


def _rows(part: _Part, source: Source) -> Iterator[tuple[dict, int]]:
    """Yield (row, number) of one part."""
    place, split = part
    if isinstance(place, str):
        return data_sets.hub_rows(place, **_selection(source))
    if place.is_dir():
        return data_sets.saved_rows(place, split)
    if place.name.endswith(JSON_SUFFIXES) and not place.name.endswith(LINE_SUFFIXES):
        return json_files.rows(place, split)
    if not place.name.endswith(SUFFIXES):
        raise DataError(f"{place}: expected a folder or a file that ends in {SHOWN_SUFFIXES}")
    json_files.refuse_split(place, split)
    if place.name.endswith(LINE_SUFFIXES):
        return json_files.line_rows(place)
    if place.name.endswith((*CSV_SUFFIXES, *TSV_SUFFIXES)):
        return table_files.csv_rows(place, "," if place.name.endswith(CSV_SUFFIXES) else "\t")
    if place.name.endswith(".parquet"):
        return table_files.parquet_rows(place)
    return table_files.arrow_rows(place)


def _selection(source: Source) -> dict[str, str]:
    return {
        "split": _slice_of(source.split)[0],
        "subset": source.subset,
        "revision": source.revision,
        "data_dir": source.data_dir,
    }
