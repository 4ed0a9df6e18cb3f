"""The content behind the paths of a config: what a resumed run compares, instead of names.

A path says where a file lies, not what is in it. Two runs with the same config give the same result
only if data, tokenizer, chat template and weights are the same bytes.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Mapping
from typing import NamedTuple

from ml_collections import ConfigDict

from dpojax import storage
from dpojax.config.errors import config_errors
from dpojax.data import sources
from dpojax.data.prompts import EMBEDDED, PREFIXES
from dpojax.evaluation.rewards import folder_of
from dpojax.models.huggingface import CENTRE, local_folder

WEIGHTS = ("config.json", "*.safetensors", "*.safetensors.index.json")
GENERATION = ("generation_config.json",)  # names ids that end a response
TOKENIZER = ("tokenizer*", "vocab*", "merges*", "special_tokens*", "added_tokens*", "*.model")
TOKENIZER += ("chat_template*", "spiece*")
ADAPTERS = ("adapter_*",)
TRAINED_HERE = "train:"  # a tokenizer that the run makes from the texts of sft.data


class Content(NamedTuple):
    """What lies behind a path: the path as the config has it, and a hash of the bytes there."""

    path: str
    hash: str


def contents_of(config: ConfigDict) -> dict[str, Content]:
    """Every file or folder that decides the result of a run, by the key that names it.

    The embedded task has no files: the code makes it.

    Raises:
      DataError, ConfigError: something is not there or cannot be read.
    """
    contents = {}
    for key, path, content_hash in _named(config):
        if path:
            with config_errors(key):
                contents[key] = Content(path, content_hash(path))
    return contents


def changed_contents(
    before: Mapping[str, Content], now: Mapping[str, Content]
) -> dict[str, tuple[Content, Content]]:
    """Keys whose content is another one than before, with both."""
    both = before.keys() & now.keys()
    return {key: (before[key], now[key]) for key in sorted(both) if before[key][1] != now[key][1]}


def moved_keys(before: Mapping[str, Content], now: Mapping[str, Content]) -> set[str]:
    """Keys whose path may differ, because what lies there is the same."""
    return {key for key in before.keys() & now.keys() if before[key][1] == now[key][1]}


def _named(config: ConfigDict) -> Iterator[tuple[str, str, Callable[[str], str]]]:
    """(key, path, what hashes the content there), also of keys that name nothing ("")."""
    yield "model.path", config.model.path, _files((*WEIGHTS, *GENERATION))
    if config.tokenizer.startswith(TRAINED_HERE):
        yield from _data("sft", config)
    else:
        yield "tokenizer", config.tokenizer or config.model.path, _files(TOKENIZER)
    yield "chat_template", config.chat_template, _file
    if config.samples.reward:
        yield "samples.reward", config.samples.reward, _reward
        yield "samples.prompts", config.samples.prompts, _prompts
    for name in config.stages:
        stage = config[name]
        if "data" in stage:
            yield from _data(name, config)
        if "lora" in stage:
            yield f"{name}.lora.adapters", stage.lora.adapters, _files(ADAPTERS)
        if "reference" in stage:
            yield f"{name}.reference.path", stage.reference.path, _files(WEIGHTS)
        if "prompts" in stage:
            yield f"{name}.prompts", stage.prompts, _prompts
            yield f"{name}.reward", stage.reward, _reward


def _data(name: str, config: ConfigDict) -> Iterator[tuple[str, str, Callable[[str], str]]]:
    data = config[name].data
    for key, split in (("source", data.split), ("eval_source", data.eval_split)):
        path = "" if data[key] == EMBEDDED else data[key]
        yield f"{name}.data.{key}", path, _records(split)


def _records(split: str) -> Callable[[str], str]:
    return lambda path: sources.fingerprint(path, split=split or None)


def _files(patterns: tuple[str, ...]) -> Callable[[str], str]:
    """Hashes the files of a model's folder that match a pattern; the hub's are fetched first."""

    def content_hash(name: str) -> str:
        folder, digest = local_folder(name, list(patterns)), hashlib.sha256()
        for path in sorted({path for pattern in patterns for path in folder.glob(pattern)}):
            if path.is_file():
                digest.update(f"{path.name} {storage.content_hash(path)}\n".encode())
        return digest.hexdigest()

    return content_hash


def _file(name: str) -> str:
    return storage.content_hash(storage.as_path(name))


def _reward(spec: str) -> str:
    """Hashes the kind, label and folder of a reward; one without a folder stands for itself."""
    folder = folder_of(spec)
    if not folder:
        return spec
    return _hash_of_use(spec, folder, _files((*WEIGHTS, CENTRE, *TOKENIZER))(folder))


def _prompts(source: str) -> str:
    """Hashes the file of prompts, its split, and whether its texts or their prefixes are meant."""
    path, split = source.removeprefix(PREFIXES), ""
    if path == EMBEDDED:
        return source
    if "@" in path and not storage.as_path(path).exists():
        path, _, split = path.rpartition("@")
    return _hash_of_use(source, path, sources.fingerprint(path, split=split or None))


def _hash_of_use(spec: str, path: str, content_hash: str) -> str:
    """A hash of what lies at a path, and of all that `spec` says besides the path."""
    use = spec.replace(path, "PATH", 1)
    return hashlib.sha256(f"{use} {content_hash}".encode()).hexdigest()
