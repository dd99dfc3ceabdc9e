"""Rows of sources whose documents are more than one text: conversations, pairs, prompts."""

from __future__ import annotations

import zlib
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple, TypeVar, assert_never

import orjson

from data.documents import Reading, lines_of
from data.sources import Source, SourceFile
from foundation.errors import RequestError, WorkError

Report = Callable[[str], None]
T = TypeVar("T")

_ROWS = 256
_BAD_ROWS_TOLD = 20


class Row(NamedTuple):
    """An object of a .jsonl, or a row of a .parquet or saved dataset; where it stands counts from 1."""

    values: dict[str, Any]
    file: Path
    line: int


def read_rows(reading: Reading) -> Iterator[Row]:
    """The rows of a source, in the order of its files and lines.

    Args:
        reading: names the source, and counts; `documents` are rows.

    Raises:
        RequestError: a .txt file, or not one row.
        WorkError: a file is damaged or cannot be read.
    """
    for file in reading.source.files:
        try:
            for row in _rows(file, reading):
                reading.documents += 1
                yield row
        except (OSError, EOFError, zlib.error) as problem:
            raise WorkError(
                f"{file.path} cannot be read: {problem}",
                where=str(file.path),
                cure="copy the file again, or take it out of the sources",
            ) from problem
    if not reading.documents:
        raise RequestError(
            f"{reading.source.name} holds no row: {reading.bad_lines} bad lines, {reading.blank_lines} blank ones",
            rule="a row is a JSON object on a line, or a row of a .parquet or a saved dataset",
            cure="name other files",
        )


def read_encoded(
    sources: Sequence[Source],
    encode: Callable[[dict[str, Any]], T],
    left_out: Callable[[T], str | None],
    report: Report,
    *,
    what: str,
    strict: bool = False,
) -> Iterator[T]:
    """What rows become, with an account of those that become nothing.

    Args:
        sources: read in order.
        encode: a row's values to what it becomes; raises RequestError where the row is bad.
        left_out: why something good is left out all the same, None where it is not.
        report: is told, of every source, the rows in, what came out, and why the rest did not; and the bad rows.
        what: the name of what rows become, in messages.
        strict: refuse bad rows.

    Raises:
        RequestError: a source of which nothing comes, or a bad row where `strict` refuses it.
        WorkError: a file is damaged.
    """
    for source in sources:
        reading, reasons, kept = Reading(source), Counter[str](), 0
        for row in read_rows(reading):
            try:
                value = encode(row.values)
            except RequestError as problem:
                if strict:
                    raise RequestError(
                        problem.what,
                        where=f"{row.file}:{row.line}",
                        rule=problem.rule or "strict reading refuses bad rows",
                        cure="correct the row, or leave bad rows out: they are then counted and listed",
                    ) from problem
                reading.reject(row.file, row.line, problem.what)
                continue
            why = left_out(value)
            if why is None:
                kept += 1
                yield value
            else:
                reasons[why] += 1
        account = [f"{reading.bad_lines:,} bad", *(f"{count:,} {why}" for why, count in sorted(reasons.items()))]
        report(f"{source.name}: {reading.documents:,} rows, {kept:,} {what}s; left out: {', '.join(account)}")
        for bad in reading.bad[:_BAD_ROWS_TOLD]:
            report(f"  bad row {bad.file}:{bad.line}: {bad.why}")
        if not kept:
            raise RequestError(
                f"{source.name} holds no {what}",
                where=f"{reading.bad[0].file}:{reading.bad[0].line}: {reading.bad[0].why}" if reading.bad else None,
                rule=f"of {reading.documents:,} rows: {', '.join(account)}",
                cure="correct the rows, or allow longer ones",
            )


def _rows(file: SourceFile, reading: Reading) -> Iterator[Row]:
    match file.kind:
        case "jsonl":
            yield from _jsonl(file, reading)
        case "text":
            raise RequestError(
                f"{file.path} is plain text",
                rule="conversations, pairs and prompts have keys",
                cure="a .jsonl or .parquet",
            )
        case "parquet" | "saved_dataset":
            for number, values in enumerate(_table(file), start=1):
                yield Row(values, file.path, number)
        case _:
            assert_never(file.kind)


def _jsonl(file: SourceFile, reading: Reading) -> Iterator[Row]:
    for number, raw in enumerate(lines_of(file, reading), start=1):
        reading.lines += 1
        line = raw.removeprefix(b"\xef\xbb\xbf") if number == 1 and not file.begin else raw
        if not line.strip():
            reading.blank_lines += 1
            continue
        try:
            values = orjson.loads(line)
        except orjson.JSONDecodeError as problem:
            reading.reject(file.path, number, f"not JSON: {problem}")
            continue
        if isinstance(values, dict):
            yield Row(values, file.path, number)
        else:
            reading.reject(file.path, number, "no JSON object")


def _table(file: SourceFile) -> Iterator[dict[str, Any]]:
    from pyarrow import ArrowException

    try:
        if file.kind == "parquet":
            import pyarrow.parquet

            for batch in pyarrow.parquet.ParquetFile(file.path).iter_batches(batch_size=_ROWS):
                yield from batch.to_pylist()
        else:
            from datasets import load_from_disk

            yield from load_from_disk(str(file.path))
    except ArrowException as problem:
        raise OSError(str(problem)) from problem
