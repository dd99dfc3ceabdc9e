"""Copy the tensors of a plan: part by part, by several processes, each part hashed, flushed and then reported."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from pathlib import Path

import xxhash

from checkpoint_tools.catalog import Piece, StoredTensor
from checkpoint_tools.dtypes import converted
from checkpoint_tools.rows import OpenFiles, Rows, Scratch, TargetRows, by_row, bytes_of, rows_per_block
from checkpoint_tools.target import OutputFile, Target
from foundation.errors import WorkError
from foundation.files import flush_folder


@dataclass(frozen=True)
class SourceTensors:
    """What is copied.

    Attributes:
        tensors: by canonical name, as the source has them.
        open: gives their rows, for a `with`.
        recorded: hashes that they have to have, where an earlier conversion wrote them down.
        where: for messages.
    """

    tensors: Mapping[str, StoredTensor]
    open: Callable[[], AbstractContextManager[Rows]]
    recorded: Mapping[str, str]
    where: str


@dataclass
class DonePart:
    """A part whose bytes lie on the disk.

    Attributes:
        number: which.
        hashes: xxh3_128 of each tensor's bytes in the target, by canonical name.
        file_hash: xxh3_128 of the file that the part is, where wanted.
    """

    number: int
    hashes: dict[str, str] = field(default_factory=dict)
    file_hash: str | None = None


def make_files(target: Target, folder: Path) -> None:
    """Create every file of `target` at its full size, its headers in place."""
    for file in target.files:
        path = folder / file.name
        path.parent.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
        try:
            os.ftruncate(descriptor, file.size)
            for offset, data in file.literals:
                written = 0
                while written < len(data):
                    written += os.pwrite(descriptor, data[written:], offset + written)
        finally:
            os.close(descriptor)
    # A part that is written down as done lies in a file that a power cut must not take away.
    for place in {place for file in target.files for place in (folder / file.name).parents}:
        if place.is_relative_to(folder):
            flush_folder(place)


def still_there(target: Target, folder: Path, done: Mapping[int, DonePart]) -> dict[int, DonePart]:
    """Those parts of `done` whose files are all in `folder`, at their full size."""
    whole = {file.name for file in target.files if _size(folder / file.name) == file.size}
    return {
        number: part
        for number, part in done.items()
        if all(piece.file in whole for name in target.parts[number] for piece in all_pieces(target.tensors[name]))
    }


def _size(path: Path) -> int | None:
    return path.stat().st_size if path.is_file() else None


def copy_parts(source: SourceTensors, target: Target, folder: Path, numbers: Iterator[int]) -> Iterator[DonePart]:
    """Copy the parts `numbers`, giving each when it lies on the disk; the next one is copied meanwhile."""
    files = {file.name: file for file in target.files}
    with (
        source.open() as rows,
        OpenFiles(folder, os.O_RDWR) as outputs,
        ThreadPoolExecutor(1) as flusher,
    ):
        before: Future[DonePart] | None = None
        for number in numbers:
            names = target.parts[number]
            observer = FileHash(files[target.tensors[names[0]].pieces[0].file]) if target.hash_files else None
            done = DonePart(number)
            for name, after in zip(names, [*names[1:], None], strict=True):
                done.hashes[name] = _copy(source, rows, target.tensors[name], TargetRows(outputs, observer), after)
            done.file_hash = observer.finished() if observer else None
            touched = {piece.file for name in names for piece in all_pieces(target.tensors[name])}
            flush = flusher.submit(_flushed, done, [outputs[name] for name in sorted(touched)])
            if before is not None:
                yield before.result()
            before = flush
        if before is not None:
            yield before.result()


def all_pieces(tensor: StoredTensor) -> Iterator[Piece]:
    """Pieces and copies."""
    yield from tensor.pieces
    yield from tensor.replicas


def _flushed(done: DonePart, descriptors: list[int]) -> DonePart:
    """Wait for the disk; then the bytes need not stay in memory."""
    for descriptor in descriptors:
        os.fdatasync(descriptor)
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
    return done


def _copy(source: SourceTensors, rows: Rows, target: StoredTensor, output: TargetRows, after: str | None) -> str:
    """Copy one tensor; the hash of what was written. Meanwhile the kernel reads ahead, at the end in tensor `after`."""
    tensor = source.tensors[target.name]
    pieces = by_row([*target.pieces, *target.replicas])
    read, wrote = xxhash.xxh3_128(), xxhash.xxh3_128()
    scratch = Scratch()
    step = rows_per_block(tensor)
    for start in range(0, tensor.rows, step):
        block = scratch.block(min(step, tensor.rows - start), tensor.columns, tensor.dtype)
        if start + step < tensor.rows:
            rows.prefetch(target.name, start + step, step)
        elif after is not None:
            rows.prefetch(after, 0, rows_per_block(source.tensors[after]))
        rows.fill(target.name, start, block)
        read.update(bytes_of(block))
        result = converted(block, tensor.dtype, target.dtype)
        if result is not block:
            wrote.update(bytes_of(result))
        output.put(target, pieces, start, result)
    check_hash(target.name, read.hexdigest(), source.recorded, source.where)
    return str((read if target.dtype is tensor.dtype else wrote).hexdigest())


def check_hash(name: str, found: str, recorded: Mapping[str, str], where: str) -> None:
    """Hold tensor `name`, which was `found` to have this hash, to the one that was written down, if one was.

    Raises:
        WorkError: it is another one.
    """
    if recorded.get(name, found) != found:
        raise WorkError(
            f"{name} is not what was written: its hash differs from the one in conversion.json",
            where=where,
            cure="use another copy of the checkpoint; if its weights were changed on purpose, remove conversion.json",
        )


class FileHash:
    """xxh3_128 of a file whose bytes are written in order, headers and zeros between them included."""

    ZEROS = bytes(1 << 20)

    def __init__(self, file: OutputFile) -> None:
        self._file = file
        self._literals = sorted(file.literals)
        self._next, self._position = 0, 0
        self._hash = xxhash.xxh3_128()

    def wrote(self, file: str, offset: int, data: memoryview) -> None:
        """Take in what is written at `offset`."""
        if file != self._file.name:
            raise AssertionError(f"{file} is written in the part of {self._file.name}")
        self._advance(offset)
        self._hash.update(data)
        self._position += data.nbytes

    def finished(self) -> str:
        """The hash of the whole file."""
        self._advance(self._file.size)
        return str(self._hash.hexdigest())

    def _advance(self, to: int) -> None:
        while self._next < len(self._literals) and self._literals[self._next][0] < to:
            start, data = self._literals[self._next]
            self._zeros(start)
            self._hash.update(data)
            self._position += len(data)
            self._next += 1
        self._zeros(to)

    def _zeros(self, to: int) -> None:
        if to < self._position:
            raise AssertionError(f"{self._file.name} is not written in order: byte {to} after {self._position}")
        while self._position < to:
            count = min(len(self.ZEROS), to - self._position)
            self._hash.update(self.ZEROS[:count])
            self._position += count
