"""Token ids and the rows of a model's table: only ids that the data use need a row."""

from __future__ import annotations

import logging
from collections.abc import Iterable
from typing import Any

import numpy as np

from dpojax.data.examples import Example, Examples
from dpojax.data.records import DataError

_log = logging.getLogger(__name__)

UNUSUAL = 1024  # published tables have at most a few hundred rows more than their tokenizer has ids


def rows_for(tokenizer: Any) -> int:
    """How many rows a new model's table needs: one for every id, those between ids included."""
    return max(tokenizer.get_vocab().values()) + 1


def tell_of_mismatch(tokenizer: Any, rows: int, *, chosen: bool) -> None:
    """Warn where tokenizer and model have different numbers of ids.

    Args:
      rows: of the model's table.
      chosen: whether the config names a tokenizer besides the model.
    """
    ids = rows_for(tokenizer)
    if ids > rows:
        _log.warning(
            "the tokenizer has ids up to %d, the model only %d rows: examples that use the others "
            "are refused",
            ids - 1,
            rows,
        )
    elif chosen and rows > ids + UNUSUAL:
        _log.warning(
            "the tokenizer has ids up to %d, the model %d rows: does config.tokenizer belong to "
            "config.model.path?",
            ids - 1,
            rows,
        )


def require_rows(examples: Examples, rows: int, tokenizer: Any) -> None:
    """Check that every token id of the examples has a row in a table of `rows`.

    Raises:
      DataError: one has none; the message names the record and the token.
    """
    if examples.largest_id() < rows:
        return
    for example in examples:
        _require_rows_of(example.id, _ids(example), rows, tokenizer)


def require_rows_of_prompts(
    source: str, prompts: Iterable[np.ndarray], rows: int, tokenizer: Any
) -> None:
    """As `require_rows`, for encoded prompts of a source; the message counts them from 1."""
    for number, prompt in enumerate(prompts, start=1):
        _require_rows_of(f"{source}, prompt {number}", prompt, rows, tokenizer)


def _ids(example: Example) -> np.ndarray:
    return np.concatenate([example.prompt, *example.responses])


def _require_rows_of(name: str, ids: np.ndarray, rows: int, tokenizer: Any) -> None:
    beyond = np.asarray(ids)[np.asarray(ids) >= rows]
    if beyond.size:
        token = tokenizer.convert_ids_to_tokens(int(beyond[0]))
        raise DataError(
            f"{name}: the token {token!r} has the id {beyond[0]}, but the model's table has only "
            f"{rows} rows, 0 to {rows - 1}; use the model's own tokenizer, or leave out texts and "
            "templates with this token"
        )
