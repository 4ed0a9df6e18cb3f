"""A config that is resolved: every default filled in, every option bound, every path named."""

from __future__ import annotations

import dataclasses
import functools
import json
from collections.abc import Mapping
from typing import Any

from ml_collections import ConfigDict, FrozenConfigDict

from dpojax import storage
from dpojax.config.contents import Content, NamedPath, contents_of
from dpojax.config.errors import ConfigError


@dataclasses.dataclass(frozen=True)
class ResolvedRun:
    """A config with every default filled in. Immutable; `stages.registry.resolve` makes it.

    Attributes:
      config: all keys, with the defaults that depend on other keys filled in.
      workdir: absolute, local or in a bucket.
      settings: what each stage has bound from the config (`Stage.resolve`), by the stage's name.
      paths: the files and folders that decide the result.
    """

    config: FrozenConfigDict
    workdir: storage.Path
    settings: Mapping[str, Any]
    paths: tuple[NamedPath, ...]

    @functools.cached_property
    def contents(self) -> dict[str, Content]:
        """What lies behind the paths, by the config key that names them; hashed at first use.

        Raises:
          DataError, ConfigError: one of them cannot be read; the message names the key.
        """
        return contents_of(self.paths)


def workdir_path(workdir: str | storage.Path) -> storage.Path:
    """The folder that --workdir names, local or in a bucket.

    Raises:
      ConfigError: the name is empty, or of a kind of storage that no workdir can be on.
    """
    if str(workdir).startswith("s3://"):
        raise ConfigError(
            f"--workdir={workdir}: checkpoints cannot be written to s3:// yet; use gs:// or a "
            "folder. Data and models may lie there"
        )
    try:
        return storage.as_path(workdir, "--workdir")
    except storage.StorageError as error:
        raise ConfigError(str(error)) from error


def as_json(config: ConfigDict) -> dict:
    """A config as JSON has it."""
    return json.loads(config.to_json())


def editable(config: ConfigDict) -> ConfigDict:
    """A locked copy of a config that may be changed, also of a frozen one."""
    return ConfigDict(config).copy_and_resolve_references()


def flat(tree: Mapping, prefix: str = "") -> dict[str, Any]:
    """A config as JSON has it, by dotted keys: {"preference.beta": 0.1, ...}."""
    values: dict[str, Any] = {}
    for key, value in tree.items():
        if isinstance(value, dict):
            values |= flat(value, f"{prefix}{key}.")
        else:
            values[prefix + key] = value
    return values
