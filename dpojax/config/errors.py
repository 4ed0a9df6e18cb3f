"""The error of a config that cannot run."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

from dpojax.data.records import DataError


class ConfigError(ValueError):
    """A config that cannot run. The message names the key, what is wrong and what to do."""


@contextlib.contextmanager
def config_errors(key: str) -> Iterator[None]:
    """Raise a ValueError or OSError from inside as a ConfigError that begins with `config.key`."""
    try:
        yield
    except (ConfigError, DataError):
        raise
    except (ValueError, OSError) as error:
        raise ConfigError(f"config.{key}: {error}") from error
