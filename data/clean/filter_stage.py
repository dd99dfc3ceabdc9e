"""Stage filter: read a shard, judge its documents, and take down the hashes by which duplicates will meet."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field
from itertools import islice
from typing import IO, Any

import numpy as np
import orjson

from data.clean.judge import Judge, Verdict, load_models
from data.clean.plan import Plan
from data.clean.reading import PieceReading, Record, read_piece, write_line
from data.clean.records import WHERE, Run, write_run
from data.clean.settings import CleanSettings
from data.clean.signatures import Hashes, WordHashes, band_hashes, exact_hashes
from data.clean.state import Work
from data.documents import BAD_LINES_KEPT
from foundation.files import whole_file

STAGE = "filter"
DETAILS = ".details.json"
EXAMPLES = 3
EXAMPLE_LETTERS = 400
_BATCH_DOCUMENTS = 2048
_BATCH_LETTERS = 4 << 20
_RUN_ROWS = 1 << 18


@dataclass
class _Tally:
    """Counts of a shard."""

    documents_in: int = 0
    documents_kept: int = 0
    letters_in: int = 0
    letters_kept: int = 0
    changed: int = 0
    """Kept documents whose text was normalised or lost lines."""
    removed: Counter[str] = field(default_factory=Counter)
    examples: dict[str, list[dict[str, Any]]] = field(default_factory=dict)
    lengths_in: Counter[int] = field(default_factory=Counter)
    """Documents by the number of binary digits of their length in letters."""
    lengths_kept: Counter[int] = field(default_factory=Counter)

    def take(self, record: Record, verdict: Verdict, piece: int) -> None:
        """Count a document."""
        self.documents_in += 1
        self.letters_in += len(record.text)
        self.lengths_in[len(record.text).bit_length()] += 1
        if verdict.rule is None:
            self.documents_kept += 1
            self.letters_kept += len(verdict.text)
            self.changed += verdict.text is not record.text
            self.lengths_kept[len(verdict.text).bit_length()] += 1
            return
        self.removed[verdict.rule] += 1
        kept = self.examples.setdefault(verdict.rule, [])
        if len(kept) < EXAMPLES:
            text = record.text[:EXAMPLE_LETTERS]
            kept.append({"piece": piece, "line": record.line, "value": verdict.value, "text": text})


class _HashRuns:
    """Hashes of documents, written in sorted runs of bounded size."""

    def __init__(self, handle: IO[bytes]) -> None:
        self.runs: list[Run] = []
        self._handle = handle
        self._hashes: list[Hashes] = []
        self._rows: list[Any] = []
        self._held = self._bytes = 0

    def add(self, hashes: Hashes, rows: Any) -> None:
        """Take [documents, bands, width] and the documents' rows."""
        self._hashes.append(hashes)
        self._rows.append(rows)
        self._held += len(rows)
        if self._held >= _RUN_ROWS:
            self.flush()

    def flush(self) -> None:
        """Write what is held as a run."""
        if self._held:
            run = write_run(
                self._handle, self._bytes, np.concatenate(self._hashes), np.concatenate(self._rows).astype("<u4")
            )
            self.runs.append(run)
            self._bytes += run.byte_count
        self._hashes, self._rows, self._held = [], [], 0


class FilterStage:
    """Works on shards one after the other; models and hashes of words are kept between them."""

    def __init__(self, plan: Plan, settings: CleanSettings, work: Work) -> None:
        self._plan, self._settings, self._work = plan, settings, work
        self._words = WordHashes()
        self._models = load_models(settings)

    def run(self, shard: int) -> None:
        """Filter one shard; writes its files, then its marker."""
        work, settings = self._work, self._settings
        judge, tally = Judge(settings, self._models), _Tally()
        pieces: list[PieceReading] = []
        where: list[Any] = []
        with ExitStack() as files:

            def create(ending: str) -> IO[bytes]:
                return files.enter_context(whole_file(work.path(STAGE, shard, ending)))

            kept, removed = create(".kept.jsonl"), create(".removed.ndjson")
            exact = _HashRuns(create(".exact")) if settings.exact else None
            near = _HashRuns(create(".near")) if settings.near else None
            offset = 0
            for piece_number, batch in _batches(self._records(shard, pieces)):
                verdicts = judge.decide([record.text for record in batch])
                rows: list[tuple[int, int, int]] = []
                for record, verdict in zip(batch, verdicts, strict=True):
                    tally.take(record, verdict, piece_number)
                    if verdict.rule is None:
                        rows.append((piece_number, record.line, offset))
                        offset += write_line(kept, record, verdict.text, settings.text_key)
                    else:
                        removed.write(orjson.dumps([piece_number, record.line, verdict.rule, verdict.value]) + b"\n")
                first = tally.documents_kept - len(rows)
                self._hash([verdict.text for verdict in verdicts if verdict.rule is None], first, exact, near)
                where.append(np.array(rows, dtype=WHERE))
            for runs in (exact, near):
                if runs is not None:
                    runs.flush()
            create(".where").write(np.concatenate([np.empty(0, WHERE), *where]).tobytes())
            create(".bad.ndjson").write(_bad_lines(pieces))
            create(DETAILS).write(orjson.dumps(_details(tally, pieces, judge)))
        runs_of = {"exact_runs": exact.runs if exact else [], "near_runs": near.runs if near else []}
        work.mark(
            STAGE,
            shard,
            {
                "documents_in": tally.documents_in,
                "documents_kept": tally.documents_kept,
                "bad_lines": sum(piece.bad_lines for piece in pieces),
                "lines": [piece.lines for piece in pieces],
                **{name: [asdict(run) for run in runs] for name, runs in runs_of.items()},
            },
        )

    def _records(self, shard: int, pieces: list[PieceReading]) -> Iterator[tuple[int, Iterator[Record]]]:
        for number, piece in enumerate(self._plan.shards[shard]):
            reading = PieceReading()
            pieces.append(reading)
            yield number, read_piece(self._plan.file(piece.file), piece, self._settings.text_key, reading)

    def _hash(self, texts: Sequence[str], first_row: int, exact: _HashRuns | None, near: _HashRuns | None) -> None:
        if exact is not None and texts:
            exact.add(exact_hashes(texts)[:, None, :], np.arange(first_row, first_row + len(texts)))
        if near is not None and texts and self._settings.near is not None:
            hashes, documents = band_hashes(texts, self._words, self._settings.near)
            near.add(hashes[:, :, None], documents + first_row)


def _batches(pieces: Iterator[tuple[int, Iterator[Record]]]) -> Iterator[tuple[int, list[Record]]]:
    """Records of one piece in batches of a bounded number of documents and letters (but at least one document)."""
    for number, records in pieces:
        batch: list[Record] = []
        letters = 0
        for record in records:
            batch.append(record)
            letters += len(record.text)
            if len(batch) == _BATCH_DOCUMENTS or letters >= _BATCH_LETTERS:
                yield number, batch
                batch, letters = [], 0
        if batch:
            yield number, batch


def _bad_lines(pieces: Sequence[PieceReading]) -> bytes:
    lines = (
        orjson.dumps([number, line, why]) + b"\n" for number, piece in enumerate(pieces) for line, why in piece.bad
    )
    return b"".join(islice(lines, BAD_LINES_KEPT))


def _details(tally: _Tally, pieces: Sequence[PieceReading], judge: Judge) -> dict[str, Any]:
    """What only the report asks for; markers stay small, since every process reads all of them."""
    details = asdict(tally)
    for name in ("removed", "lengths_in", "lengths_kept"):
        details[name] = {str(key): count for key, count in sorted(getattr(tally, name).items())}
    return {
        **details,
        "scores": judge.scores,
        "blank_lines": sum(piece.blank_lines for piece in pieces),
        "left_out": sorted({name for piece in pieces for name in piece.left_out}),
    }
