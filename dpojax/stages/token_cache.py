"""Data are tokenised once: a stage's examples in one file, named by a hash of all they depend on.

Runs, members of a sweep and jobs of a frontier may share the folder, and read and write it at the
same time. A file is there as a whole or not at all, and one name has one content. So every process
of a run looks for the file by itself, and only the first process writes it.
"""

from __future__ import annotations

import datetime
import functools
import hashlib
import importlib.metadata
import json
import pathlib
from collections.abc import Callable
from typing import Any

from ml_collections import ConfigDict

from dpojax import storage
from dpojax.data import examples, sources
from dpojax.data.examples import Examples
from dpojax.data.report import Report
from dpojax.stages import classifier_data
from dpojax.stages import data as stage_data
from dpojax.stages.data import EMBEDDED, StageData
from dpojax.stages.tokenizers import content_hash

FOLDER = "tokens"  # of the workdir
LIBRARIES = ("datasets", "jinja2", "numpy", "tokenizers", "transformers")


def cached(
    folder: storage.Path, key: Callable[[], str | None], load: Callable[[], StageData]
) -> StageData:
    """The examples in folder/KEY.arrow, or those that load() reads, which `save` can keep there.

    Args:
      key: the file's name; None if nothing tells what the examples depend on.

    Raises:
      DataError: the file is damaged; and what key() and load() raise.
    """
    name = key()
    file = None if name is None else folder / f"{name}.arrow"
    if file is not None and file.exists():
        loaded, about = examples.load(file)
        reports = {part: Report.from_content(x) for part, x in about["reports"].items()}
        return StageData(loaded, about["train"], reports, tuple(about["labels"]), file, cached=True)
    data = load()
    if key() != name:  # the data changed while they were read
        file = None
    return data._replace(examples=Examples.of(data.examples), file=file)


def save(data: StageData) -> str:
    """Keep the examples for the next run, with the reports on them, unless they are kept already.

    A folder that takes no file stops no run: the examples are in memory.

    Returns:
      where the examples come from or are kept, for a person.
    """
    if data.file is None:
        return "not kept: the data changed meanwhile, or nothing tells what the tokenizer does"
    if data.cached:
        return f"read from {data.file}"
    reports = {part: report.to_content() for part, report in data.reports.items()}
    about = {"train": data.train, "labels": data.labels, "reports": reports}
    try:
        examples.save(data.file, data.examples, about)
    except OSError as error:
        return f"not kept: {error}"
    return f"kept in {data.file}"


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
        "source": _content(data.source, data.split),
        "eval_source": _content(data.eval_source, data.eval_split),
    }
    template = str(getattr(tokenizer, "chat_template", ""))
    today = str(datetime.date.today()) if "strftime_now" in template else ""
    parts = [data_settings, settings, tokenizer_hash, today, _code()]
    content = json.dumps(parts, sort_keys=True)
    return hashlib.sha256(content.encode()).hexdigest()[:32]


def _content(source: str, split: str) -> str:
    """Of the embedded task the name: `_code` covers what makes it."""
    if source in ("", EMBEDDED):
        return source
    return sources.fingerprint(source, split=split or None)


@functools.cache
def _code() -> list[str]:
    """Hashes of the code that makes examples, and the versions of the libraries that it calls."""
    files = sorted(pathlib.Path(sources.__file__).parent.glob("*.py"))
    files += [pathlib.Path(module.__file__) for module in (stage_data, classifier_data)]
    hashes = [hashlib.sha256(file.read_bytes()).hexdigest() for file in files]
    return hashes + [f"{name} {importlib.metadata.version(name)}" for name in LIBRARIES]
