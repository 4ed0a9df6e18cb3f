"""Data are tokenised once: a stage's examples in one file, named by a hash of all they depend on.

Runs, members of a sweep and jobs of a frontier may share the folder, and read and write it at the
same time. A file is there as a whole or not at all, and one name has one content. So every process
of a run looks for the file by itself, and only that of the first process gets the name. Of several
runs that need a file that is not there, one makes it, and the others wait for it.
"""

from __future__ import annotations

import contextlib
import datetime
import functools
import hashlib
import importlib.metadata
import json
import logging
import os
import pathlib
from collections.abc import Callable, Iterator
from typing import Any

import jax
from ml_collections import ConfigDict

from dpojax import storage
from dpojax.config.data_sources import sources_of
from dpojax.data import examples, sources
from dpojax.data.examples import Examples, FileStore, NotStored, Store
from dpojax.data.records import DataError
from dpojax.data.report import Report
from dpojax.stages import classifier_data, selection
from dpojax.stages import data as stage_data
from dpojax.stages.data import NewStore, SourcePart, StageData
from dpojax.stages.tokenizers import content_hash

logger = logging.getLogger(__name__)

FOLDER = "tokens"  # of the workdir
LIBRARIES = ("datasets", "jinja2", "numpy", "tokenizers", "transformers")


def cached(
    folder: storage.Path, key: Callable[[], str | None], load: Callable[[NewStore], StageData]
) -> StageData:
    """The examples in folder/KEY.arrow, or those that load() reads, which are kept there.

    They are written while they are read, and mapped into memory. A folder that takes no file stops
    no run: the examples are in memory then. A damaged file is made again, with a warning. Of
    several processes only the first keeps its file.

    Args:
      key: the file's name; None if nothing tells what the examples depend on.
      load: makes the examples in a store, see `stages.data.load`.

    Raises:
      DataError: as key() and load() raise it.
    """
    name = key()
    file = folder / f"{name or 'unnamed'}.arrow"
    made = [x for x in (folder, folder.parent) if storage.is_local(x) and not x.exists()]
    with contextlib.suppress(OSError):
        storage.remove_unfinished(folder)  # of runs that were killed
    try:
        with contextlib.ExitStack() as waiting:
            # Only the first process keeps its file.
            if name is not None and not file.exists() and jax.process_index() == 0:
                waiting.enter_context(storage.turn(file))
            if name is not None and file.exists():
                try:
                    return _read(file)
                except DataError as error:  # its name says that it would be made of the same data
                    logger.warning("%s; it is made again", error)
            return _kept(file, name, key, load)
    except NotStored as error:
        return load(Store)._replace(file_note=f"not kept: {error}")
    finally:
        for place in made:  # leaves none behind where nothing was kept
            with contextlib.suppress(OSError):
                os.rmdir(place)


def _read(file: storage.Path) -> StageData:
    """The examples in a file.

    Raises:
      DataError: it is damaged.
    """
    both, about = examples.load(file)
    reports = {part: Report.from_content(x) for part, x in about["reports"].items()}
    parts = tuple(SourcePart(*part) for part in about["sources"])
    labels, note = tuple(about["labels"]), f"read from {file}"
    return StageData(
        Examples.joined(*both), len(both[0]), reports, labels, parts, file, file_note=note
    )


class _NotToKeep(Exception):
    """Ends the writing of a file that shall have no name; it is mapped already."""


def _kept(
    file: storage.Path,
    name: str | None,
    key: Callable[[], str | None],
    load: Callable[[NewStore], StageData],
) -> StageData:
    """The examples that load() reads, in a file that was mapped and has its name, if it may."""
    stores: list[FileStore] = []
    data = None

    def new_store() -> Store:
        stores.append(FileStore(unfinished.parent / f"{len(stores)}.arrow"))
        return stores[-1]

    try:
        with _writing(storage.replacing(file)) as unfinished:
            data = load(new_store)
            if name is None or key() != name or jax.process_index():
                raise _NotToKeep
            reports = {part: report.to_content() for part, report in data.reports.items()}
            about = {"labels": data.labels, "reports": reports, "sources": data.sources}
            stores[-1].seal(about)
            os.replace(stores[-1].path, unfinished)
    except _NotToKeep:
        reason = "the data changed meanwhile, or nothing tells what the tokenizer does"
        return data._replace(file_note=f"not kept: {reason}")
    except NotStored as error:
        if data is None:
            raise
        return data._replace(file_note=f"not kept: {error}")
    finally:
        for store in stores:
            store.close()
    return data._replace(file=file, file_note=f"kept in {file}")


@contextlib.contextmanager
def _writing(replacing: contextlib.AbstractContextManager) -> Iterator[pathlib.Path]:
    """Enter and leave a context; an OSError of its own is a NotStored, one of the body is not."""
    with contextlib.ExitStack() as stack:
        try:
            unfinished = stack.enter_context(replacing)
        except OSError as error:
            raise NotStored(str(error)) from error
        yield unfinished
        try:
            stack.close()
        except OSError as error:
            raise NotStored(str(error)) from error


def key_of(data: ConfigDict, tokenizer: Any, settings: dict[str, Any]) -> str | None:
    """A hash of all that a stage's examples depend on; None where one part of it has none.

    Args:
      data: config.STAGE.data, of whose sources the content counts.
      settings: what else the stage's examples depend on, as JSON can hold it.

    Raises:
      DataError: a source that cannot be read.
    """
    tokenizer_hash = content_hash(tokenizer)
    if tokenizer_hash is None:
        return None
    data_settings = json.loads(data.to_json()) | {
        "source": _content(data, evaluation=False),
        "eval_source": _content(data, evaluation=True),
    }
    template = str(getattr(tokenizer, "chat_template", ""))
    today = str(datetime.date.today()) if "strftime_now" in template else ""
    parts = [data_settings, settings, tokenizer_hash, today, _code()]
    content = json.dumps(parts, sort_keys=True)
    return hashlib.sha256(content.encode()).hexdigest()[:32]


def _content(data: ConfigDict, *, evaluation: bool) -> str | list[str]:
    """What lies behind the sources. Of the embedded task the name: `_code` covers what makes it."""
    listed = sources_of(data, evaluation=evaluation)
    if not listed:
        return data.eval_source if evaluation else data.source
    return [sources.fingerprint(listed), *sources.labels(listed)]


@functools.cache
def _code() -> list[str]:
    """Hashes of the code that makes examples, and the versions of the libraries that it calls."""
    files = sorted(pathlib.Path(sources.__file__).parent.rglob("*.py"))
    modules = stage_data, selection, classifier_data
    files += [pathlib.Path(module.__file__) for module in modules]
    hashes = [hashlib.sha256(file.read_bytes()).hexdigest() for file in files]
    return hashes + [f"{name} {importlib.metadata.version(name)}" for name in LIBRARIES]
