"""What the scripts share of their command lines."""

from __future__ import annotations

import importlib.util
import sys
import types

from absl import app


def parse(arguments: list[str]) -> list[str]:
    """absl's parser, where a key that the config does not have is a usage error."""
    try:
        return app.parse_flags_with_usage(arguments)
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        sys.exit(f"{arguments[0]}: {error.args[0] if error.args else error}")


def load_config_file(path: str) -> types.ModuleType:
    """The module of a config file, for its functions besides get_config(); FILE:VARIANT is FILE."""
    file, extension, _ = path.partition(".py:")
    spec = importlib.util.spec_from_file_location(
        "config_file", file + (".py" if extension else "")
    )
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
