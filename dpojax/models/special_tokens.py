"""The special tokens of a tokenizer that a model's folder has to name: ends and padding."""

from __future__ import annotations

import copy
from typing import Any

ANSWER = "an answer"  # a text that no template changes
PLAIN_DIALOGUE = (
    {"role": "user", "content": "a question"},
    {"role": "assistant", "content": ANSWER},
)
NEW_PADDING = "<|pad|>"
UNUSED = ("pad", "reserved", "unused")  # parts of special tokens that no text contains


def turn_end(tokenizer: Any) -> int | None:
    """The special token with which the chat template ends an assistant's turn; None without one.

    It is often another one than EOS: base models have `<|endoftext|>` as EOS, and templates that
    end turns with `<|im_end|>`.
    """
    if not getattr(tokenizer, "chat_template", None):
        return None
    try:
        text = tokenizer.apply_chat_template([*PLAIN_DIALOGUE], tokenize=False)
    except Exception:  # a template may raise anything; then it ends no turn of ours
        return None
    after = text.rpartition(ANSWER)[2].lstrip() if ANSWER in text else ""
    ids = tokenizer(after, add_special_tokens=False)["input_ids"] if after else []
    return ids[0] if ids and ids[0] in tokenizer.added_tokens_decoder else None


def end_tokens(tokenizer: Any) -> tuple[int, ...]:
    """The ids that end a response: EOS, then the end of the template's turns if it is another."""
    ids = (getattr(tokenizer, "eos_token_id", None), turn_end(tokenizer))
    return tuple(dict.fromkeys(id for id in ids if id is not None))


def token_ids(tokenizer: Any, vocab_size: int) -> dict[str, int | list[int]]:
    """The ids that the tokenizer has and the model knows, by their keys in config.json.

    Args:
      vocab_size: rows of the model's embedding; transformers refuses a padding beyond them.
    """
    ends = [id for id in end_tokens(tokenizer) if id < vocab_size]
    ids = {"eos_token_id": ends if len(ends) > 1 else ends[0]} if ends else {}
    for key in ("bos_token_id", "pad_token_id"):
        id = getattr(tokenizer, key, None)
        if id is not None and id < vocab_size:
            ids[key] = id
    return ids


def with_own_padding(tokenizer: Any) -> Any:
    """The tokenizer, or a copy, with a padding token that ends no response.

    The reward models of transformers score the last token that is not padding. Where EOS is the
    padding as well, that is the token before EOS, and not EOS. A token that the tokenizer has is
    taken if no text can contain it; else a new one is added.
    """
    ends = end_tokens(tokenizer)
    if tokenizer.pad_token_id is not None and tokenizer.pad_token_id not in ends:
        return tokenizer
    tokenizer = copy.deepcopy(tokenizer)
    special = tokenizer.added_tokens_decoder.items()
    named = [
        str(token)
        for part in UNUSED
        for id, token in sorted(special)
        if token.special and part in str(token).lower() and id not in ends
    ]
    unknown = tokenizer.unk_token_id
    if named:
        tokenizer.pad_token = named[0]
    elif unknown is not None and unknown not in ends:
        tokenizer.pad_token = tokenizer.unk_token
    else:
        tokenizer.add_special_tokens({"pad_token": NEW_PADDING})
    return tokenizer
