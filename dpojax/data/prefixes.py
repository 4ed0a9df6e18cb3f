"""Prompts that are the first tokens of texts, as in the IMDb task of Rafailov et al. 2023."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator

SHORTEST, LONGEST = 2, 8  # tokens; appendix C.1 there
HELD_OUT = 0.1  # share of the texts
CHUNK = 256  # texts per call of the tokenizer


def prefixes(
    texts: Iterable[str], tokenizer, *, held_out: bool, limit: int = 0, seed: int = 0
) -> list[str]:
    """Draw prompts: the first 2 to 8 tokens of a text, as text.

    A hash of the text decides whether it is held out (the same for every seed), its place in the
    order and the number of its tokens in the prompt. Left out are texts that are too short, and
    prompts that the tokenizer encodes differently without the rest of the text.

    Args:
      texts: repeated ones count once.
      tokenizer: counts the tokens; a fast tokenizer of transformers, since it needs offsets.
      held_out: use the held-out texts, else all the others.
      limit: most prompts; 0 is all.
      seed: of the order and of the lengths.
    """
    chosen = [text for text in dict.fromkeys(texts) if is_held_out(text) == held_out]
    chosen.sort(key=lambda text: _draw(f"order {seed}", text))
    prompts: list[str] = []
    for start in range(0, len(chosen), CHUNK):
        prompts += _first_tokens(chosen[start : start + CHUNK], tokenizer, seed)
        if limit and len(prompts) >= limit:
            break
    return prompts[: limit or None]


def is_held_out(text: str) -> bool:
    """Whether a text is among the held-out ones, a share of `HELD_OUT`."""
    return _draw("split", text) < HELD_OUT


def _first_tokens(texts: list[str], tokenizer, seed: int) -> Iterator[str]:
    """The prompts of the texts that are long enough, if the tokenizer reads them as they were."""
    options = {"add_special_tokens": False, "verbose": False}
    encoded = tokenizer(texts, return_offsets_mapping=True, **options)
    prompts, prompt_ids = [], []
    for text, ids, offsets in zip(texts, encoded["input_ids"], encoded["offset_mapping"]):
        count = SHORTEST + int(_draw(f"length {seed}", text) * (LONGEST - SHORTEST + 1))
        if len(ids) > count:
            _, end = offsets[count - 1]
            prompts.append(text[:end])
            prompt_ids.append(ids[:count])
    alone = tokenizer(prompts, **options)["input_ids"] if prompts else []
    return (text for text, ids, again in zip(prompts, prompt_ids, alone) if ids == again)


def _draw(name: str, text: str) -> float:
    """A number in [0, 1) from a hash of `name` and `text`."""
    digest = hashlib.sha256(f"{name}\n{text}".encode()).digest()
    return int.from_bytes(digest[:6]) / 2**48
