"""One shard of a tokenisation: its documents read, encoded and written."""

from __future__ import annotations

import hashlib
import os
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from data.documents import Document, Reading, read_documents
from data.encoding import Encoded, Encoder, GigatokenEncoder, ReferenceEncoder
from data.indexed import IndexedWriter
from data.shards import PieceHash, Shard, ShardRecord, Workshop, identity_of, refuse_changed
from data.sources import Source, SourceFile
from data.tokenizer import Tokenizer, load_tokenizer

_BATCH_DOCUMENTS = 4096
_BATCH_LETTERS = 4 << 20
_HASHED_BYTES = 1 << 20
_SECONDS_BETWEEN_LOOKS = 0.5


@dataclass(frozen=True)
class ShardRules:
    """How documents become tokens; the same for all shards."""

    text_key: str
    eod_id: int
    vocab_size: int
    tokenizer_hash: str
    held_out_fraction: float


def content_fraction(content: bytes) -> float:
    """A number in [0, 1), uniform over contents, and the same for the same content."""
    return int.from_bytes(hashlib.blake2b(content, digest_size=8).digest(), "little") / 2.0**64


def is_held_out(text: str, fraction: float) -> bool:
    """Whether a document belongs to the validation set; depends on nothing but its text."""
    return content_fraction(text.encode("utf-8", errors="surrogatepass")) < fraction


def write_shard(
    rules: ShardRules, workshop: Workshop, shard: Shard, encoder: Encoder, progress: Callable[[int], None]
) -> None:
    """Write the token files of a shard, and its record.

    Args:
        rules: how.
        workshop: where.
        shard: what.
        encoder: the reference or one that gives the same.
        progress: is told the bytes read of this shard.

    Raises:
        FastPathDiffers: the encoder erred. Nothing of the shard is kept.
        WorkError: a file is damaged, or changed while it was read.
    """
    before = [identity_of(file) for file in shard.files]
    reading = Reading(Source(f"shard {shard.number}", shard.files))
    prefixes = workshop.prefixes(shard)
    with ExitStack() as stack:
        writers = [stack.enter_context(IndexedWriter(prefix, rules.vocab_size)) for prefix in prefixes]
        for texts in _batches(read_documents(reading, rules.text_key, may_be_empty=True)):
            _write_batch(texts, encoder, rules, writers)
            progress(reading.bytes_read)
        pieces = tuple(hash_piece(file) for file in shard.files)
        refuse_changed(shard.files, before)
        record = ShardRecord(
            encoder="reference" if isinstance(encoder, ReferenceEncoder) else "gigatoken",
            documents=tuple(writer.documents for writer in writers),
            blank_lines=reading.blank_lines,
            bad_lines=reading.bad_lines,
            bad=tuple((str(bad.file), bad.line, bad.why) for bad in reading.bad),
            lines=reading.lines,
            pieces=pieces,
        )
        workshop.keep(shard, record)
        for writer in writers:
            writer.finish(rules.tokenizer_hash, rules.eod_id, ())


def hash_piece(file: SourceFile) -> PieceHash:
    """sha256 of a file, or of the bytes of it that were asked for. Of a folder: of its files, one after another."""
    digest = hashlib.sha256()
    for part in file.parts():
        with open(part, "rb", buffering=0) as handle:
            handle.seek(file.begin)
            left = part.stat().st_size - file.begin if file.end is None else file.end - file.begin
            while left > 0 and (chunk := handle.read(min(left, _HASHED_BYTES))):
                digest.update(chunk)
                left -= len(chunk)
    return PieceHash(str(file.path), file.begin, file.byte_count(), digest.hexdigest())


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


def _write_batch(texts: list[str], encoder: Encoder, rules: ShardRules, writers: Sequence[IndexedWriter]) -> None:
    tokens, lengths = with_ends(encoder.encode(texts), rules.eod_id)
    if len(writers) == 1:
        writers[0].add(tokens, lengths)
        return
    held_out = np.array([is_held_out(text, rules.held_out_fraction) for text in texts])
    for side, writer in enumerate(writers):
        mine = held_out == bool(side)
        if mine.any():
            writer.add(tokens[np.repeat(mine, lengths)], lengths[mine])


def with_ends(encoded: Encoded, eod_id: int) -> tuple[NDArray[np.int32], NDArray[np.int64]]:
    """Tokens and lengths with the end-of-document token after each text; an empty text stays empty."""
    filled = encoded.lengths > 0
    lengths = encoded.lengths + filled
    tokens = np.empty(int(lengths.sum()), dtype=np.int32)
    is_end = np.zeros(len(tokens), dtype=np.bool_)
    is_end[np.cumsum(lengths)[filled] - 1] = True
    tokens[is_end] = eod_id
    tokens[~is_end] = encoded.tokens
    return tokens, lengths


@dataclass(frozen=True)
class WorkerSettings:
    """What a worker process needs to make its encoder."""

    tokenizer_path: Path
    eod_token: str
    fast: bool
    ascii_only: bool


def begin_worker(threads: int, parent: int) -> None:
    """Start of a worker process: its encoder's threads, before any is there, and its end with its parent's.

    A worker holds both ends of the queue that it waits at, so it would wait for ever after a parent that was killed.
    """
    os.environ["RAYON_NUM_THREADS"] = str(threads)

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(_SECONDS_BETWEEN_LOOKS)
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def work_on(rules: ShardRules, workshop: Workshop, shard: Shard, settings: WorkerSettings) -> None:
    """A shard in a worker process."""
    with workshop.locked(shard):
        if workshop.finished(shard) is None:
            write_shard(rules, workshop, shard, _encoder(settings), lambda _: None)


@lru_cache(maxsize=1)
def _encoder(settings: WorkerSettings) -> Encoder:
    tokenizer: Tokenizer = load_tokenizer(settings.tokenizer_path, settings.eod_token)
    if not settings.fast:
        return ReferenceEncoder(tokenizer)
    return GigatokenEncoder(tokenizer, ascii_only=settings.ascii_only)
