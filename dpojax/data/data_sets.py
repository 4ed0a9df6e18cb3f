"""Data sets of several files: folders, what `datasets` saved, and names on the Hugging Face hub.

`datasets` finds the files of a folder by split and subset; they are read as single files are. No
code of a folder or of the hub ever runs.
"""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Iterator
from typing import Any

from dpojax import storage
from dpojax.data.json_files import choose
from dpojax.data.records import DataError, without_invented_nulls
from dpojax.data.table_files import with_class_names
from dpojax.watchdog import beat

SAVED = ("state.json", "dataset_dict.json")  # of Dataset.save_to_disk


def files_of(
    folder: storage.Path, *, split: str, subset: str, data_dir: str
) -> list[storage.Path] | None:
    """The files of one split of a folder, in order; None for what `datasets` saved.

    Args:
      split: "" is the only one.
      subset: a name in the `configs` of the folder's README.md; "" is the only one.
      data_dir: a folder inside the folder; "" is all of it.

    Raises:
      DataError: there is no such split, subset or folder, or no data file.
    """
    local = storage.local_copy(folder)
    if any((local / name).exists() for name in SAVED):
        if subset or data_dir:
            raise DataError(f"{folder}: was saved by `datasets` and has no subsets or data_dir")
        return None
    import datasets

    with reading(folder):
        builder = datasets.load_dataset_builder(
            str(local), name=subset or None, data_dir=data_dir or None
        )
    by_split = builder.config.data_files or {}
    if not by_split:
        raise DataError(f"{folder}: holds no data file")
    names = by_split[choose(by_split, split, str(folder))]
    for name in names:
        if not storage.is_local(name):
            raise DataError(f"{folder}: names {name}, which lies outside of it; fetch the file")
    return [storage.Path(name) for name in names]


def saved_rows(folder: storage.Path, split: str) -> Iterator[tuple[dict, int]]:
    """Yield (row, number) of a folder that `datasets` saved."""
    import datasets

    with reading(folder):
        opened = datasets.load_from_disk(str(storage.local_copy(folder)))
        if split and not isinstance(opened, dict):
            raise DataError(f"{folder}: has no splits, but split {split!r} was asked for")
        yield from _numbered(_chosen(opened, split, str(folder)))


def hub_rows(name: str, *, split: str, subset: str, revision: str, data_dir: str):
    """Yield (row, number) of a data set on the hub, as it arrives.

    Without a connection the copy in the cache of `datasets` is read.
    """
    with reading(name):
        opened = _opened(name, split, subset, revision, data_dir)
        yield from _numbered(_chosen(opened, split, name))


def hub_fingerprint(name: str, *, split: str, subset: str, revision: str, data_dir: str) -> str:
    """The commit that a name on the hub stands for now; offline, of the data in the cache."""
    with reading(name):
        if not _is_offline():
            import huggingface_hub

            return huggingface_hub.HfApi().dataset_info(name, revision=revision or None).sha
        opened = _opened(name, split, subset, revision, data_dir)
        return _chosen(opened, split, name)._fingerprint


def _opened(name: str, split: str, subset: str, revision: str, data_dir: str) -> Any:
    import datasets

    streaming = not _is_offline()
    options = {"name": subset, "revision": revision, "data_dir": data_dir, "split": split}
    return datasets.load_dataset(
        name,
        streaming=streaming,
        trust_remote_code=False,
        **{key: value for key, value in options.items() if value},
    )


def _is_offline() -> bool:
    import datasets

    return datasets.config.HF_HUB_OFFLINE


def _chosen(opened: Any, split: str, name: str) -> Any:
    """The split of what was opened, where it is not chosen already."""
    return opened[choose(opened, split, name)] if isinstance(opened, dict) else opened


def _numbered(rows: Any) -> Iterator[tuple[dict, int]]:
    features = rows.features or {}
    for row, number in zip(rows, itertools.count(1)):
        beat("data are read")
        yield without_invented_nulls(with_class_names(row, features)), number


@contextlib.contextmanager
def reading(path: storage.Path | str) -> Iterator[None]:
    """Turn errors of `datasets` into a DataError that names the path."""
    import datasets
    import huggingface_hub.errors
    import yaml

    try:
        yield
    except DataError:
        raise
    except (
        OSError,
        ValueError,
        RuntimeError,
        datasets.exceptions.DatasetsError,
        huggingface_hub.errors.HfHubHTTPError,
        yaml.YAMLError,
    ) as error:
        place = storage.as_path(path)
        reason = " ".join(str(error).split())
        if "scripts are no longer supported" in reason:
            reason += "; a script is code, and no code of a data set is run: give its data files"
        elif "Config name is missing" in reason or "BuilderConfig" in reason:
            reason += "; choose a subset with data.subset, or as NAME:SUBSET"
        kind = "a file, nor as a hub data set" if isinstance(path, str) else "a data set"
        raise DataError(f"{place}: cannot be read as {kind}: {reason}") from error
