"""Turning documents into token files, and splitting them by a hash of their content.

The work is cut into shards that are kept when they are done. A run that was killed goes on after its last finished
shard, several processes or the tasks of a Slurm array share the shards, and the files that come out are the same bytes
in every case.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from itertools import islice
from multiprocessing import get_context
from pathlib import Path

from data.documents import BAD_LINES_KEPT, Reading, no_document, read_documents
from data.encoding import Encoder, FastPathDiffers, GigatokenEncoder, ReferenceEncoder, choose_encoder
from data.manifest import Manifest, SourceFileRecord, SourceRecord
from data.merge import join_token_files
from data.shards import SHARD_BYTES, PieceHash, Shard, ShardRecord, Workshop, cut, open_workshop
from data.sources import Source
from data.tokenize_shard import ShardRules, WorkerSettings, begin_worker, work_on, write_shard
from data.tokenizer import Tokenizer
from foundation.errors import RequestError, WorkError
from foundation.files import write_text
from foundation.interrupts import children_without_ctrl_c

Report = Callable[[str], None]
Progress = Callable[[int, int], None]  # bytes read so far, bytes of all sources

_BAD_LINES_TOLD = 20
_SECONDS_BETWEEN_LINES = 20.0
_SAMPLED_SHARDS = 8
_SAMPLED_LETTERS = 1 << 18  # of each
_SAMPLED_DOCUMENT = 1 << 16
_CORES_A_PROCESS = 4  # what reading and writing in one thread leaves the encoding threads to do


@dataclass(frozen=True)
class Tokenization:
    """What is to be tokenised, and how."""

    sources: tuple[Source, ...]
    """Documents, not tokenised yet."""
    tokenizer: Tokenizer
    text_key: str
    """Key or column of the text."""
    prefix: Path
    """Of the token file."""
    held_out_prefix: Path | None = None
    """Prefix of a second one, for the documents that are held out; None: none are."""
    held_out_fraction: float = 0.0
    """Share of the documents to hold out, by a hash of their content."""
    strict: bool = False
    """Refuse sources with lines that hold no document."""
    shard_bytes: int = SHARD_BYTES
    """Of the sources on disk in one shard."""

    @property
    def rules(self) -> ShardRules:
        """What each shard needs to know of it."""
        tokenizer = self.tokenizer
        return ShardRules(self.text_key, tokenizer.eod_id, tokenizer.vocab_size, tokenizer.hash, self.held_out_fraction)

    @property
    def prefixes(self) -> tuple[Path, ...]:
        """One or two."""
        return (self.prefix,) if self.held_out_prefix is None else (self.prefix, self.held_out_prefix)


@dataclass(frozen=True)
class Share:
    """What one of several tasks does: the shards number, number + count, ..."""

    number: int
    count: int


def tokenize(
    job: Tokenization,
    report: Report,
    progress: Progress | None = None,
    *,
    workers: int | None = None,
    share: Share | None = None,
) -> list[Manifest]:
    """Tokenise documents into one token file, or into two, by content.

    Each document gets the end-of-document token; an empty one stays empty and gets none (as in Megatron's own tool).

    Args:
        job: what to do.
        report: takes lines for people.
        progress: is told the bytes read.
        workers: processes; None: one for every few cores.
        share: do only these shards, and do not join them.

    Returns:
        The manifests of the token files; none where only a share was done.

    Raises:
        RequestError: a source holds no document, or bad lines where `strict` refuses them.
        WorkError: a source is damaged, or changed while it was read.
    """
    shards = cut(job.sources, job.shard_bytes)
    names = ("train", "held")[: len(job.prefixes)]
    workshop = open_workshop(job.prefix, names, shards, repr(job.rules))
    mine = shards if share is None else shards[share.number :: share.count]
    waiting = _unfinished(workshop, mine)
    if len(waiting) < len(mine):
        report(f"tokenise: {len(mine) - len(waiting):,} of {len(mine):,} shards are there already")
    if waiting and (warning := workshop.without_locks()) is not None:
        report(f"tokenise: {warning}")
    while waiting:  # a second time where the fast encoder erred
        _write_shards(job, workshop, waiting, workers or _default_workers(), report, progress)
        waiting = _unfinished(workshop, mine)
    if share is not None:
        report(
            f"tokenise: share {share.number} of {share.count}: its {len(mine):,} of {len(shards):,} shards are there"
        )
        return []
    return _join(job, workshop, shards, report)


def _unfinished(workshop: Workshop, shards: Sequence[Shard]) -> list[Shard]:
    return [shard for shard in shards if workshop.finished(shard) is None]


def _default_workers() -> int:
    return max(1, len(os.sched_getaffinity(0)) // _CORES_A_PROCESS)


def _write_shards(
    job: Tokenization,
    workshop: Workshop,
    shards: Sequence[Shard],
    workers: int,
    report: Report,
    progress: Progress | None,
) -> None:
    """Write these shards, unless the fast encoder errs: then the caller begins again without it."""
    workers = min(workers, len(shards))
    told = _Told(sum(shard.byte_count() for shard in shards), report, progress)
    encoder: Encoder = ReferenceEncoder(job.tokenizer)
    if not workshop.distrusted():
        encoder = choose_encoder(job.tokenizer, list(_sample(job, shards)), report)
    try:
        if workers > 1:
            _write_in_processes(job, workshop, shards, workers, encoder, told)
        else:
            _write_here(job, workshop, shards, encoder, told)
    except FastPathDiffers as problem:
        report(f"tokenise: gigatoken gave {problem}; all that it did is done again by the reference")
        workshop.distrust()


def _write_here(job: Tokenization, workshop: Workshop, shards: Sequence[Shard], encoder: Encoder, told: _Told) -> None:
    for shard in shards:
        with workshop.locked(shard):
            if workshop.finished(shard) is None:
                write_shard(job.rules, workshop, shard, encoder, told.within)
        told.finished(shard)


def _write_in_processes(
    job: Tokenization, workshop: Workshop, shards: Sequence[Shard], workers: int, encoder: Encoder, told: _Told
) -> None:
    threads = max(1, len(os.sched_getaffinity(0)) // workers)
    fast = isinstance(encoder, GigatokenEncoder)
    ascii_only = isinstance(encoder, GigatokenEncoder) and encoder.ascii_only
    settings = WorkerSettings(job.tokenizer.path, job.tokenizer.eod_token, fast, ascii_only)
    # Not by fork: the encoders' threads do not survive one.
    with ProcessPoolExecutor(workers, get_context("spawn"), begin_worker, (threads, os.getpid())) as pool:
        with children_without_ctrl_c():  # submitting is what starts them
            work = {pool.submit(work_on, job.rules, workshop, shard, settings): shard for shard in shards}
        try:
            for done in as_completed(work):
                done.result()
                told.finished(work[done])
        except BrokenProcessPool as problem:
            raise WorkError(
                "a process that tokenised ended before its time",
                where=str(job.prefix),
                cure="look for a lack of memory, and start again: finished shards are kept",
            ) from problem
        finally:
            pool.shutdown(cancel_futures=True)


class _Told:
    """Tells how far the work is: bytes for a bar, a line now and then."""

    def __init__(self, total: int, report: Report, progress: Progress | None) -> None:
        self._total, self._report, self._progress = total, report, progress
        self._done = 0
        self._begun = self._told = time.monotonic()

    def within(self, read: int) -> None:
        """So many bytes of the present shard were read."""
        self._tell(self._done + read)

    def finished(self, shard: Shard) -> None:
        """A shard is done."""
        self._done += shard.byte_count()
        self._tell(self._done)

    def _tell(self, done: int) -> None:
        if self._progress is not None:
            self._progress(done, self._total)
        if time.monotonic() - self._told > _SECONDS_BETWEEN_LINES:
            self._told = time.monotonic()
            speed = done / (self._told - self._begun) / 1e6
            self._report(f"tokenise: {done:,} of {self._total:,} bytes of the sources, {speed:.1f} MB/s")


def _sample(job: Tokenization, shards: Sequence[Shard]) -> Iterator[str]:
    """The beginnings of some shards, to compare encoders on."""
    step = max(1, -(-len(shards) // _SAMPLED_SHARDS))
    for shard in shards[::step]:
        reading = Reading(Source(job.sources[shard.source].name, shard.files))
        letters = 0
        for document in read_documents(reading, job.text_key, may_be_empty=True):
            yield document.text[:_SAMPLED_DOCUMENT]
            letters += len(document.text[:_SAMPLED_DOCUMENT])
            if letters >= _SAMPLED_LETTERS:
                break


def _join(job: Tokenization, workshop: Workshop, shards: Sequence[Shard], report: Report) -> list[Manifest]:
    """The token files from those of all shards."""
    done = [(shard, workshop.finished(shard)) for shard in shards]
    missing = [shard.number for shard, record in done if record is None]
    if missing:
        raise WorkError(f"shard {missing[0]} is gone", where=str(workshop.folder), cure="start again")
    found = [(shard, record) for shard, record in done if record is not None]
    readings = [_reading(source, number, found) for number, source in enumerate(job.sources)]
    for reading in readings:
        report_reading(reading, report)
        if not reading.documents:
            workshop.remove()
            raise no_document(reading, job.text_key)
    if job.strict:
        refuse_bad_lines(readings)
    keep_bad_lines(job.prefix, readings)
    manifests = []
    for side, prefix in enumerate(job.prefixes):
        sources = [_source_record(reading, number, side, found) for number, reading in enumerate(readings)]
        parts = [workshop.prefixes(shard)[side] for shard, _ in found]
        manifests.append(join_token_files(parts, prefix, sources))
    workshop.remove()
    return manifests


def _reading(source: Source, number: int, found: Sequence[tuple[Shard, ShardRecord]]) -> Reading:
    """What was met in a source, from the records of its shards."""
    total = Reading(source)
    lines_before: dict[Path, int] = {}
    for shard, record in found:
        if shard.source != number:
            continue
        total.documents += sum(record.documents)
        total.blank_lines += record.blank_lines
        total.bad_lines += record.bad_lines
        total.lines += record.lines
        total.bytes_read += sum(piece.bytes for piece in record.pieces)
        first = shard.files[0]
        before = lines_before.get(first.path, 0) if first.begin else 0
        total.bad.extend(islice(record.bad_after(before), BAD_LINES_KEPT - len(total.bad)))
        if first.end is not None:  # a range is alone in its shard
            lines_before[first.path] = before + record.lines
    return total


def _source_record(
    reading: Reading, number: int, side: int, found: Sequence[tuple[Shard, ShardRecord]]
) -> SourceRecord:
    mine = [record for shard, record in found if shard.source == number]
    pieces: dict[str, list[PieceHash]] = {}
    for record in mine:
        for piece in record.pieces:
            pieces.setdefault(piece.path, []).append(piece)
    return SourceRecord(
        name=reading.source.name,
        documents=sum(record.documents[side] for record in mine),
        bad_lines=reading.bad_lines,
        files=tuple(
            SourceFileRecord(path, sum(piece.bytes for piece in parts), tuple(piece.sha256 for piece in parts))
            for path, parts in pieces.items()
        ),
    )


def refuse_bad_lines(readings: Sequence[Reading]) -> None:
    """Refuse sources with bad lines.

    Raises:
        RequestError: there is one.
    """
    bad = next((bad for reading in readings for bad in reading.bad), None)
    if bad is not None:
        raise RequestError(
            f"{sum(reading.bad_lines for reading in readings):,} lines hold no document",
            where=f"{bad.file}:{bad.line}: {bad.why}",
            rule="--strict refuses sources with such lines",
            cure="correct them, or leave --strict out: they are then left out, and listed",
        )


def report_reading(reading: Reading, report: Report) -> None:
    """Tell what was read from a source, what was not, and why."""
    source = reading.source
    files = "1 file" if len(source.files) == 1 else f"{len(source.files):,} files"
    report(
        f"{source.name}: {reading.documents:,} documents from {files}; "
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
        json.dumps({"file": str(bad.file), "line": bad.line, "why": bad.why})  # ASCII: names may be no UTF-8
        for reading in readings
        for bad in reading.bad
    ]
    path = bad_lines_path(prefix)
    if lines:
        write_text(path, "\n".join(lines) + "\n")
    else:
        path.unlink(missing_ok=True)
