"""Reads the prompts to sample responses for, from a source that a config or command names."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import Any

from dpojax import storage
from dpojax.data import reviews, sources, text_files
from dpojax.data.prefixes import prefixes
from dpojax.data.records import DataError

EMBEDDED = "reviews"
PREFIXES = "prefixes:"


def read_prompts(
    source: str, *, split: str, limit: int, seed: int, tokenizer: Any = None
) -> list[str]:
    """Read the first prompts of a source, in order.

    Args:
      source: one of

        * "reviews": the embedded task; `limit` may not be 0;
        * a .txt file with a prompt in each line that is not empty;
        * "prefixes:SOURCE" or "prefixes:SOURCE@SPLIT": the first tokens of the texts in the field
          `text`, see `prefixes.prefixes`; SOURCE is what `sources.read` takes;
        * what `sources.read` takes, with the prompt in the field `prompt`.
      split: "train" or "eval" (held out), for the embedded task and prefixes.
      limit: most prompts; 0 is all.
      seed: for the embedded task and prefixes.
      tokenizer: for prefixes.

    Raises:
      DataError: no prompt, or a record whose prompt is not text; the message names it.
    """
    if source == EMBEDDED:
        return reviews.prompts(split, limit, seed)
    if source.startswith(PREFIXES):
        texts = _texts(source.removeprefix(PREFIXES))
        prompts = prefixes(texts, tokenizer, held_out=split == "eval", limit=limit, seed=seed)
    elif source.endswith(".txt"):
        prompts = list(itertools.islice(_lines(storage.as_path(source)), limit or None))
    else:
        prompts = list(itertools.islice(_field("prompt", source, None), limit or None))
    if not prompts:
        raise DataError(f"{source}: holds no prompt")
    return prompts[: limit or None]


def _lines(path: storage.Path) -> Iterator[str]:
    """The lines of a text file that are not empty."""
    if not path.exists():
        raise DataError(f"{path}: no such file")
    for number, line in text_files.lines(path):
        yield text_files.decoded(path, number, line).removesuffix("\r")


def _texts(source: str) -> Iterator[str]:
    path, at, split = source.rpartition("@")
    if not at or storage.as_path(source).exists():
        path, split = source, ""
    return _field("text", path, split or None)


def _field(name: str, source: str, split: str | None) -> Iterator[str]:
    for row, id in sources.read(source, split=split):
        if not isinstance(row.get(name), str) or not row[name]:
            raise DataError(f"{id}: field {name!r} should be text; the record has {sorted(row)}")
        yield row[name]
