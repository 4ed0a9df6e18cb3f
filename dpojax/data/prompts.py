"""Prompts to draw responses to, by the name that a config or a command line gives them."""

from __future__ import annotations

import itertools
import pathlib
from collections.abc import Iterator
from typing import Any

from dpojax.data import reviews, sources
from dpojax.data.prefixes import prefixes
from dpojax.data.records import DataError

EMBEDDED = "reviews"
PREFIXES = "prefixes:"


def read_prompts(
    source: str, *, split: str, limit: int, seed: int, tokenizer: Any = None
) -> list[str]:
    """The first `limit` prompts (0: all) of a source, in order.

    Args:
      source: "reviews", the embedded task, which needs a limit; a .txt with a prompt in every line
        that is not empty; what `sources.read` takes, with a field `prompt`; or "prefixes:SOURCE"
        (or "prefixes:SOURCE@SPLIT"), the beginnings of the texts in its field `text`.
      split, seed: of the embedded task and of prefixes: "train", or "eval", which are held out.
      tokenizer: counts the tokens of prefixes; nothing else needs it.

    Raises:
      DataError: no prompt, or a record whose prompt is not text; it names the record.
    """
    if source == EMBEDDED:
        return reviews.prompts(split, limit, seed)
    if source.startswith(PREFIXES):
        texts = _texts(source.removeprefix(PREFIXES))
        found = prefixes(texts, tokenizer, held_out=split == "eval", limit=limit, seed=seed)
    elif source.endswith(".txt"):
        path = pathlib.Path(source)
        if not path.is_file():
            raise DataError(f"{path.absolute()}: no such file")
        found = [line for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
    else:
        found = list(itertools.islice(_field("prompt", source, None), limit or None))
    if not found:
        raise DataError(f"{source}: holds no prompt")
    return found[: limit or None]


def _texts(source: str) -> Iterator[str]:
    path, at, split = source.rpartition("@")
    if not at or pathlib.Path(source).exists():
        path, split = source, ""
    return _field("text", path, split or None)


def _field(name: str, source: str, split: str | None) -> Iterator[str]:
    for row, id in sources.read(source, split=split):
        if not isinstance(row.get(name), str) or not row[name]:
            raise DataError(f"{id}: field {name!r} should be text; the record has {sorted(row)}")
        yield row[name]
