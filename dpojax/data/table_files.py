"""Rows of tables: CSV and TSV, Parquet and Arrow files. All are read part by part."""

from __future__ import annotations

import contextlib
import csv
import json
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import pyarrow as pa

from dpojax import storage
from dpojax.data import text_files
from dpojax.data.records import DataError, without_invented_nulls
from dpojax.watchdog import beat

ROWS = 512  # that are taken out of a Parquet file at once


def csv_rows(file: storage.Path, delimiter: str) -> Iterator[tuple[dict, int]]:
    """Yield (row, line where it begins); the first line names the columns, and all is text.

    Raises:
      DataError: a row has more or fewer fields than there are columns, a column has no name or
        that of another, or the quotes do not match; with file and line.
    """
    csv.field_size_limit(text_files.LINE_LIMIT)
    reader = csv.reader(_texts(file), delimiter=delimiter, strict=True)
    columns: list[str] = []
    begins = 1
    while True:
        try:
            values = next(reader)
        except StopIteration:
            return
        except csv.Error as error:
            raise DataError(f"{file}:{begins}: not usable as a table ({error})") from error
        if values and not columns:
            columns = [name.strip() for name in values]
            if "" in columns or len(set(columns)) < len(columns):
                raise DataError(
                    f"{file}:{begins}: the first line should name every column once, got {columns}"
                )
            others = [other for other in ";\t|" if other in columns[0]]
            if len(columns) == 1 and others:
                raise DataError(
                    f"{file}:{begins}: the first line has {others[0]!r} between its names and no "
                    f"{delimiter!r}: save the table with {delimiter!r} between the columns"
                )
        elif values:
            if len(values) != len(columns):
                raise DataError(
                    f"{file}:{begins}: {len(values)} fields, but the first line names "
                    f"{len(columns)} columns; quote fields that hold {delimiter!r} or a newline"
                )
            yield dict(zip(columns, values)), begins
        begins = reader.line_num + 1


def _texts(file: storage.Path) -> Iterator[str]:
    for number, line in text_files.lines(file, blank=True):
        yield text_files.decoded(file, number, line) + "\n"


def parquet_rows(file: storage.Path) -> Iterator[tuple[dict, int]]:
    """Yield (row, number) of a Parquet file, from 1."""
    import pyarrow.parquet as parquet

    text_files.require_regular(file)
    local = storage.local_copy(file)
    with (
        _reading(file, "parquet"),
        parquet.ParquetFile(local, buffer_size=text_files.BLOCK) as table,
    ):
        _require_names(file, table.schema_arrow)
        yield from _numbered(table.iter_batches(batch_size=ROWS), table.schema_arrow)


def arrow_rows(file: storage.Path) -> Iterator[tuple[dict, int]]:
    """Yield (row, number) of an Arrow file or stream (.arrow, .feather), from 1."""
    text_files.require_regular(file)
    with _reading(file, "arrow"), pa.memory_map(str(storage.local_copy(file))) as mapped:
        try:
            reader = pa.ipc.open_file(mapped)
            batches = map(reader.get_batch, range(reader.num_record_batches))
        except pa.ArrowInvalid:  # the other of the two formats, which `datasets` writes
            mapped.seek(0)
            reader = batches = pa.ipc.open_stream(mapped)
        _require_names(file, reader.schema)
        yield from _numbered(batches, reader.schema)


def _numbered(batches: Any, schema: pa.Schema) -> Iterator[tuple[dict, int]]:
    decoded, number = _decoder_of(schema), 0
    for batch in batches:
        for start in range(0, len(batch), ROWS):
            beat("data are read")
            for row in batch.slice(start, ROWS).to_pylist():
                number += 1
                yield without_invented_nulls(decoded(row)), number


def _decoder_of(schema: pa.Schema) -> Callable[[dict], dict]:
    """What turns a row of Arrow's into what `datasets` would give, where it wrote the table."""
    described = (schema.metadata or {}).get(b"huggingface")
    if described is None or "features" not in json.loads(described).get("info", {}):
        return dict
    import datasets

    features = datasets.Features.from_arrow_schema(schema)

    def decoded(row: dict) -> dict:
        return with_class_names(features.decode_example(row), features)

    return decoded


def with_class_names(row: dict, features: Mapping[str, Any]) -> dict:
    """The row with the name of a ClassLabel instead of its number; -1, "none", is null."""
    named = dict(row)
    for column, feature in features.items():
        if hasattr(feature, "int2str"):
            number, names = row[column], feature.names
            known = number is not None and 0 <= number < len(names)
            named[column] = names[number] if known else None
    return named


def _require_names(file: storage.Path, schema: pa.Schema) -> None:
    repeated = sorted({name for name in schema.names if schema.names.count(name) > 1})
    if repeated:
        raise DataError(f"{file}: several columns are named {', '.join(repeated)}; rename them")


@contextlib.contextmanager
def _reading(file: storage.Path, kind: str) -> Iterator[None]:
    try:
        yield
    except (OSError, ValueError, pa.ArrowException) as error:
        if isinstance(error, DataError):
            raise
        reason = " ".join(str(error).split())
        raise DataError(f"{file}: cannot be read as {kind}: {reason}") from error
