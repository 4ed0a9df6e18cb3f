"""Prompts that are the beginnings of texts, as in the IMDb task of Rafailov et al. 2023."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator

SHORTEST, LONGEST = 2, 8  # tokens; their appendix C.1
HELD_OUT = 0.1  # share of the texts
CHUNK = 256  # texts of a call of the tokenizer


def prefixes(
    texts: Iterable[str], tokenizer, *, held_out: bool, limit: int = 0, seed: int = 0
) -> list[str]:
    """The first 2 to 8 tokens of `limit` texts (0: all), as text, in an order drawn by `seed`.

    Everything is keyed by the text: whether it is held out (for every seed alike), its place in the
    order and its number of tokens. Left out are texts of fewer tokens and beginnings that the
    tokenizer, given them alone, would read as other tokens.

    Args:
      tokenizer: counts the tokens; of transformers, with offsets.
    """
    own = [text for text in dict.fromkeys(texts) if (_draw("split", text) < HELD_OUT) == held_out]
    own.sort(key=lambda text: _draw(f"order {seed}", text))
    found = []
    for start in range(0, len(own), CHUNK):
        found += _cut(own[start : start + CHUNK], tokenizer, seed)
        if limit and len(found) >= limit:
            break
    return found[: limit or None]


def _cut(texts: list[str], tokenizer, seed: int) -> Iterator[str]:
    how = {"add_special_tokens": False, "verbose": False}
    whole = tokenizer(texts, return_offsets_mapping=True, **how)
    beginnings, ids = [], []
    for text, tokens, offsets in zip(texts, whole["input_ids"], whole["offset_mapping"]):
        count = SHORTEST + int(_draw(f"length {seed}", text) * (LONGEST - SHORTEST + 1))
        if len(tokens) > count:
            beginnings.append(text[: offsets[count - 1][1]])
            ids.append(tokens[:count])
    again = tokenizer(beginnings, **how)["input_ids"] if beginnings else []
    return (text for text, own, alone in zip(beginnings, ids, again) if own == alone)


def _draw(name: str, text: str) -> float:
    """A number in [0, 1) that belongs to the text."""
    digest = hashlib.sha256(f"{name}\n{text}".encode()).digest()
    return int.from_bytes(digest[:6]) / 2**48
