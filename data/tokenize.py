"""Turning documents into token files, and splitting them by a hash of their content."""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Callable, Iterator, Sequence
from itertools import islice
from pathlib import Path

import numpy as np

from data.documents import Document, Reading, read_documents
from data.indexed import IndexedWriter
from data.manifest import Manifest, SourceRecord
from data.sources import Source
from data.tokenizer import Tokenizer
from foundation.files import write_text

Report = Callable[[str], None]
Progress = Callable[[int, int], None]  # bytes read so far, bytes of all sources

_BATCH_DOCUMENTS = 1024
_BATCH_LETTERS = 4 << 20
_BAD_LINES_TOLD = 20
_SECONDS_BETWEEN_LINES = 20.0


def content_fraction(content: bytes) -> float:
    """A number in [0, 1), uniform over contents, and the same for the same content."""
    return int.from_bytes(hashlib.blake2b(content, digest_size=8).digest(), "little") / 2.0**64


def is_held_out(text: str, fraction: float) -> bool:
    """Whether a document belongs to the validation set; depends on nothing but its text."""
    return content_fraction(text.encode("utf-8", errors="surrogatepass")) < fraction


def tokenize(
    sources: Sequence[Source],
    tokenizer: Tokenizer,
    text_key: str,
    train: Path,
    validation: Path | None,
    fraction: float,
    report: Report,
    progress: Progress | None = None,
) -> list[Manifest]:
    """Tokenise documents into one token file, or into two, by content.

    Each document gets the end-of-document token; an empty one stays empty and gets none (as in Megatron's own tool).

    Args:
        sources: not tokenised yet.
        tokenizer: its file's hash goes into the manifests.
        text_key: key or column of the text.
        train: prefix of the token file.
        validation: prefix for the documents that are held out; None: none are.
        fraction: share of the documents to hold out.
        report: takes lines for people.
        progress: is told the bytes read.

    Returns:
        The manifests of `train` and, where given, of `validation`.
    """
    prefixes = [train] if validation is None else [train, validation]
    writers: list[IndexedWriter] = []
    try:
        writers.extend(IndexedWriter(prefix, tokenizer.vocab_size) for prefix in prefixes)
        readings, records = _write_all(sources, tokenizer, text_key, fraction, writers, report, progress)
        keep_bad_lines(train, readings)
        return [
            writer.finish(tokenizer.hash, tokenizer.eod_id, record)
            for writer, record in zip(writers, records, strict=True)
        ]
    finally:
        for writer in writers:
            writer.discard()


def _write_all(
    sources: Sequence[Source],
    tokenizer: Tokenizer,
    text_key: str,
    fraction: float,
    writers: Sequence[IndexedWriter],
    report: Report,
    progress: Progress | None,
) -> tuple[list[Reading], list[list[SourceRecord]]]:
    readings: list[Reading] = []
    records: list[list[SourceRecord]] = [[] for _ in writers]
    total, done, told = sum(source.byte_count() for source in sources), 0, time.monotonic()
    for source in sources:
        reading = Reading(source)
        readings.append(reading)
        before = [writer.documents for writer in writers]
        for batch in _batches(read_documents(reading, text_key)):
            _write_batch(batch, tokenizer, fraction, writers)
            if progress is not None:
                progress(done + reading.bytes_read, total)
            if time.monotonic() - told > _SECONDS_BETWEEN_LINES:
                told = time.monotonic()
                report(
                    f"tokenise: {sum(w.documents for w in writers):,} documents, {sum(w.tokens for w in writers):,} "
                    f"tokens, {done + reading.bytes_read:,} of {total:,} bytes"
                )
        done += reading.bytes_read
        report_reading(reading, report)
        for writer, record, first in zip(writers, records, before, strict=True):
            record.append(SourceRecord(source.name, writer.documents - first, reading.bad_lines))
    return readings, records


def _batches(documents: Iterator[Document]) -> Iterator[list[str]]:
    """Texts in batches of a bounded number of documents and letters (but at least one document)."""
    texts: list[str] = []
    letters = 0
    for document in documents:
        texts.append(document.text)
        letters += len(document.text)
        if len(texts) == _BATCH_DOCUMENTS or letters >= _BATCH_LETTERS:
            yield texts
            texts, letters = [], 0
    if texts:
        yield texts


def _write_batch(texts: list[str], tokenizer: Tokenizer, fraction: float, writers: Sequence[IndexedWriter]) -> None:
    end = np.array([tokenizer.eod_id], dtype=np.int32)
    encoded = tokenizer.encode(texts)
    held_out = [len(writers) > 1 and is_held_out(text, fraction) for text in texts]
    for side, writer in enumerate(writers):
        mine = [ids for ids, held in zip(encoded, held_out, strict=True) if held == bool(side)]
        if mine:
            parts = [part for ids in mine if len(ids) for part in (ids, end)]
            tokens = np.concatenate(parts) if parts else end[:0]
            writer.add(tokens, [len(ids) + 1 if len(ids) else 0 for ids in mine])


def report_reading(reading: Reading, report: Report) -> None:
    """Tell what was read from a source, what was not, and why."""
    source = reading.source
    report(
        f"{source.name}: {reading.documents:,} documents from {len(source.files):,} files; "
        f"{reading.bad_lines:,} bad lines, {reading.blank_lines:,} blank ones"
    )
    for bad in islice(reading.bad, _BAD_LINES_TOLD):
        report(f"  bad line {bad.file}:{bad.line}: {bad.why}")
    if reading.bad_lines > _BAD_LINES_TOLD:
        report(f"  and {reading.bad_lines - _BAD_LINES_TOLD:,} more bad lines")
    if source.ignored:
        names = ", ".join(str(path) for path in source.ignored[:5])
        report(f"  not read, by their names: {names}{', ...' if len(source.ignored) > 5 else ''}")


def bad_lines_path(prefix: Path) -> Path:
    """PREFIX.bad_lines.jsonl."""
    return Path(f"{prefix}.bad_lines.jsonl")


def keep_bad_lines(prefix: Path, readings: Sequence[Reading]) -> None:
    """List the bad lines beside the token file, one JSON object each; no file where there are none."""
    lines = [
        json.dumps({"file": str(bad.file), "line": bad.line, "why": bad.why}, ensure_ascii=False)
        for reading in readings
        for bad in reading.bad
    ]
    path = bad_lines_path(prefix)
    if lines:
        write_text(path, "\n".join(lines) + "\n")
    else:
        path.unlink(missing_ok=True)
