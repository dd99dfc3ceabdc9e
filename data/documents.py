"""Documents, one by one, from the files of a source. What cannot be read is counted and listed, never just dropped."""

from __future__ import annotations

import gzip
import zlib
from collections.abc import Callable, Iterable, Iterator
from contextlib import nullcontext
from dataclasses import dataclass, field
from itertools import chain
from pathlib import Path
from typing import IO, Any, NamedTuple

import orjson

from data.sources import FileKind, Source, SourceFile
from foundation.errors import RequestError, WorkError

_CHUNK = 1 << 20
_ROWS = 1000
_BOM = b"\xef\xbb\xbf"
BAD_LINES_KEPT = 100_000


class Document(NamedTuple):
    """A text and where it stands: line of a .jsonl or .txt, row of a .parquet or saved dataset; both count from 1."""

    text: str
    file: Path
    line: int


class BadLine(NamedTuple):
    """A line or row that holds no document, and why."""

    file: Path
    line: int
    why: str


@dataclass
class Reading:
    """What was met while reading one source."""

    source: Source
    documents: int = 0
    blank_lines: int = 0
    bad_lines: int = 0
    """All of them, also those beyond BAD_LINES_KEPT."""
    bad: list[BadLine] = field(default_factory=list)
    bytes_read: int = 0
    """On disk, before decompression."""
    lines: int = 0
    """Of .jsonl files. Where a file is read from its middle, lines are numbered from there."""

    def reject(self, file: Path, line: int, why: str) -> None:
        """Note a line that holds no document."""
        self.bad_lines += 1
        if len(self.bad) < BAD_LINES_KEPT:
            self.bad.append(BadLine(file, line, why))


def read_documents(reading: Reading, text_key: str, *, may_be_empty: bool = False) -> Iterator[Document]:
    """The documents of a source, in the order of its files and lines.

    Args:
        reading: names the source, and counts as documents are taken.
        text_key: key or column of the text.
        may_be_empty: as a part of a source may be.

    Raises:
        RequestError: the source holds not one document.
        WorkError: a file is damaged or cannot be read.
    """
    for file in reading.source.files:
        before = reading.bytes_read
        reader = _READERS[file.kind]
        try:
            for document in reader(file, text_key, reading):
                reading.documents += 1
                yield document
        except (OSError, EOFError, zlib.error) as problem:
            raise damaged(file.path, problem) from problem
        reading.bytes_read = before + file.byte_count()
    if not reading.documents and not may_be_empty:
        raise no_document(reading, text_key)


def damaged(path: Path, problem: Exception) -> WorkError:
    """What to say of a file that cannot be read to its end."""
    return WorkError(
        f"{path} cannot be read: {problem}",
        where=str(path),
        cure="copy the file again, or take it out of the sources",
    )


def no_document(reading: Reading, text_key: str) -> RequestError:
    """What to say of a source that holds no document."""
    first = f"{reading.bad[0].file}:{reading.bad[0].line}: {reading.bad[0].why}" if reading.bad else None
    return RequestError(
        f"{reading.source.name} holds no document: {reading.bad_lines} bad lines, {reading.blank_lines} blank ones",
        where=first,
        rule=f"a document is the text under the key {text_key!r}, or a .txt file",
        cure="set the text key to the one that holds the text, or name other files",
    )


def _jsonl(file: SourceFile, text_key: str, reading: Reading) -> Iterator[Document]:
    path = file.path
    for number, raw in enumerate(lines_of(file, reading), start=1):
        reading.lines += 1
        line = raw.removeprefix(_BOM) if number == 1 and not file.begin else raw
        if not line.strip():
            reading.blank_lines += 1
            continue
        record = record_of_line(line, text_key)
        if isinstance(record, str):
            reading.reject(path, number, record)
        else:
            yield Document(record[text_key], path, number)


def record_of_line(line: bytes, text_key: str) -> dict[str, Any] | str:
    """The object on a line of a .jsonl, whose `text_key` holds a string; or why it is no document."""
    try:
        record = orjson.loads(line)
    except orjson.JSONDecodeError as problem:
        return f"not JSON: {problem}"
    if not isinstance(record, dict):
        return f"a JSON {_json_name(record)} where an object is expected"
    if text_key not in record:
        return f"no key {text_key!r}; keys here: {', '.join(sorted(record)[:8]) or 'none'}"
    if not isinstance(record[text_key], str):
        return f"{text_key!r} holds a JSON {_json_name(record[text_key])}, not a string"
    return record


def _json_name(value: Any) -> str:
    names = {dict: "object", list: "array", str: "string", bool: "boolean", int: "number", float: "number"}
    return names.get(type(value), "null")


def texts_of(file: SourceFile, _: str, reading: Reading) -> Iterator[Document]:
    """A .txt is one document; form feeds split it into several."""
    path = file.path
    data = b"".join(_chunks(path, reading)).removeprefix(_BOM)
    line = 1
    for part in data.split(b"\f"):
        begin, line = line, line + part.count(b"\n")
        try:
            text = part.decode("utf-8")
        except UnicodeDecodeError as problem:
            reading.reject(path, begin + part[: problem.start].count(b"\n"), f"not UTF-8: {problem}")
            continue
        if text.strip():
            yield Document(text, path, begin)
        else:
            reading.blank_lines += 1


def _parquet(file: SourceFile, text_key: str, reading: Reading) -> Iterator[Document]:
    """By Arrow alone: `datasets` would want a cache folder under HOME, which a job's account may have none of."""
    from pyarrow import ArrowException
    from pyarrow.parquet import ParquetFile

    path = file.path
    try:
        with ParquetFile(path) as opened:
            if not opened.metadata.num_rows:
                return
            _has_column(path, opened.schema_arrow.names, text_key)
            batches = opened.iter_batches(batch_size=_ROWS, columns=[text_key])
            yield from _rows((batch.column(text_key).to_pylist() for batch in batches), path, text_key, reading)
    except ArrowException as problem:
        raise OSError(str(problem)) from problem


def _saved_dataset(file: SourceFile, text_key: str, reading: Reading) -> Iterator[Document]:
    from datasets import load_from_disk
    from pyarrow import ArrowException

    path = file.path
    try:
        rows = load_from_disk(str(path))
        _has_column(path, rows.column_names, text_key)
        batches = rows.select_columns([text_key]).iter(batch_size=_ROWS)
        yield from _rows((batch[text_key] for batch in batches), path, text_key, reading)
    except ArrowException as problem:
        raise OSError(str(problem)) from problem


def _has_column(path: Path, columns: list[str], text_key: str) -> None:
    if text_key not in columns:
        raise RequestError(
            f"{path} has no column {text_key!r}",
            rule=f"its columns: {', '.join(columns)}",
            cure="set the text key to the column that holds the text",
        )


def _rows(batches: Iterable[Iterable[Any]], path: Path, text_key: str, reading: Reading) -> Iterator[Document]:
    """The texts of a column."""
    for number, text in enumerate(chain.from_iterable(batches), start=1):
        if isinstance(text, str):
            yield Document(text, path, number)
        else:
            reading.reject(path, number, f"{text_key!r} holds {type(text).__name__}, not a string")


_READERS: dict[FileKind, Callable[[SourceFile, str, Reading], Iterator[Document]]] = {
    "jsonl": _jsonl,
    "text": texts_of,
    "parquet": _parquet,
    "saved_dataset": _saved_dataset,
}


def lines_of(file: SourceFile, reading: Reading) -> Iterator[bytes]:
    """Lines without their line feeds: of a part of a file, those that begin in it."""
    # One byte more: where it is a line feed, a line begins at file.begin.
    begins = max(0, file.begin - 1)
    chunks = _chunks(file.path, reading, begins)
    if file.begin:
        for chunk in chunks:
            found = chunk.find(b"\n") + 1
            begins += found or len(chunk)
            if found:
                chunks = chain([chunk[found:]], chunks)
                break
    held: list[bytes] = []
    for chunk in chunks:
        first, *rest = chunk.split(b"\n")
        held.append(first)
        for part in rest:
            line = b"".join(held)
            if file.end is not None:
                if begins >= file.end:
                    return
                begins += len(line) + 1
            yield line
            held = [part]
    last = b"".join(held)
    if last and (file.end is None or begins < file.end):
        yield last


def _chunks(path: Path, reading: Reading, begin: int = 0) -> Iterator[bytes]:
    """The bytes of a file, decompressed by its ending."""
    before = reading.bytes_read - begin
    with open(path, "rb") as raw:
        raw.seek(begin)
        for chunk in _decompressed(path, raw):
            reading.bytes_read = before + raw.tell()
            yield chunk


def _decompressed(path: Path, raw: IO[bytes]) -> Iterator[bytes]:
    name = path.name.lower()
    if name.endswith(".zst"):
        yield from _zstandard(raw)
        return
    with gzip.open(raw) if name.endswith(".gz") else nullcontext(raw) as stream:
        while chunk := stream.read(_CHUNK):
            yield chunk


def _zstandard(raw: IO[bytes]) -> Iterator[bytes]:
    """Decompress frame after frame. zstandard's own stream reader takes a cut-off file for a complete one."""
    import zstandard

    frame: Any = None
    while chunk := raw.read(_CHUNK):
        while chunk:
            frame = frame or zstandard.ZstdDecompressor().decompressobj()
            try:
                text = frame.decompress(chunk)
            except zstandard.ZstdError as problem:
                raise OSError(str(problem)) from problem
            yield text
            chunk = b""
            if frame.eof:
                chunk, frame = frame.unused_data, None
    if frame is not None:
        raise EOFError("it ends inside a compressed frame")
