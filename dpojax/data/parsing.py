"""Records from the rows of a data set: every row is read, or counted under the cause why not."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any, Literal, NamedTuple

from dpojax.data.records import Columns, DataError, Record, RecordError
from dpojax.data.records.forms import open_row, parse_fields
from dpojax.data.report import Report

# Causes of records that say what they mean: `malformed` is not about them.
WELL_FORMED = ("zero_weight", "prompts_differ")


class ParseConfig(NamedTuple):
    """How rows are read.

    Attributes:
      form: one of `records.FORMS`, or `auto` to find it from the keys of each row.
      columns: which fields of a form come from where in a row.
      need_scores: the loss reads scores, so a record without usable ones is malformed. Otherwise
        scores that are no numbers are passed over.
      last_turn: of a dialogue to imitate, only the last turn of the assistant is the response.
        Otherwise the response begins with its first turn.
      malformed: what to do with a record that cannot be used: drop and count it, or raise.
    """

    form: str = "auto"
    columns: Columns = Columns()
    need_scores: bool = False
    last_turn: bool = False
    malformed: Literal["drop", "error"] = "drop"


AS_IT_IS = ParseConfig()


def parse_rows(
    rows: Iterable[tuple[Mapping[str, Any], str]],
    report: Report,
    config: ParseConfig = AS_IT_IS,
) -> Iterator[Record]:
    """Yield the records of rows, in order; count in the report what was dropped and not read.

    Args:
      rows: (fields by name, id) of each record.
      report: gets the counts of these rows.
      config: how they are read.

    Raises:
      DataError: a path or a name in `columns` that no row can serve, an unknown form, and with
        `malformed="error"` the first record that cannot be used. It is no error here if none is
        left, see `Report.require_some`.
    """
    names_present: set[str] = set()
    row: Mapping[str, Any] | None = None
    id = ""
    for row, id in rows:
        report.read += 1
        record = _parsed(config.columns.apply(row, id, names_present), id, report, config)
        if record is not None:
            yield record
    if row is not None:
        config.columns.require_found(names_present, id.rpartition(":")[0], row)


def _parsed(row: Mapping[str, Any], id: str, report: Report, config: ParseConfig) -> Record | None:
    """The record of one row; None if there is none, which is counted."""
    try:
        fields = open_row(row, id, config.need_scores, config.last_turn)
        parsed = parse_fields(fields, config.form)
    except RecordError as error:
        if config.malformed == "error" and error.cause not in WELL_FORMED:
            raise DataError(f"{error} (tokens.malformed is error)") from error
        report.count("dropped", error.cause, id, str(error))
        return None
    for name in fields.unread():
        if name not in config.columns.ignored:
            report.count_field(name, id)
    for note in dict.fromkeys(fields.notes):
        report.count("noted", note, id)
    return parsed
