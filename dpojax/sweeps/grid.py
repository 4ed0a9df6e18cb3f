"""The grid of a sweep on a command line: keys with their values, every combination, and seeds.

    --grid preference.beta=0.05,0.1,1 learning_rate=1e-4,3e-4 --seeds=3

are 3 x 2 x 3 members.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Sequence
from typing import Any

from ml_collections import ConfigDict

from dpojax.config.command_line import UsageError, nearest_keys, parse_value
from dpojax.config.key_help import list_keys
from dpojax.stages.registry import STAGES
from dpojax.sweeps.members import Changes, read_sweep

GRID, SEEDS, SEED = "--grid", "--seeds", "seed"
MOST_MEMBERS = 10_000
MOST_CANDIDATES = 12  # keys that an error names
BRACKETS = {"(": ")", "[": "]", "{": "}"}


def sweep_members(
    path: str, config: ConfigDict, grid: Sequence[str] = (), seeds: int = 0
) -> list[Changes]:
    """The changes of each member: those of the grid, or, without one, of the config's sweep().

    Args:
      path: the config's file.
      config: what the file returns, with the values of the command line.
      grid: `KEY=VALUE,VALUE`, a text for each key.
      seeds: train each with so many seeds, from config.seed on; 0 leaves the seed as it is.

    Raises:
      UsageError: a key that the config does not have, or that may be one of several; a value of
        another type, or one that is there twice.
      ConfigError: there is no grid, and the file has no sweep().
    """
    members = grid_members(config, grid) if grid else read_sweep(path)
    if seeds < 0:
        raise UsageError(f"{SEEDS}={seeds}: how many seeds; 1 or more")
    if not seeds:
        return list(members)
    if any(SEED in changes for changes in members):
        raise UsageError(f"{SEEDS}={seeds}: the members set their seed already; leave it out")
    _require_few(len(members) * seeds)
    numbers = range(config.seed, config.seed + seeds)
    return [{**changes, SEED: seed} for changes in members for seed in numbers]


def _require_few(count: int) -> None:
    """Raise UsageError for more members than any sweep could train."""
    if count > MOST_MEMBERS:
        raise UsageError(f"{count:,} members; {MOST_MEMBERS:,} are the most of a sweep")


def describe(members: Sequence[Changes]) -> str:
    """`6 members: preference.beta (3 values) x seed (2 values); preference.tau = 0.5`.

    Commas stand instead of "x" where members are not every combination, as sweep() may return them.
    """
    keys = dict.fromkeys(key for changes in members for key in changes)
    values = {key: {repr(changes.get(key)) for changes in members} for key in keys}
    counts = [f"{key} ({len(values[key])} values)" for key in keys if len(values[key]) > 1]
    total = "1 member" if len(members) == 1 else f"{len(members)} members"
    is_product = math.prod(map(len, values.values())) == len(members)
    parts = [(" x " if is_product else ", ").join(counts)] if counts else []
    parts += [f"{key} = {members[0].get(key)}" for key in keys if len(values[key]) == 1]
    return f"{total}: {'; '.join(parts)}" if parts else total


def grid_members(config: ConfigDict, grid: Sequence[str]) -> list[Changes]:
    """Every combination of the values of a grid; the first key changes slowest.

    Raises:
      UsageError: see `sweep_members`.
    """
    values: dict[str, list[Any]] = {}
    for text in grid:
        name, equals, listed = text.partition("=")
        if not equals or not name:
            raise UsageError(f"{GRID} {text}: write KEY=VALUE,VALUE without spaces between values")
        key = full_key(config, name.removeprefix("config."))
        if key in values:
            raise UsageError(f"{GRID}: {key} is there twice; give all its values at once")
        values[key] = list(_values(config, key, listed))
    _require_few(math.prod(map(len, values.values())))
    return [dict(zip(values, combined)) for combined in itertools.product(*values.values())]


def full_key(config: ConfigDict, name: str) -> str:
    """The dotted key that a name means, which may lack the groups before it.

    A key of exactly that name counts first, then one of the last stage, then the only one that ends
    so, of the stages that the config has and of what is no stage.

    Raises:
      UsageError: no key or several; the message names the candidates.
    """
    keys = [key.name for key in list_keys(config)]
    for exact in (name, f"{config.stages[-1]}.{name}" if config.stages else name):
        if exact in keys:
            return exact
    unread = {*STAGES} - {*config.stages}
    ending = [key for key in keys if key.endswith(f".{name}") and key.split(".")[0] not in unread]
    if len(ending) == 1:
        return ending[0]
    if ending:
        raise UsageError(
            f"{GRID} {name}: may be {_listed(ending[:MOST_CANDIDATES])}; write one of them"
        )
    near = nearest_keys(config, name)
    hint = f"; did you mean {_listed(near)}?" if near else "; --help lists all keys"
    raise UsageError(f"{GRID} {name}: the config has no such key{hint}")


def _values(config: ConfigDict, key: str, listed: str) -> Iterator[Any]:
    """The values of a key that a list names.

    Raises:
      UsageError: one is not of the key's type, or is there twice.
    """
    seen = []
    for text in split_values(listed):
        try:
            value = parse_value(config, key, text)
        except UsageError as error:
            raise UsageError(str(error).replace("--config.", f"{GRID} ")) from error
        if value in seen:
            raise UsageError(f"{GRID} {key}: {text} is there twice")
        seen.append(value)
        yield value


def split_values(listed: str) -> list[str]:
    """The texts between commas; a comma inside of quotes or brackets separates nothing.

    Raises:
      UsageError: a quote or bracket is not closed.
    """
    texts, closing = [""], []
    for character in listed:
        if closing and character == closing[-1]:
            closing.pop()
        elif character in "'\"" and not (closing and closing[-1] in "'\""):
            closing.append(character)
        elif character in BRACKETS and not (closing and closing[-1] in "'\""):
            closing.append(BRACKETS[character])
        elif character == "," and not closing:
            texts.append("")
            continue
        texts[-1] += character
    if closing:
        raise UsageError(f"{GRID} {listed}: {closing[-1]} is missing at the end")
    return [_unquoted(text) for text in texts]


def _unquoted(text: str) -> str:
    quoted = len(text) > 1 and text[0] == text[-1] and text[0] in "'\""
    return text[1:-1] if quoted else text


def _listed(names: Sequence[str]) -> str:
    *others, last = names
    return f"{', '.join(others)} or {last}" if others else last
