"""The pieces of work of a tokenisation, and the folder that keeps what is finished of it.

A shard is some files of one source, or a range of bytes of a large .jsonl. Shards depend on the sources alone, never on
how many processes work, and their token files, joined in order, are the whole.
"""

from __future__ import annotations

import dataclasses
import json
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

from data.documents import BadLine
from data.fingerprints import combined, file_identity
from data.indexed import bin_path, idx_path
from data.manifest import read_manifest
from data.sources import Source, SourceFile
from foundation.errors import WorkError
from foundation.files import write_text
from foundation.locks import NoLocksError, take

SHARD_BYTES = 256 << 20
_VERSION = 1  # of what is kept; another one begins anew


@dataclass(frozen=True)
class Shard:
    """Some files of one source, or a range of one file."""

    number: int
    source: int
    """Number of its source in the tokenisation."""
    files: tuple[SourceFile, ...]

    def byte_count(self) -> int:
        """Bytes on disk."""
        return sum(file.byte_count() for file in self.files)


def cut(sources: Sequence[Source], shard_bytes: int = SHARD_BYTES) -> tuple[Shard, ...]:
    """Shards of about `shard_bytes` on disk, in the order of the sources and their files.

    Only an uncompressed .jsonl can be cut; a larger file of another kind is a shard of its own.
    """
    shards: list[Shard] = []
    for number, source in enumerate(sources):
        waiting: list[SourceFile] = []
        size = 0
        for file in source.files:
            for piece in _pieces(file, shard_bytes):
                if waiting and size + piece.byte_count() > shard_bytes:
                    shards.append(Shard(len(shards), number, tuple(waiting)))
                    waiting, size = [], 0
                waiting.append(piece)
                size += piece.byte_count()
        if waiting:
            shards.append(Shard(len(shards), number, tuple(waiting)))
    return tuple(shards)


def _pieces(file: SourceFile, shard_bytes: int) -> list[SourceFile]:
    size = file.byte_count()
    can_be_cut = file.kind == "jsonl" and file.path.suffix.lower() == ".jsonl"
    if not can_be_cut or size <= shard_bytes:
        return [file]
    edges = [*range(0, size, shard_bytes), size]
    return [dataclasses.replace(file, begin=begin, end=end) for begin, end in pairwise(edges)]


@dataclass(frozen=True)
class PieceHash:
    """What was read of one file."""

    path: str
    begin: int
    bytes: int
    sha256: str


@dataclass(frozen=True)
class ShardRecord:
    """What a finished shard met; beside its token files."""

    encoder: str
    documents: tuple[int, ...]
    """That went into each of its token files."""
    blank_lines: int
    bad_lines: int
    bad: tuple[tuple[str, int, str], ...]
    """File, line counted from where the shard begins in it, and why."""
    lines: int
    """Of its .jsonl files."""
    pieces: tuple[PieceHash, ...]

    def bad_after(self, lines: int) -> Iterator[BadLine]:
        """Its bad lines, where `lines` lines of the file come before the shard."""
        for path, line, why in self.bad:
            yield BadLine(Path(path), line + lines, why)


@dataclass(frozen=True)
class Workshop:
    """The folder beside PREFIX that keeps finished shards until all are there.

    Attributes:
        folder: .NAME.parts/STATE, where STATE names the sources and settings: others never meet what is kept here.
        names: of the token files that every shard writes.
    """

    folder: Path
    names: tuple[str, ...]

    def prefixes(self, shard: Shard) -> list[Path]:
        """Of the shard's token files."""
        return [self.folder / f"{shard.number:06d}.{name}" for name in self.names]

    def finished(self, shard: Shard) -> ShardRecord | None:
        """The record of a shard that is done, None where it is not."""
        record = self._read_record(shard)
        if record is None or not all(map(_is_whole, self.prefixes(shard))):
            return None
        return None if self.distrusted() and record.encoder != "reference" else record

    def _read_record(self, shard: Shard) -> ShardRecord | None:
        """None where there is none, or a damaged one: the shard is then done again."""
        path = self._record(shard)
        if not path.is_file():
            return None
        try:
            values: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
            pieces = tuple(PieceHash(**piece) for piece in values.pop("pieces"))
            bad = tuple((path, line, why) for path, line, why in values.pop("bad"))
            return ShardRecord(pieces=pieces, bad=bad, documents=tuple(values.pop("documents")), **values)
        except (ValueError, KeyError, TypeError, AttributeError):
            return None

    def keep(self, shard: Shard, record: ShardRecord) -> None:
        """Write a shard's record, before its token files get their names."""
        write_text(self._record(shard), json.dumps(dataclasses.asdict(record)) + "\n")

    def distrust(self) -> None:
        """Remember that the fast encoder erred here: what it wrote no longer counts as finished."""
        write_text(self.folder / "distrusted", "")

    def distrusted(self) -> bool:
        """Whether the fast encoder erred here."""
        return (self.folder / "distrusted").exists()

    @contextmanager
    def locked(self, shard: Shard) -> Iterator[None]:
        """Wait until nobody else works on a shard. Ends with the process that holds it."""
        path = self.folder / f"{shard.number:06d}.lock"
        with open(path, "a") as handle:
            with suppress(NoLocksError):  # `tokenize` has told people
                take(handle, path, "processes", wait=True)
            yield

    def without_locks(self) -> str | None:
        """A line for people where the file system has none, so that `locked` keeps nobody out."""
        path = self.folder / "probe.lock"
        with open(path, "a") as handle:
            try:
                take(handle, path, "processes")
            except NoLocksError as none:
                return none.warning("no other command tokenises there", "each would overwrite what the other writes")
        return None

    def remove(self) -> None:
        """Forget everything, also what earlier states of the sources left."""
        shutil.rmtree(self.folder.parent, ignore_errors=True)

    def _record(self, shard: Shard) -> Path:
        return self.folder / f"{shard.number:06d}.json"


def open_workshop(prefix: Path, names: Sequence[str], shards: Sequence[Shard], settings: str) -> Workshop:
    """The workshop of a token file: with its finished shards where sources and settings are as they were, else empty.

    Args:
        prefix: of the token file.
        names: of the token files of a shard.
        shards: all of them.
        settings: everything else that decides the tokens.
    """
    state = combined([str(_VERSION), *_state(shards), *names, settings])
    folder = prefix.with_name(f".{prefix.name}.parts") / state[:16]
    folder.mkdir(parents=True, exist_ok=True)
    return Workshop(folder, tuple(names))


def _state(shards: Sequence[Shard]) -> Iterator[str]:
    for shard in shards:
        for file in shard.files:
            yield f"{shard.number} {shard.source} {file.kind} {file.path.resolve()} {file.begin} {file.end}"
            yield json.dumps(identity_of(file))


def _is_whole(prefix: Path) -> bool:
    """Whether a shard's token file is there, by its size.

    The .idx comes last; the .bin is gone where the only shard was on its way to its final name.
    """
    data = bin_path(prefix)
    if not (data.is_file() and idx_path(prefix).is_file()):
        return False
    try:
        manifest = read_manifest(prefix)
    except WorkError:
        return False
    return manifest is not None and manifest.bin_bytes == data.stat().st_size


def refuse_changed(files: Sequence[SourceFile], before: Sequence[list[int]]) -> None:
    """Refuse a shard whose files changed while they were read.

    Raises:
        WorkError: one did.
    """
    for file, identity in zip(files, before, strict=True):
        if identity != identity_of(file):
            raise WorkError(
                f"{file.path} changed while it was read",
                where=str(file.path),
                cure="let nobody write to the sources, and start again",
            )


def identity_of(file: SourceFile) -> list[int]:
    """Changes when the file's content does."""
    return [number for part in file.parts() for number in file_identity(part)]
