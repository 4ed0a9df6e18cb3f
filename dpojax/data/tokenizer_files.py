"""Tokenizers of Hugging Face folders and hub names. No code of a folder ever runs."""

from __future__ import annotations

import os
import pathlib
from typing import Any

from dpojax.data.processes import check_template
from dpojax.models.huggingface import pretrained_name
from dpojax.models.special_tokens import PLAIN_DIALOGUE

FAST = "tokenizer.json"


def read_tokenizer(path: str | os.PathLike) -> Any:
    """The tokenizer in a folder, of a bucket too, or of a hub name.

    Raises:
      OSError: no such folder or hub name.
      ValueError: no tokenizer that can be read without code of the folder; the message says why,
        and what can be done.
      LimitExceeded: its chat template takes too much time or memory.
    """
    from transformers import AutoTokenizer  # brings torch where that is installed

    name = pretrained_name(path)
    try:
        tokenizer = AutoTokenizer.from_pretrained(name, trust_remote_code=False)
    except OSError:
        raise
    except Exception as error:  # transformers and tokenizers raise errors of every kind
        raise ValueError(f"{path}: {_cause(name, error)}") from error
    if not set(tokenizer.get_vocab()) - set(tokenizer.all_special_tokens):
        raise ValueError(f"{path}: the tokenizer has no vocabulary; is {FAST} missing?")
    check_template(tokenizer, PLAIN_DIALOGUE)
    return tokenizer


def _cause(name: str, error: Exception) -> str:
    if "trust_remote_code" in str(error):
        return (
            "model or tokenizer have code of their own (auto_map), which dpojax never runs; use "
            f"one of transformers' own classes, such as a folder with {FAST} of the same vocabulary"
        )
    folder = pathlib.Path(name)
    if folder.is_dir() and not (folder / FAST).exists():
        kind = "only a SentencePiece model" if list(folder.glob("*.model")) else "no tokenizer"
        return (
            f"the folder holds {kind} and no {FAST}; where transformers, sentencepiece and tiktoken"
            " are installed, AutoTokenizer.from_pretrained(folder).save_pretrained(new_folder) "
            f"writes {FAST}"
        )
    first = next(iter(str(error).splitlines()), "")
    return f"its tokenizer files cannot be read ({type(error).__name__}: {first[:200]})"
