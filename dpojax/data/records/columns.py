"""The mapping `data.columns` from the fields of a file to those of a form.

>>> columns = read_columns("prompt=turns[0].text, chosen=good, -id")
>>> columns.apply({"turns": [{"text": "q"}], "good": "a", "id": 3}, "f:1", set())
{'prompt': 'q', 'chosen': 'a'}
"""

from __future__ import annotations

import re
import types
from collections.abc import Mapping
from typing import Any, NamedTuple

from dpojax.data.records.record import DataError, listed

STEP = re.compile(r"\.?([^.\[\]]+)|\[(-?\d+)\]|\[(-?\d*):(-?\d*)\]")
SYNTAX = (
    "give columns as NAME=PATH,NAME=PATH,-NAME: NAME is the field that a form reads, PATH where "
    "the file has it (question, turns[0].text, messages[:-1]), and -NAME leaves a field out"
)
Path = tuple[str | int | slice, ...]


class Columns(NamedTuple):
    """Which fields of a form come from where in a row.

    Attributes:
      paths: name of a field -> its path in the row, of names, indices and slices.
      ignored: fields of the row that are not wanted.
    """

    paths: Mapping[str, Path] = types.MappingProxyType({})
    ignored: tuple[str, ...] = ()

    def apply(self, row: Mapping[str, Any], id: str, names_present: set[str]) -> Mapping[str, Any]:
        """The row with the fields that the mapping gives, and without those that it takes.

        A path that the row does not have gives no field.

        Args:
          names_present: gets the names whose paths the row has.

        Raises:
          DataError: the row has a field with a name that the mapping gives to another one.
        """
        if not self.paths and not self.ignored:
            return row
        taken, values = set(self.ignored), {}
        for name, path in self.paths.items():
            path = (dotted,) if (dotted := written(path)) in row else path
            taken.add(path[0])
            present, value = _follow(row, path)
            if present:
                names_present.add(name)
                values[name] = value
        rest = {name: value for name, value in row.items() if name not in taken}
        for name in values.keys() & rest.keys():
            if rest[name] is not None:
                raise DataError(
                    f"{id}: columns gives the name {name!r} to {written(self.paths[name])!r}, but "
                    f"the record has a field {name!r} already; leave it out with -{name} in "
                    "columns, or name the other field differently"
                )
        return rest | values

    def require_found(self, names_present: set[str], source: str, seen: Mapping[str, Any]) -> None:
        """Raise DataError if no row has the path of some field; `seen` is one of the rows."""
        for name in self.paths.keys() - names_present:
            raise DataError(
                f"{source}: columns takes {name!r} from {written(self.paths[name])!r}, which no "
                f"record has; they have {listed(seen)}"
            )


def read_columns(text: str) -> Columns:
    """Read a mapping; "" is none.

    Raises:
      DataError: it is not written as it should be, or gives a name twice.
    """
    paths, ignored = {}, []
    for entry in filter(None, map(str.strip, text.split(","))):
        name, equals, source = (part.strip() for part in entry.partition("="))
        if entry.startswith("-") and not equals:
            ignored.append(entry[1:].strip())
            continue
        if not equals or not name or name in paths:
            raise DataError(f"columns: {entry!r} is not understood; {SYNTAX}")
        paths[name] = _steps(source, entry)
    return Columns(paths, tuple(ignored))


def _steps(source: str, entry: str) -> Path:
    steps, at = [], 0
    while at < len(source):
        match = STEP.match(source, at)
        if match is None or (not steps and (match[1] is None or source.startswith("."))):
            raise DataError(f"columns: {entry!r} is not understood at {source[at:]!r}; {SYNTAX}")
        if match[1] is not None:
            steps.append(match[1].strip())
        elif match[2] is not None:
            steps.append(int(match[2]))
        else:
            steps.append(slice(*(int(end) if end else None for end in match.groups()[2:])))
        at = match.end()
    if not steps:
        raise DataError(f"columns: {entry!r} is not understood; {SYNTAX}")
    return tuple(steps)


def written(path: Path) -> str:
    """The path as the config writes it."""
    parts = []
    for step in path:
        if isinstance(step, str):
            parts.append(f".{step}" if parts else step)
        elif isinstance(step, int):
            parts.append(f"[{step}]")
        else:
            ends = ("" if end is None else str(end) for end in (step.start, step.stop))
            parts.append(f"[{':'.join(ends)}]")
    return "".join(parts)


def _follow(value: Any, path: Path) -> tuple[bool, Any]:
    """Whether there is something at the path, and what."""
    for step in path:
        if isinstance(step, str):
            if not isinstance(value, Mapping) or step not in value:
                return False, None
            value = value[step]
        elif not isinstance(value, list | tuple):
            return False, None
        elif isinstance(step, slice) or -len(value) <= step < len(value):
            value = value[step]
        else:
            return False, None
    return True, value


def without_invented_nulls(row: Mapping[str, Any]) -> dict[str, Any]:
    """A row of Arrow without the nulls below its fields.

    Arrow gives all objects of a column the same keys, and null to those that an object did not
    have. Whether a null was there before cannot be told. The fields of the row itself stay.
    """
    return {name: _without_nulls(value) for name, value in row.items()}


def _without_nulls(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _without_nulls(item) for key, item in value.items() if item is not None}
    if isinstance(value, list):
        return [_without_nulls(item) for item in value]
    return value
