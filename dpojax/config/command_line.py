"""What the scripts share of their command lines."""

from __future__ import annotations

import sys

from absl import app


def parse(arguments: list[str]) -> list[str]:
    """absl's parser, where a key that the config does not have is a usage error."""
    try:
        return app.parse_flags_with_usage(arguments)
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        sys.exit(f"{arguments[0]}: {error.args[0] if error.args else error}")
