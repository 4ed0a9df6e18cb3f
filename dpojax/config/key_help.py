"""What every config key means: the comments of `dpojax.config.defaults`, read from its source.

So a key is described at one place, where its default stands. --help and the site list them.
"""

from __future__ import annotations

import ast
import functools
import inspect
import io
import textwrap
import tokenize
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

from ml_collections import ConfigDict

from dpojax.config import defaults

# The words for a key that is left open: the loss, or another key, decides.
KINDS = {float: "a number", int: "an integer", bool: "true or false", str: "a text"}


class Key(NamedTuple):
    """A config key.

    Attributes:
      name: dotted, such as "preference.beta".
      value: its default; None if it is left open.
      kind: the type of its values.
      meaning: one or more sentences, on one line; "" if there is no comment.
    """

    name: str
    value: Any
    kind: type
    meaning: str

    @property
    def value_text(self) -> str:
        """The default as a command line takes it; of an open key, what may be set."""
        if self.value is None:
            return f"open: {KINDS.get(self.kind, self.kind.__name__)}"
        if isinstance(self.value, bool):
            return str(self.value).lower()
        if isinstance(self.value, tuple):
            return ",".join(map(str, self.value)) or "()"
        return str(self.value) if self.value != "" else '""'


class _Comment(NamedTuple):
    """What the source says of a key, and the keys below it if it is a group."""

    text: str
    below: dict[str, _Comment]


def list_keys(config: ConfigDict | None = None) -> list[Key]:
    """All keys in the order of the defaults, with the values of `config` or the defaults."""
    config = defaults.default_config() if config is None else config
    return list(_leaves(config, _comments(), ""))


def group_meanings() -> dict[str, str]:
    """What the source says of groups of keys, such as "ppo"; those without a comment are left out.

    The first line of the docstring of the function that makes a group counts as its comment.
    """
    groups: dict[str, str] = {}

    def add(comments: Mapping[str, _Comment], prefix: str) -> None:
        for name, (text, below) in comments.items():
            if below:
                groups[prefix + name] = text
                add(below, f"{prefix}{name}.")

    add(_comments(), "")
    return {name: text for name, text in groups.items() if text}


def help_lines(config: ConfigDict | None = None, width: int = 100) -> list[str]:
    """`  preference.beta = 0.1: meaning`, wrapped, for every key."""
    lines = []
    for key in list_keys(config):
        default = f"({key.value_text})" if key.value is None else f"= {key.value_text}"
        lines += textwrap.wrap(
            f"{key.name} {default}: {key.meaning}".rstrip(": "),
            width,
            initial_indent="  ",
            subsequent_indent="      ",
            break_on_hyphens=False,
        )
    return lines


def _leaves(config: ConfigDict, comments: Mapping[str, _Comment], prefix: str) -> Iterator[Key]:
    for name in dict.fromkeys((*comments, *config)):  # a ConfigDict has its keys by the alphabet
        value = config.get(name)
        text, below = comments.get(name, _Comment("", {}))
        if isinstance(value, ConfigDict):
            yield from _leaves(value, below, f"{prefix}{name}.")
        else:
            yield Key(prefix + name, value, config.get_type(name), text)


@functools.cache
def _comments() -> dict[str, _Comment]:
    """The comments of all keys of the defaults, as a tree."""
    return _Source(inspect.getsource(defaults)).top_level()


class _Source:
    """The source of the defaults: functions that return dicts of keys, with comments beside them.

    A comment belongs to the key on its line, or, if it has lines of its own, to the key below.
    """

    def __init__(self, text: str):
        self.comments: dict[int, str] = {}  # by line
        self.alone: set[int] = set()  # lines that hold a comment and nothing else
        for token in tokenize.generate_tokens(io.StringIO(text).readline):
            if token.type == tokenize.COMMENT:
                self.comments[token.start[0]] = token.string.lstrip("# ")
                if not token.line[: token.start[1]].strip():
                    self.alone.add(token.start[0])
        functions = [node for node in ast.parse(text).body if isinstance(node, ast.FunctionDef)]
        self.functions = {function.name: function for function in functions}

    def top_level(self) -> dict[str, _Comment]:
        """The keys that `default_config` sets: `config.NAME = ...`."""
        keys = {}
        for node in self.functions["default_config"].body:
            if isinstance(node, ast.Assign) and isinstance(
                target := node.targets[0], ast.Attribute
            ):
                keys[target.attr] = self._key(node, node.value)
        return keys

    def _key(self, place: ast.Assign | ast.keyword, value: ast.expr) -> _Comment:
        below = self._group(value)
        called = self.functions.get(_called(value))
        comment = self._beside(place)
        if not comment and called is not None:
            comment = (ast.get_docstring(called) or "").partition("\n")[0]
        return _Comment(comment, below)

    def _beside(self, place: ast.Assign | ast.keyword) -> str:
        """The comments above a node, and the one on its last line."""
        lines, line = [], place.lineno - 1
        while line in self.alone:
            lines.insert(0, self.comments[line])
            line -= 1
        if place.end_lineno not in self.alone and place.end_lineno in self.comments:
            lines.append(self.comments[place.end_lineno])
        return " ".join(lines)

    def _group(self, value: ast.expr) -> dict[str, _Comment]:
        """The keys of `dict(...)`, `ConfigDict(...)`, a function that returns one, or `a | b`."""
        if isinstance(value, ast.BinOp):
            before, after = self._group(value.left), self._group(value.right)
            # `dict(a=2)` behind a shared group changes a default, and leaves what was said of it.
            described = {key: x for key, x in after.items() if x.text or key not in before}
            return before | described
        name = _called(value)
        if name in self.functions:
            last = self.functions[name].body[-1]
            return self._group(last.value) if isinstance(last, ast.Return) else {}
        if name == "ConfigDict":
            return self._group(value.args[0])
        if name != "dict":
            return {}
        keys: dict[str, _Comment] = {}
        for keyword in value.keywords:
            if keyword.arg is None:
                keys |= self._group(keyword.value)  # `**_optimizer(...)`
            else:
                keys[keyword.arg] = self._key(keyword, keyword.value)
        return keys


def _called(node: ast.expr) -> str:
    """The name of the function that an expression calls; "" if it calls none."""
    is_call = isinstance(node, ast.Call) and isinstance(node.func, ast.Name)
    return node.func.id if is_call else ""
