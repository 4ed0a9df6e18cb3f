"""Which keys of a config.json transformers reads: all others are harmless, since it ignores them.

A config class of transformers keeps every key that it is given, so its attributes tell nothing.
Its fields do, and the names that its source and its model's source ask a config for. The source is
parsed and never run; it is asked only for keys that a family of ours does not know.
"""

from __future__ import annotations

import ast
import dataclasses
import functools
import pathlib
import sys
from typing import Any

# Below the folder of transformers: what every model's config goes through.
_SHARED = (
    "configuration_utils.py",
    "integrations/heterogeneity/configuration_utils.py",
    "modeling_utils.py",
    "modeling_layers.py",
)
_ROTARY = "modeling_rope_utils.py"  # of models whose config has rope_parameters
# Shared code reads these for caches, and to find settings that are kept by kind of layer. Whether a
# model has windows is up to its own code.
_OF_WINDOWS = {"sliding_window", "layer_types"}


def has_effect(model_type: str, raw: dict, key: str) -> bool:
    """Whether transformers reads a key of a config.json, and not only to find its default there.

    A second name of another key has no effect where both say the same. A model_type that
    transformers does not have may read every key.
    """
    config_class = _config_class(model_type)
    if config_class is None:
        return True
    if key in config_class.attribute_map:
        return raw[key] != raw.get(config_class.attribute_map[key])
    for field in dataclasses.fields(config_class):
        if field.name == key:
            return not _same(raw[key], field.default)
    return key in _names_asked_for(model_type)


def newer_version(raw: dict) -> str | None:
    """The transformers that wrote a config.json, if it is newer than the one that is installed."""
    import transformers
    from packaging.version import InvalidVersion, Version

    written = raw.get("transformers_version")
    try:
        newer = isinstance(written, str) and Version(written) > Version(transformers.__version__)
    except InvalidVersion:
        return None
    return written if newer else None


def _same(value: Any, default: Any) -> bool:
    return type(value) is type(default) and value == default


def _config_class(model_type: str) -> Any | None:
    from transformers import CONFIG_MAPPING  # slow to import, and rarely needed

    try:
        return CONFIG_MAPPING[model_type]
    except KeyError:
        return None


@functools.cache
def _names_asked_for(model_type: str) -> frozenset[str]:
    import transformers

    folder = pathlib.Path(transformers.__file__).parent
    config_class = _config_class(model_type)
    module_file = pathlib.Path(sys.modules[config_class.__module__].__file__)
    shared = frozenset().union(*(_names_in(folder / name) for name in _SHARED))
    if hasattr(config_class, "rope_parameters"):
        shared |= _names_in(folder / _ROTARY)
    else:
        shared -= {"rope_scaling", "rope_theta"}
    return (shared - _OF_WINDOWS).union(*map(_names_in, module_file.parent.glob("[cm]o*_*.py")))


@functools.cache
def _names_in(file: pathlib.Path) -> frozenset[str]:
    """Names that a source file takes from a config: `config.name`, `getattr(config, "name")`.

    In the source of config classes, from `self` and from dicts of settings, too.
    """
    if not file.is_file():  # another version of transformers may lack it
        return frozenset()
    of_config_class = file.name.startswith("configuration") or "rope" in file.name
    names = set()
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Attribute) and _is_config(node.value, of_config_class):
            names.add(node.attr)
        elif isinstance(node, ast.Call):
            function = getattr(node.func, "id", getattr(node.func, "attr", ""))
            asks = function in ("getattr", "hasattr") and _is_config(node.args[0], of_config_class)
            if asks or (of_config_class and function in ("get", "pop", "setdefault")):
                names |= set(map(_string, node.args))
        elif isinstance(node, ast.Subscript) and of_config_class:
            names.add(_string(node.slice))
        elif isinstance(node, ast.Compare) and of_config_class:
            names.add(_string(node.left))
    return frozenset(names - {""})


def _is_config(node: ast.expr, of_config_class: bool) -> bool:
    name = getattr(node, "id", getattr(node, "attr", ""))
    return "config" in name or (of_config_class and name == "self")


def _string(node: ast.expr) -> str:
    value = getattr(node, "value", "")
    return value if isinstance(value, str) else ""
