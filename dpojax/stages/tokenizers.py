"""The tokenizer of a run: a folder's, a model's, the embedded task's, or made from its texts."""

from __future__ import annotations

import hashlib
import json
import pathlib
from collections.abc import Mapping
from typing import Any

from ml_collections import ConfigDict

from dpojax import sharding, storage
from dpojax.config.contents import TRAINED_HERE
from dpojax.config.data_sources import sources_of
from dpojax.config.errors import ConfigError, config_errors
from dpojax.data import processes, reviews, sources
from dpojax.data.records import DataError, Record, message_text
from dpojax.data.tokenizer_files import read_tokenizer
from dpojax.data.vocabulary import train_tokenizer
from dpojax.models.huggingface import pretrained_name, save_tokenizer
from dpojax.models.special_tokens import PLAIN_DIALOGUE, end_tokens
from dpojax.stages.data import EMBEDDED, parse_config
from dpojax.watchdog import unwatched

FOLDER = "tokenizer"  # of the workdir


def load_tokenizer(config: ConfigDict, workdir: storage.Path) -> Any:
    """The tokenizer that config.tokenizer names, else the model's, else the embedded task's.

    "train:SIZE" makes one of SIZE ids from the texts of config.sft.data, once, and keeps it in the
    workdir.

    Raises:
      ConfigError: there is no tokenizer; a size that is not a number or is too small.
    """
    path = config.tokenizer or config.model.path
    if config.tokenizer.startswith(TRAINED_HERE):
        path = str(_trained_here(config, workdir / FOLDER))
    try:
        tokenizer = read_tokenizer(path) if path else reviews.tokenizer()
    except DataError:
        raise
    except (OSError, ValueError) as error:
        raise ConfigError(
            f"no tokenizer in {path!r} ({error}); set config.tokenizer to a folder or hub name"
        ) from error
    if config.chat_template:
        with config_errors("chat_template"):
            tokenizer.chat_template = _chosen_template(tokenizer, config.chat_template)
        processes.check_template(tokenizer, PLAIN_DIALOGUE)
    return tokenizer


def _chosen_template(tokenizer: Any, choice: str) -> str:
    """The tokenizer's template of this name, or the text of this file."""
    named = tokenizer.chat_template if isinstance(tokenizer.chat_template, dict) else {}
    if choice in named:
        return named[choice]
    try:
        return storage.as_path(choice).read_text()
    except OSError as error:
        known = f", nor one of the tokenizer's templates: {', '.join(named)}" if named else ""
        raise ConfigError(f"config.chat_template = {choice!r}: no such file{known}") from error


def stop_tokens(tokenizer: Any, path: str) -> tuple[int, ...]:
    """Ids that end a response.

    The tokenizer's EOS, the end of its chat template's turns, and those of the model's generation
    config.
    """
    config = read_generation_config(path)
    ids = None if config is None else config.eos_token_id
    ids = ids if isinstance(ids, list) else [ids]
    return tuple(sorted({*end_tokens(tokenizer), *ids} - {None}))


def read_generation_config(path: str) -> Any | None:
    """transformers' GenerationConfig of a model; None where the model has none, or `path` is "".

    Raises:
      ConfigError: the model has one that cannot be read.
    """
    if not path:
        return None
    from transformers import GenerationConfig  # brings torch where that is installed

    name = pretrained_name(path)
    file = pathlib.Path(name) / "generation_config.json"
    try:
        config = GenerationConfig.from_pretrained(name)
    except Exception as error:  # of every kind, where the file is damaged
        if isinstance(error, OSError) and not file.is_file():
            return None
        first = next(iter(str(error).splitlines()), "")
        raise ConfigError(f"{file}: cannot be read ({type(error).__name__}: {first})") from error
    ids = config.eos_token_id if isinstance(config.eos_token_id, list) else [config.eos_token_id]
    if not all(token is None or type(token) is int for token in ids):
        raise ConfigError(f"{file}: eos_token_id: must be ids, not {config.eos_token_id!r}")
    return config


def vocabulary_hash(tokenizer: Any) -> str:
    """A hash of the tokenizer's words with their ids."""
    vocabulary = sorted(tokenizer.get_vocab().items())
    return hashlib.sha256(json.dumps(vocabulary).encode()).hexdigest()


def content_hash(tokenizer: Any) -> str | None:
    """A hash of all that decides how a tokenizer encodes a text or renders messages.

    None where that cannot be told: a tokenizer written in Python.
    """
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


def _trained_here(config: ConfigDict, folder: storage.Path) -> storage.Path:
    """The folder of the tokenizer that this run makes; the first process makes it."""
    size, data = config.tokenizer.removeprefix(TRAINED_HERE), config.sft.data
    if not size.isdigit() or data.source == EMBEDDED:
        raise ConfigError(
            f"config.tokenizer = {config.tokenizer!r}: train:SIZE, such as train:8192, from "
            f"the texts of config.sft.data.source, here {data.source!r}"
        )

    def train() -> None:
        if folder.exists():
            return
        records, _ = sources.load_records(sources_of(data), config=parse_config(data))
        with config_errors("tokenizer"), unwatched():
            tokenizer = train_tokenizer(map(_text, records[: data.limit or None]), int(size))
        with storage.replacing_folder(folder) as unfinished:
            save_tokenizer(tokenizer, unfinished)

    sharding.on_first_process(train)
    return folder


def _text(record: Record) -> str:
    return "".join(map(_part_text, (record.prompt, record.responses[0])))


def _part_text(part: str | list[Mapping[str, str]]) -> str:
    return part if isinstance(part, str) else "\n".join(map(message_text, part))
