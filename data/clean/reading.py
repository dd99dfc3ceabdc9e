"""Records of a piece of a file: the text and the whole line it came in, so that other keys pass through untouched."""

from __future__ import annotations

import zlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any, NamedTuple, assert_never

import orjson

from data.clean.json_line import with_text
from data.clean.plan import Piece
from data.documents import BAD_LINES_KEPT, Reading, damaged, lines_of, record_of_line, texts_of
from data.sources import Source, SourceFile
from foundation.errors import RequestError

_ROWS = 1000
_BOM = b"\xef\xbb\xbf"


class Record(NamedTuple):
    """A document: its text, its line or row within the piece from 1, its other keys and, if it had one, its line."""

    text: str
    line: int
    fields: dict[str, Any]
    raw: bytes | None


@dataclass
class PieceReading:
    """What was met while reading a piece."""

    lines: int = 0
    """All lines or rows: what a later piece of the same file has to add to its numbers."""
    blank_lines: int = 0
    bad_lines: int = 0
    """All of them, also those beyond BAD_LINES_KEPT."""
    bad: list[tuple[int, str]] = field(default_factory=list)
    """Line within the piece, and why it holds no document."""
    left_out: set[str] = field(default_factory=set)
    """Columns that JSON cannot hold, or some of whose numbers it cannot."""

    def reject(self, line: int, why: str) -> None:
        """Note a line that holds no document."""
        self.bad_lines += 1
        if len(self.bad) < BAD_LINES_KEPT:
            self.bad.append((line, why))


def read_piece(file: SourceFile, piece: Piece, text_key: str, reading: PieceReading) -> Iterator[Record]:
    """The documents of a piece, in order.

    Raises:
        RequestError: a file has no column of that name.
        WorkError: the file is damaged or cannot be read.
    """
    try:
        match file.kind:
            case "jsonl":
                part = SourceFile(file.path, file.kind, piece.begin, piece.end or None)
                yield from _jsonl(part, text_key, reading)
            case "text":
                yield from _text(file, reading)
            case "parquet" | "saved_dataset":
                yield from _columns(file, piece, text_key, reading)
            case _:
                assert_never(file.kind)
    except (OSError, EOFError, zlib.error) as problem:
        raise damaged(file.path, problem) from problem


def _jsonl(file: SourceFile, text_key: str, reading: PieceReading) -> Iterator[Record]:
    number = 0
    for number, raw in enumerate(lines_of(file, _notes(file)), start=1):
        line = raw.removeprefix(_BOM) if number == 1 and not file.begin else raw
        if not line or line.isspace():
            reading.blank_lines += 1
            continue
        record = record_of_line(line, text_key)
        if isinstance(record, str):
            reading.reject(number, record)
        else:
            yield Record(record[text_key], number, record, line)
    reading.lines = number


def _text(file: SourceFile, reading: PieceReading) -> Iterator[Record]:
    notes = _notes(file)
    for document in texts_of(file, "text", notes):
        yield Record(document.text, document.line, {"file": str(file.path)}, None)
    reading.blank_lines = notes.blank_lines
    for bad in notes.bad:
        reading.reject(bad.line, bad.why)


def _notes(file: SourceFile) -> Reading:
    return Reading(Source(str(file.path), files=(file,)))


def _columns(file: SourceFile, piece: Piece, text_key: str, reading: PieceReading) -> Iterator[Record]:
    from pyarrow import ArrowException

    batches = _row_group_batches if file.kind == "parquet" else _saved_batches
    number = 0
    try:
        for rows in batches(file.path, piece, text_key, reading):
            for row in rows:
                number += 1
                text = row[text_key]
                if isinstance(text, str):
                    yield Record(text, number, row, None)
                else:
                    reading.reject(number, f"{text_key!r} holds {type(text).__name__}, not a string")
    except (ArrowException, UnicodeDecodeError) as problem:
        raise OSError(str(problem)) from problem
    except (OverflowError, ValueError) as problem:
        raise OSError(f"a date or time beyond the calendar of Python: {problem}") from problem
    reading.lines = number


def _row_group_batches(
    path: Path, piece: Piece, text_key: str, reading: PieceReading
) -> Iterator[list[dict[str, Any]]]:
    from pyarrow.parquet import ParquetFile

    with ParquetFile(path) as file:
        columns = _json_columns(path, file.schema_arrow, text_key, reading)
        groups = list(range(piece.begin, piece.end))
        for batch in file.iter_batches(batch_size=_ROWS, row_groups=groups, columns=columns):
            _note_nulls(batch, reading)
            yield batch.to_pylist()


def _saved_batches(path: Path, piece: Piece, text_key: str, reading: PieceReading) -> Iterator[list[dict[str, Any]]]:
    from datasets import load_from_disk

    rows = load_from_disk(str(path)).with_format("arrow")
    columns = _json_columns(path, rows.features.arrow_schema, text_key, reading)
    for begin in range(piece.begin, piece.end, _ROWS):
        table = rows[begin : min(begin + _ROWS, piece.end)]
        table = table.select(columns)
        _note_nulls(table, reading)
        yield table.to_pylist()


def _json_columns(path: Path, schema: Any, text_key: str, reading: PieceReading) -> list[str]:
    if text_key not in schema.names:
        raise RequestError(
            f"{path} has no column {text_key!r}",
            rule=f"its columns: {', '.join(schema.names)}",
            cure="set the text key to the column that holds the text",
        )
    kept = [name for name in schema.names if name == text_key or _fits_json(schema.field(name).type)]
    reading.left_out.update(set(schema.names) - set(kept))
    return kept


def _note_nulls(rows: Any, reading: PieceReading) -> None:
    """Name the columns of a batch or table that hold numbers which JSON cannot spell."""
    for name, column in zip(rows.schema.names, rows.columns, strict=True):
        if _has_unspellable(column):
            reading.left_out.add(f"{name} (its NaN and infinite numbers only: they became null)")


def _has_unspellable(column: Any) -> bool:
    from pyarrow import compute, types

    kind = column.type
    if types.is_floating(kind):
        return bool(compute.any(compute.invert(compute.is_finite(column))).as_py())
    if types.is_struct(kind):
        inner = (compute.struct_field(column, index) for index in range(kind.num_fields))
        return any(_has_unspellable(part) for part in inner)
    if types.is_list(kind) or types.is_large_list(kind) or types.is_fixed_size_list(kind):
        return _has_unspellable(compute.list_flatten(column))
    return False


def _fits_json(kind: Any) -> bool:
    from pyarrow import types

    if types.is_struct(kind):
        return all(_fits_json(kind.field(index).type) for index in range(kind.num_fields))
    if types.is_list(kind) or types.is_large_list(kind) or types.is_fixed_size_list(kind):
        return _fits_json(kind.value_type)
    checks = (
        types.is_boolean,
        types.is_integer,
        types.is_floating,
        types.is_string,
        types.is_large_string,
        types.is_null,
        types.is_date,
        types.is_timestamp,
    )
    return any(check(kind) for check in checks)


def write_line(handle: IO[bytes], record: Record, text: str, text_key: str) -> int:
    """Write a document.

    Of a line that came as JSON everything but the text is written as it came, byte for byte: numbers of any size and
    spelling, keys that come twice, white space. Rows of other files are written as JSON, and their NaN and infinite
    numbers, which JSON cannot hold, become null.

    Returns:
        Bytes written.
    """
    if record.raw is None:
        values = {**record.fields, text_key: text}
        return handle.write(orjson.dumps(values, default=str, option=orjson.OPT_APPEND_NEWLINE))
    line = record.raw if text is record.text else with_text(record.raw, text, text_key)
    return handle.write(line) + handle.write(b"\n")
