"""The tokenizer of a run: a folder's, a model's, the embedded task's, or made from its texts."""

from __future__ import annotations

import hashlib
import json
import os
import pathlib
import shutil

import jax
from ml_collections import ConfigDict

from dpojax import sharding
from dpojax.config.checks import ConfigError, naming
from dpojax.data import reviews, sources
from dpojax.data.records import Record
from dpojax.data.vocabulary import train_tokenizer
from dpojax.stages.data import EMBEDDED, renames

TRAINED = "train:"  # config.tokenizer = "train:8192"
FOLDER = "tokenizer"  # of the workdir


def load_tokenizer(config: ConfigDict, workdir: pathlib.Path):
    """config.tokenizer, else the model's own, else the embedded task's.

    "train:SIZE" is one of so many ids, made once, from the texts of config.sft.data, and kept in
    the workdir.

    Raises:
      ConfigError: there is none; a size that is no number or too small.
    """
    path = config.tokenizer or config.model.path
    if config.tokenizer.startswith(TRAINED):
        path = _made(config, workdir / FOLDER)
    try:
        tokenizer = _read(path) if path else reviews.tokenizer()
    except (OSError, ValueError) as error:
        raise ConfigError(
            f"no tokenizer in {path!r} ({error}); set config.tokenizer to a folder or hub name"
        ) from error
    if config.chat_template:
        with naming("chat_template"):
            tokenizer.chat_template = pathlib.Path(config.chat_template).read_text()
    return tokenizer


def _read(path: str):
    from transformers import AutoTokenizer  # brings torch where that is installed

    return AutoTokenizer.from_pretrained(path)


def content_hash(tokenizer) -> str | None:
    """Of all that decides how it encodes a text or renders messages; None where that cannot be told
    (a tokenizer written in Python)."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        return None
    core = json.loads(backend.to_str())
    for changed_by_every_call in ("truncation", "padding"):
        core.pop(changed_by_every_call, None)
    kind, special = type(tokenizer).__qualname__, tokenizer.special_tokens_map
    options = [tokenizer.chat_template, tokenizer.split_special_tokens]
    content = json.dumps([kind, core, special, options], sort_keys=True, default=str)
    return hashlib.sha256(content.encode()).hexdigest()


def _made(config: ConfigDict, folder: pathlib.Path) -> str:
    """The folder of the tokenizer that this run makes; the first process does."""
    if jax.process_index() == 0 and not folder.exists():
        size, data = config.tokenizer.removeprefix(TRAINED), config.sft.data
        if not size.isdigit() or data.source == EMBEDDED:
            raise ConfigError(
                f"config.tokenizer = {config.tokenizer!r}: train:SIZE, such as train:8192, from "
                f"the texts of config.sft.data.source, here {data.source!r}"
            )
        found, _ = sources.load_records(
            data.source, split=data.split or None, form=data.form, columns=renames(data)
        )
        with naming("tokenizer"):
            tokenizer = train_tokenizer(map(_text, found[: data.limit or None]), int(size))
        unfinished = folder.parent / f".{folder.name}.partial-{os.getpid()}"
        try:
            tokenizer.save_pretrained(unfinished)
            os.replace(unfinished, folder)
        finally:
            shutil.rmtree(unfinished, ignore_errors=True)
    sharding.agreed(True)  # the others wait here until it is there
    return str(folder)


def _text(record: Record) -> str:
    parts = (record.prompt, record.responses[0])
    return "".join(
        part if isinstance(part, str) else "\n".join(turn["content"] for turn in part)
        for part in parts
    )
