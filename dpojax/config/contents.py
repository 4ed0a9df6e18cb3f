"""The content behind the paths of a config: what a resumed run compares, instead of names.

A path says where a file lies, not what is in it. Two runs with the same config give the same result
only if data, tokenizer, chat template and weights are the same bytes.
"""

from __future__ import annotations

import functools
import hashlib
import os
import types
from collections.abc import Callable, Iterable, Mapping
from typing import NamedTuple

from ml_collections import ConfigDict

from dpojax import storage
from dpojax.config.data_sources import sources_of
from dpojax.config.errors import config_errors
from dpojax.data import sources
from dpojax.data.prompts import EMBEDDED, PREFIXES
from dpojax.evaluation.judging.open_judge import folder_of as folder_of_judge
from dpojax.evaluation.rewards import folder_of
from dpojax.models.huggingface import CENTRE, local_folder

WEIGHTS = ("config.json", "*.safetensors", "*.safetensors.index.json")
GENERATION = ("generation_config.json",)  # names ids that end a response
TOKENIZER = ("tokenizer*", "vocab*", "merges*", "special_tokens*", "added_tokens*", "*.model")
TOKENIZER += ("chat_template*", "spiece*")
ADAPTERS = ("adapter_*",)
MOST_FILES, SHOWN = 200, 5  # of a folder: whose hashes are kept, and that a message names
TRAINED_HERE = "train:"  # a tokenizer that the run makes from the texts of sft.data


class Content(NamedTuple):
    """What lies behind a path.

    Attributes:
      path: as the config has it.
      hash: of the bytes there, and of how the run uses them.
      files: the sha256 of each file of a folder, cut short; empty for one file and for very many.
    """

    path: str
    hash: str
    files: Mapping[str, str] = types.MappingProxyType({})

    def differences(self, now: Content) -> str:
        """Names of the files that were changed, added and removed since; "" if nothing tells."""
        if not self.files or not now.files:
            return ""
        both = self.files.keys() & now.files.keys()
        names = {
            "changed": [name for name in both if self.files[name] != now.files[name]],
            "added": now.files.keys() - both,
            "removed": self.files.keys() - both,
        }
        return "; ".join(
            f"{what}: {', '.join(sorted(some)[:SHOWN])}" + (", ..." if len(some) > SHOWN else "")
            for what, some in names.items()
            if some
        )


class NamedPath(NamedTuple):
    """A path in a config that decides the result of a run.

    Attributes:
      key: dotted, of the config.
      path: as the config has it; "" names nothing.
      content_hash: path -> a hash of what lies there, and of how the run uses it.
    """

    key: str
    path: str
    content_hash: Callable[[str], str]


def contents_of(paths: Iterable[NamedPath]) -> dict[str, Content]:
    """Hash what lies behind paths, by the key that names them.

    Raises:
      DataError, ConfigError: something is not there or cannot be read.
    """
    contents = {}
    for key, path, content_hash in paths:
        if path:
            with config_errors(key):
                with storage.recorded_hashes() as hashes:
                    content = content_hash(path)
                contents[key] = Content(path, content, _named_files(hashes))
    return contents


def _named_files(hashes: Mapping[str, str]) -> dict[str, str]:
    """Short hashes of files, by their names below the folder that all of them share."""
    if not 1 < len(hashes) <= MOST_FILES:
        return {}
    folder = os.path.commonpath(hashes) + "/"
    return {path.removeprefix(folder): hashes[path][:16] for path in sorted(hashes)}


def changed_contents(
    before: Mapping[str, Content], now: Mapping[str, Content]
) -> dict[str, tuple[Content, Content]]:
    """Keys whose content is another one than before, with both."""
    both = before.keys() & now.keys()
    return {key: (before[key], now[key]) for key in sorted(both) if before[key][1] != now[key][1]}


def moved_keys(before: Mapping[str, Content], now: Mapping[str, Content]) -> set[str]:
    """Keys whose path may differ, because what lies there is the same."""
    return {key for key in before.keys() & now.keys() if before[key][1] == now[key][1]}


def shared_paths(config: ConfigDict) -> list[NamedPath]:
    """The paths that all stages of a run read."""
    paths = [NamedPath("model.path", config.model.path, _files((*WEIGHTS, *GENERATION)))]
    if not config.tokenizer.startswith(TRAINED_HERE):
        name = config.tokenizer or config.model.path
        paths.append(NamedPath("tokenizer", name, _files(TOKENIZER)))
    else:
        paths += data_paths(config, "sft")  # from whose texts the run makes the tokenizer
    if _is_file_name(config.chat_template):
        paths.append(NamedPath("chat_template", config.chat_template, _file))
    return paths


def _is_file_name(template: str) -> bool:
    """Whether config.chat_template names a file; else it names one of the tokenizer's templates."""
    path = storage.as_path(template or ".")
    return bool(template) and ("/" in template or bool(path.suffix) or path.is_file())


def data_paths(config: ConfigDict, stage: str) -> list[NamedPath]:
    """The data of a stage. The embedded task has no files: the code makes it."""
    data, paths = config[stage].data, []
    for key, evaluation in (("source", False), ("eval_source", True)):
        path = "" if data[key] == EMBEDDED else data[key]
        content_hash = functools.partial(_data_hash, data, evaluation)
        paths.append(NamedPath(f"{stage}.data.{key}", path, content_hash))
    return paths


def _data_hash(data: ConfigDict, evaluation: bool, path: str) -> str:
    """Of the sources at `path`, which may differ from the config's."""
    key = "eval_source" if evaluation else "source"
    moved = ConfigDict(dict(data) | {key: path})
    return sources.fingerprint(sources_of(moved, evaluation=evaluation))


def draws_samples(config: ConfigDict) -> bool:
    """Whether evaluations draw responses."""
    return bool(config.samples.reward or config.samples.judge)


def sample_paths(config: ConfigDict) -> list[NamedPath]:
    """Reward, judge and prompts of the samples that evaluations draw, where they draw any."""
    if not draws_samples(config):
        return []
    return [
        NamedPath("samples.reward", config.samples.reward, reward_hash),
        NamedPath("samples.judge", config.samples.judge, judge_hash),
        NamedPath("samples.prompts", config.samples.prompts, prompts_hash),
    ]


def weights_hash(name: str) -> str:
    """Of a model's folder, or hub name."""
    return _files(WEIGHTS)(name)


def adapters_hash(name: str) -> str:
    """Of a PEFT folder."""
    return _files(ADAPTERS)(name)


def _files(patterns: tuple[str, ...]) -> Callable[[str], str]:
    """Hash the files of a model's folder that match a pattern; the hub's are fetched first."""

    def content_hash(name: str) -> str:
        folder, digest = local_folder(name, list(patterns)), hashlib.sha256()
        for path in sorted({path for pattern in patterns for path in folder.glob(pattern)}):
            if path.is_file():
                digest.update(f"{path.name} {storage.content_hash(path)}\n".encode())
        return digest.hexdigest()

    return content_hash


def _file(name: str) -> str:
    return storage.content_hash(storage.as_path(name))


def reward_hash(spec: str) -> str:
    """Hash the kind, label and folder of a reward; one without a folder stands for itself."""
    folder = folder_of(spec)
    if not folder:
        return spec
    return _hash_of_use(spec, folder, _files((*WEIGHTS, CENTRE, *TOKENIZER))(folder))


def judge_hash(spec: str) -> str:
    """Hash the kind and folder of a judge; one without a folder stands for itself."""
    folder = folder_of_judge(spec)
    if not folder:
        return spec
    return _hash_of_use(spec, folder, _files((*WEIGHTS, CENTRE, *TOKENIZER))(folder))


def prompts_hash(source: str) -> str:
    """Hash the file of prompts, its split, and whether its texts or their prefixes are meant."""
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
