"""Prompts to draw responses to, by the name that a config or a command line gives them."""

from __future__ import annotations

import pathlib

from dpojax.data import reviews, sources
from dpojax.data.records import DataError

EMBEDDED = "reviews"


def read_prompts(source: str, *, split: str, limit: int, seed: int) -> list[str]:
    """The first `limit` prompts (0: all) of a source, in order.

    Args:
      source: "reviews", the embedded task, which needs a limit; a .txt with a prompt in every line
        that is not empty; or what `sources.read` takes, with a field `prompt`.
      split, seed: of the embedded task.

    Raises:
      DataError: no prompt, or a record whose prompt is not text; it names the record.
    """
    if source == EMBEDDED:
        return reviews.prompts(split, limit, seed)
    if source.endswith(".txt"):
        path = pathlib.Path(source)
        if not path.is_file():
            raise DataError(f"{path.absolute()}: no such file")
        found = [line for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
    else:
        found = []
        for row, id in sources.read(source):
            if not isinstance(row.get("prompt"), str) or not row["prompt"]:
                raise DataError(
                    f"{id}: field 'prompt' should be text; the record has {sorted(row)}"
                )
            found.append(row["prompt"])
            if len(found) == limit:
                break
    if not found:
        raise DataError(f"{source}: holds no prompt")
    return found[: limit or None]
