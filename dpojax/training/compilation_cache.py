"""Compiled programs on disk: what one run compiles, a later one reads."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator, Mapping
from typing import Any

import jax
from jax.experimental.compilation_cache import compilation_cache

# A program that takes longer to compile is kept. To read one back takes a tenth of this.
LEAST_COMPILE_SECONDS = 0.05


@contextlib.contextmanager
def shared_programs(folder: str | os.PathLike) -> Iterator[None]:
    """Programs that are compiled meanwhile are kept in a folder, and read from there by any run.

    "" changes nothing: JAX keeps programs where JAX_COMPILATION_CACHE_DIR says.
    """
    if not folder:
        yield
        return
    directory, least = "jax_compilation_cache_dir", "jax_persistent_cache_min_compile_time_secs"
    before = {name: getattr(jax.config, name) for name in (directory, least)}
    seconds = min(LEAST_COMPILE_SECONDS, before[least])
    _use({directory: os.path.expanduser(folder), least: seconds})
    try:
        yield
    finally:
        _use(before)


def _use(settings: Mapping[str, Any]) -> None:
    for name, value in settings.items():
        jax.config.update(name, value)
    compilation_cache.reset_cache()  # JAX opens a cache once, and this process may have done so
