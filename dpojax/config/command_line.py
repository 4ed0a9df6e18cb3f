"""Command lines of scripts: every word means something, or is an error that says what was meant."""

from __future__ import annotations

import argparse
import ast
import difflib
import math
import pathlib
import re
import sys
from collections.abc import Collection, Iterable, Sequence
from typing import Any, NamedTuple, NoReturn

from absl import flags
from ml_collections import ConfigDict

from dpojax.config.files import read_config, with_shipped
from dpojax.config.help_text import about_text, flags_help, help_width

OTHER_DASHES = "\u2010\u2011\u2012\u2013\u2014\u2015\u2212"  # what editors make of hyphens
CONFIG_WORD = re.compile(r"--?(no)?config\.([^=]*)(?:=(.*))?", re.DOTALL)
REQUIRED = re.compile(r"Flag --(\w+) must have a value other than None")  # absl's words
LARGEST = 2**63 - 1
TRUTH = ("true", "false", "t", "f", "yes", "no", "y", "n", "1", "0")
SHOWN = 60  # characters of a value that an error shows
NEIGHBOURS = 3  # keys or flags that an error names beside one that does not exist


class UsageError(ValueError):
    """A command line that cannot be obeyed; the command ends with the status `USAGE`."""


USAGE = 2


class ConfigFlag:
    """The flags `--config=FILE` and `--config.KEY=VALUE` of a script; see `parse_flags`.

    Attributes:
      path: FILE, or FILE:VARIANT; of a shipped config that was given by its name, its file.
      value: the config, locked, with the values of the command line.
    """

    path: str
    value: ConfigDict

    def __init__(self, text: str):
        flags.DEFINE_string("config", None, f"{text} Its keys: --config.KEY=VALUE.", required=True)


class ConfigWords(NamedTuple):
    """What a command line says of a config; see `parse_config_words`.

    Attributes:
      path: FILE, or FILE:VARIANT; "" if there is none.
      value: the config, locked, with the values of the command line; None if there is none.
      keys: `--config.KEY=VALUE` for every key that was set, to be given to another command.
      rest: the other words, `--config=FILE` among them.
    """

    path: str
    value: ConfigDict | None
    keys: tuple[str, ...]
    rest: list[str]


def parse_config_words(words: Sequence[str], default: ConfigDict | None = None) -> ConfigWords:
    """Read the config that a command line names, for a command whose other flags are argparse's.

    Args:
      default: the config whose keys are set where the words name no config; without one, a key
        that is set there stays among the other words.

    Raises:
      UsageError: a word that sets no key. ConfigError: the config file cannot be read.
    """
    check_dashes(words)
    path = _config_path(words)
    if not path and default is None:
        return ConfigWords("", None, (), list(words))
    config = read_config(path) if path else default
    rest, texts = _set_keys(config, words)
    keys = tuple(f"--config.{key}={text}" for key, text in texts.items())
    return ConfigWords(path, config, keys, rest)


def parse_flags(
    words: Sequence[str],
    config: ConfigFlag | None = None,
    *,
    about: str | None = None,
    lists: Collection[str] = (),
) -> None:
    """Parse the command line of a script whose flags are absl's.

    Args:
      words: the command line, without the name of the script.
      config: gets the config that the words name.
      about: what --help says before it lists the flags.
      lists: names of flags that take all words up to the next flag, see `gather`.

    Raises:
      UsageError: naming the first word that is no part of the command line.
      ConfigError: the config file cannot be read.
      SystemExit: 0, after --help.
    """
    if {"-h", "--help", "--helpshort", "--helpfull"} & set(words):
        print(f"{about_text(about or '', help_width())}\n\nflags:\n{flags_help(_own())}")
        if config is not None:
            print(f"\n{keys_help(words)}")
        sys.exit(0)
    check_dashes(words)
    rest = words = gather(words, lists)
    if config is not None and (path := _config_path(words)):
        config.path = path
        config.value = read_config(path)
        rest, _ = _set_keys(config.value, words)
    _refuse_repeated(name for name in _names(rest) if not _may_repeat(name))
    missing = []
    try:
        left = flags.FLAGS([sys.argv[0], *rest])[1:]
    except flags.UnrecognizedFlagError as error:
        raise UsageError(_unknown(f"--{error.flagname}", [f"--{x}" for x in _own()])) from error
    except flags.Error as error:
        missing = REQUIRED.findall(str(error))
        if not missing:
            raise UsageError(_one_line(str(error))) from error
        stand_ins = [f"--{name}=given" for name in missing]  # a stray word may be what was meant
        left = flags.FLAGS([sys.argv[0], *rest, *stand_ins])[1:]
    _refuse_stray(left, words, missing)


def gather(words: Sequence[str], lists: Collection[str]) -> list[str]:
    """The words, where each one that follows a flag that takes several has that flag before it.

    `--grid a=1,2 b=3,4` becomes `--grid=a=1,2 --grid=b=3,4`.

    Args:
      lists: names of flags that take several words.
    """
    gathered, name, is_bare = [], "", False  # is_bare: the last word is the flag without a value
    for word in words:
        if word.startswith("-"):
            flag, equals, _ = word.partition("=")
            name = flag.lstrip("-") if flag.lstrip("-") in lists else ""
            gathered.append(word)
            is_bare = not equals
        elif name:
            if is_bare:
                gathered.pop()
            gathered.append(f"--{name}={word}")
            is_bare = False
        else:
            gathered.append(word)
    return gathered


def keys_help(words: Sequence[str] = ()) -> str:
    """Every config key with its meaning.

    Args:
      words: a command line; where it names a config, the values are those of that config.
    """
    from dpojax.config.key_help import help_lines

    path = _config_path(words)
    config = read_config(path) if path else None
    whose = path or "dpojax"
    return "\n".join(
        [
            f"keys, --config.KEY=VALUE, with the values of {whose}:",
            *help_lines(config, help_width()),
        ]
    )


class ArgumentParser(argparse.ArgumentParser):
    """argparse, as strict as `parse_flags`: no abbreviation, no flag twice, errors in one line."""

    def __init__(self, **options: Any):
        super().__init__(allow_abbrev=False, **options)

    def parse_args(self, args=None, namespace=None):
        words = list(sys.argv[1:] if args is None else args)
        try:
            check_dashes(words)
            _refuse_repeated(name for name in _names(words) if not self._may_repeat(name))
            for word in filter(_is_flag, words):
                name = word.partition("=")[0]
                if name not in self._option_string_actions:
                    raise UsageError(_unknown(name, self._option_string_actions))
        except UsageError as error:
            self.error(str(error))
        required = [action for action in self._actions if action.required]
        for action in required:  # a stray word is told before what is missing
            action.required = False
        try:
            options, left = self.parse_known_args(words, namespace)
        finally:
            for action in required:
                action.required = True
        missing = [one for one in required if getattr(options, one.dest) is None]
        try:
            _refuse_stray(left, words, [one.dest for one in missing])
        except UsageError as error:
            self.error(str(error))
        return options

    def _may_repeat(self, name: str) -> bool:
        action = self._option_string_actions.get(f"--{name}")
        return isinstance(action, argparse._AppendAction)  # of which "extend" is a kind

    def error(self, message: str) -> NoReturn:
        print(f"{self.prog}: {_one_line(message)} (--help shows all flags)", file=sys.stderr)
        raise SystemExit(USAGE)


def command_name() -> str:
    """`dpojax train` or `train.py`, as the command was called."""
    return pathlib.Path(sys.argv[0]).name


def check_dashes(words: Iterable[str]) -> None:
    """Raise UsageError for a word that begins with a dash which is no hyphen."""
    for word in words:
        name = word.lstrip("-" + OTHER_DASHES)
        if any(dash in word[: len(word) - len(name)] for dash in OTHER_DASHES):
            raise UsageError(
                f"{_short(word)}: begins with a dash, not with hyphens; write --{name}"
            )


def set_key(config: ConfigDict, key: str, text: str) -> None:
    """Set one key of a config to the value that a text means.

    Args:
      key: dotted, such as "preference.beta".

    Raises:
      UsageError: the config has no such key, or the value is not of its type.
    """
    value = parse_value(config, key, text)
    *parents, name = key.split(".")
    for part in parents:
        config = config[part]
    config[name] = value


def parse_value(config: ConfigDict, key: str, text: str) -> Any:
    """The value of a key that a text means, of the key's type.

    Raises:
      UsageError: see `set_key`.
    """
    *parents, name = _known_key(config, key)
    node = config
    for part in parents:
        node = node[part]
    kind = node.get_type(name)
    word = f"--config.{key}={_short(text)}"
    try:
        value = _value(text, kind, node[name])
    except (ValueError, TypeError, SyntaxError, MemoryError, RecursionError) as error:
        expected = {bool: "true or false", int: "an integer", float: "a number"}.get(kind, "")
        dash = "; it has a dash that is no hyphen" if set(OTHER_DASHES) & set(text) else ""
        raise UsageError(f"{word}: {expected or error} is expected{dash}") from error
    _require_reasonable(word, value)
    return value


def _value(text: str, kind: type, now: Any) -> Any:
    """The value of a key's type that a text means.

    Raises:
      ValueError, SyntaxError, MemoryError, RecursionError: there is none.
    """
    if kind is bool:
        return flags.BooleanParser().parse(text)
    if kind is tuple:
        try:
            value = ast.literal_eval(text)
        except (ValueError, SyntaxError):
            if not re.fullmatch(r"[\w./:*@-]+(,[\w./:*@-]+)*,?", text):
                raise ValueError("a list such as a,b or ('a','b')") from None
            value = tuple(filter(None, text.split(",")))
        value = tuple(value) if isinstance(value, tuple | list) else (value,)
        kinds = {type(one) for one in now}
        if len(kinds) == 1 and not all(isinstance(one, *kinds) for one in value):
            raise ValueError(f"a list of {kinds.pop().__name__}, such as {now!r},")
        return value
    if kind in (int, float, str):
        return kind(text)
    raise ValueError(f"{kind.__name__} cannot be set on the command line: a config file")


def _require_reasonable(word: str, value: Any) -> None:
    """Raise UsageError for numbers that no key can have."""
    if isinstance(value, tuple):
        for one in value:
            _require_reasonable(word, one)
    elif isinstance(value, float) and not math.isfinite(value):
        raise UsageError(f"{word}: a finite number is expected")
    elif isinstance(value, int) and abs(value) > LARGEST:
        raise UsageError(f"{word}: the number is too large")


def _known_key(config: ConfigDict, key: str) -> list[str]:
    """The parts of a dotted key that the config has, and that is no group of keys.

    Raises:
      UsageError: naming the nearest key.
    """
    parts, node = key.split("."), config
    for part in parts:
        if not isinstance(node, ConfigDict) or part not in node:
            raise UsageError(_unknown_key(config, key))
        node = node.get(part)
    if isinstance(node, ConfigDict):
        first = next(iter(_keys(node)), "KEY")
        raise UsageError(f"--config.{key}: a group of keys; set one, as --config.{key}.{first}=...")
    return parts


def _keys(config: ConfigDict, prefix: str = "") -> list[str]:
    """All dotted keys of a config."""
    names = []
    for name in config:
        node = config.get(name)
        if isinstance(node, ConfigDict):
            names += _keys(node, f"{prefix}{name}.")
        else:
            names.append(prefix + name)
    return names


def _config_path(words: Sequence[str]) -> str:
    """The file that --config names, with its variant; "" if there is none."""
    values = []
    for index, word in enumerate(words):
        if match := re.fullmatch(r"--?config(?:=(.*))?", word, re.DOTALL):
            if match[1] is None and index + 1 == len(words):
                raise UsageError("--config: a value is missing; write --config=FILE")
            values.append(words[index + 1] if match[1] is None else match[1])
    if len(set(values)) > 1:
        raise UsageError(f"--config is given twice: {' and '.join(values)}")
    if values and not values[0]:
        raise UsageError("--config is empty: name a config file")
    return with_shipped(values[0]) if values else ""


def _set_keys(config: ConfigDict, words: Sequence[str]) -> tuple[list[str], dict[str, str]]:
    """Set the keys that the words name; return the other words, and the text of each key."""
    rest, texts = [], {}
    remaining = iter(words)
    for word in remaining:
        match = CONFIG_WORD.fullmatch(word)
        if match is None:
            rest.append(word)
            continue
        negated, key, text = match.groups()
        *parents, name = _known_key(config, key)
        node = config
        for part in parents:
            node = node[part]
        if node.get_type(name) is bool and text is None:
            text = "false" if negated else "true"
        elif negated:
            raise UsageError(f"{word}: only a key that is true or false can begin with no")
        elif text is None and (text := next(remaining, None)) is None:
            raise UsageError(f"{word}: a value is missing; write {word}=VALUE")
        if texts.setdefault(key, text) != text:
            raise UsageError(f"--config.{key} is given twice: {_short(texts[key])}, {_short(text)}")
        set_key(config, key, text)
    return rest, texts


def _own() -> list[str]:
    """The flags of the script itself, without those that absl has for every program."""
    main = flags.FLAGS.find_module_defining_flag
    return [name for name in flags.FLAGS if not (main(name) or "absl").startswith("absl")]


def _is_flag(word: str) -> bool:
    return word.startswith("-") and not re.fullmatch(r"-+|-[\d.].*", word)


def _names(words: Iterable[str]) -> list[str]:
    """The names of the flags in the words, without hyphens."""
    return [word.lstrip("-").partition("=")[0] for word in words if _is_flag(word)]


def _may_repeat(name: str) -> bool:
    return name in flags.FLAGS and isinstance(flags.FLAGS[name], flags.MultiFlag)


def _refuse_repeated(names: Iterable[str]) -> None:
    seen: set[str] = set()
    for name in names:
        if name in seen and name != "config":
            raise UsageError(f"--{name} is given twice")
        seen.add(name)


def _unknown(name: str, known: Collection[str]) -> str:
    """Says that there is no such flag, and which ones are nearest."""
    near = _nearest(name.lstrip("-"), [one.removeprefix("--") for one in known])
    return f"{_short(name)}: no such flag" + _did_you_mean(f"--{one}" for one in near)


def _unknown_key(config: ConfigDict, key: str) -> str:
    """Says that a config has no such key, and which ones are nearest."""
    near = _did_you_mean(f"--config.{one}" for one in nearest_keys(config, key))
    return f"--config.{_short(key)}: no such key" + (near or "; --help lists them all")


def nearest_keys(config: ConfigDict, key: str) -> list[str]:
    """The keys that one may have meant: those of its name in other groups, else similar ones.

    Those of the config's stages come first.
    """
    keys, (group, _, name) = _keys(config), key.rpartition(".")
    of_that_name = [one for one in keys if one.rpartition(".")[2] == name]
    if inside := [one for one in of_that_name if group and one.startswith(f"{group}.")]:
        of_that_name = inside
    stages = (*config.get("stages", ()), "")
    of_that_name.sort(key=lambda one: one.partition(".")[0] not in stages)
    return of_that_name[:NEIGHBOURS] or _nearest(key, keys)


def _nearest(name: str, known: Collection[str]) -> list[str]:
    """The similar names, most similar first; those that are nearly as near as the nearest."""
    if near := difflib.get_close_matches(name, known, n=NEIGHBOURS, cutoff=0.6):
        closest = difflib.SequenceMatcher(None, near[0], name).ratio()
        return difflib.get_close_matches(name, near, n=NEIGHBOURS, cutoff=max(0.6, closest - 0.1))
    last = name.rpartition(".")[2]
    names = {one.rpartition(".")[2] for one in known}
    similar = difflib.get_close_matches(last, names, n=1, cutoff=0.75)
    return [one for one in known if one.rpartition(".")[2] in similar][:NEIGHBOURS]


def _did_you_mean(names: Iterable[str]) -> str:
    *others, last = ["", *names]
    others = [name for name in others if name]
    if not last:
        return ""
    return f"; did you mean {', '.join(others)}{' or ' if others else ''}{last}?"


def _refuse_stray(left: Sequence[str], words: Sequence[str], missing: Sequence[str]) -> None:
    """Raise UsageError for words that belong to no flag, and for flags that are missing."""
    complaints = [_stray(left[0], words)] if left else []
    if missing:
        names = " and ".join(f"--{name}" for name in missing)
        complaints.append(f"{names} {'is' if len(missing) == 1 else 'are'} missing")
    if complaints:
        raise UsageError("; ".join(complaints))


def _stray(word: str, words: Sequence[str]) -> str:
    """Says what a word was meant to be that belongs to no flag."""
    index = list(words).index(word)
    before = words[index - 1] if index else ""
    if before.startswith("-") and "=" not in before and word.lower() in TRUTH:
        return f"{word!r} stands alone: write {before}={word}"
    if re.match(r"\w[\w.]*=", word):
        return f"{_short(word)}: two hyphens are missing; write --{_short(word)}"
    return f"{_short(word)!r} belongs to no flag; a value with spaces needs quotes"


def _short(text: str) -> str:
    text = text.encode("unicode_escape", "backslashreplace").decode() if _odd(text) else text
    return text if len(text) <= SHOWN else text[:SHOWN] + "..."


def _odd(text: str) -> bool:
    """Whether a text would not be one line on a terminal."""
    return not text.isprintable()


def _one_line(text: str) -> str:
    return " ".join(text.split())
