"""Move rows of tensors between files and memory: `preadv` and `pwritev` between planned places and reused buffers."""

from __future__ import annotations

import ctypes
import os
from bisect import bisect_right
from collections.abc import Callable, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from checkpoint_tools.catalog import Catalog, Piece, StoredTensor
from checkpoint_tools.dtypes import DType
from checkpoint_tools.reading import opened, unreadable_named
from foundation.errors import WorkError

Block = NDArray[Any]
"""[rows, columns] of a tensor, contiguous, in its dtype's carrier."""

SYNC_FILE_RANGE_WRITE = 2
_LIBC = ctypes.CDLL(None) if hasattr(ctypes.CDLL(None), "sync_file_range") else None

VECTORS = 512
"""Buffers in one system call; Linux allows 1024."""
BLOCK_BYTES = 8 << 20
"""Rows are moved in blocks of about this size: memory stays flat, and what was read is still in the cache when it is
written."""


def rows_per_block(tensor: StoredTensor, *, bytes_: int = BLOCK_BYTES) -> int:
    """How many rows of `tensor` are moved at a time."""
    return max(1, bytes_ // max(1, tensor.columns * tensor.dtype.size))


class Rows(Protocol):
    """What gives the rows of a checkpoint's tensors."""

    def fill(self, name: str, start: int, block: Block) -> None:
        """Put rows `start` ... of tensor `name` into `block`."""
        ...

    def prefetch(self, name: str, start: int, rows: int) -> None:
        """Rows `start` ... will be asked for soon."""
        ...


class OpenFiles:
    """Descriptors of files below one folder, opened when first used."""

    def __init__(self, folder: Path, flags: int) -> None:
        self._folder, self._flags = folder, flags
        self._open: dict[str, int] = {}

    def __getitem__(self, name: str) -> int:
        if name not in self._open:
            self._open[name] = opened(self._folder / name, self._flags)
        return self._open[name]

    def path(self, name: str) -> Path:
        return self._folder / name

    def __enter__(self) -> OpenFiles:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for descriptor in self._open.values():
            os.close(descriptor)
        self._open.clear()


class Scratch:
    """A buffer that is used again and again."""

    def __init__(self) -> None:
        self._bytes = np.empty(0, np.uint8)

    def block(self, rows: int, columns: int, dtype: DType) -> Block:
        """A contiguous [rows, columns]; its contents are whatever they were."""
        size = rows * columns * dtype.size
        if self._bytes.size < size:
            self._bytes = np.empty(size, np.uint8)
        block: Block = self._bytes[:size].view(dtype.carrier).reshape(rows, columns)
        return block


class CatalogRows:
    """The rows of a catalog's tensors, read from its files. Copies that a format keeps are held to be the same."""

    def __init__(self, catalog: Catalog) -> None:
        self._catalog = catalog
        self._files = OpenFiles(catalog.folder, os.O_RDONLY)
        self._staging = Scratch()
        self._of: tuple[str, list[Piece]] = ("", [])

    def __enter__(self) -> CatalogRows:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._files.__exit__(kind, error, trace)

    def fill(self, name: str, start: int, block: Block) -> None:
        """Put rows `start` ... of tensor `name` into `block`.

        Raises:
            WorkError: a file ends too early or cannot be read, or copies of the tensor differ.
        """
        tensor = self._catalog.tensors[name]
        move_rows(tensor, self._pieces(tensor), start, block, self._staging, self._read, read=True)
        for piece in tensor.replicas:
            self._compare(tensor, piece, start, block)

    def prefetch(self, name: str, start: int, rows: int) -> None:
        """Let the kernel read rows `start` ... while something else is done."""
        tensor = self._catalog.tensors[name]
        for piece in tensor.pieces:
            first, end = max(piece.row, start), min(piece.row + piece.rows, start + rows)
            if first < end:
                row = piece.columns * tensor.dtype.size
                offset = piece.offset + (first - piece.row) * row
                with unreadable_named(self._files.path(piece.file)):
                    descriptor = self._files[piece.file]
                    os.posix_fadvise(descriptor, offset, (end - first) * row, os.POSIX_FADV_WILLNEED)

    def _pieces(self, tensor: StoredTensor) -> Sequence[Piece]:
        if self._of[0] != tensor.name:
            self._of = (tensor.name, by_row(tensor.pieces))
        return self._of[1]

    def _read(self, file: str, offset: int, buffers: list[memoryview]) -> None:
        with unreadable_named(self._files.path(file)):
            _all_of(os.preadv, self._files[file], buffers, offset, self._files.path(file))

    def _compare(self, tensor: StoredTensor, piece: Piece, start: int, block: Block) -> None:
        first, end = max(piece.row, start), min(piece.row + piece.rows, start + block.shape[0])
        if first >= end:
            return
        copy = np.empty((end - first, piece.columns), tensor.dtype.carrier)
        offset = piece.offset + (first - piece.row) * piece.columns * tensor.dtype.size
        self._read(piece.file, offset, [bytes_of(copy)])
        held = block[first - start : end - start, piece.column : piece.column + piece.columns]
        # As bytes: a NaN equals itself here.
        if copy.tobytes() != np.ascontiguousarray(held).tobytes():
            raise WorkError(
                f"copies of {tensor.name} differ: {piece.file} holds other values than {tensor.pieces[0].file}",
                where=str(self._catalog.folder),
                cure="use another copy of the checkpoint: ranks or tied matrices drifted apart, or one is damaged",
            )


class Observer(Protocol):
    """Sees all that is written, in order."""

    def wrote(self, file: str, offset: int, data: memoryview) -> None: ...


class TargetRows:
    """Writes the rows of tensors to their planned places."""

    def __init__(self, files: OpenFiles, observer: Observer | None = None) -> None:
        self._files, self._observer = files, observer
        self._staging = Scratch()

    def put(self, tensor: StoredTensor, pieces: Sequence[Piece], start: int, block: Block) -> None:
        """Write rows `start` ... of `tensor`, wherever they go."""
        move_rows(tensor, pieces, start, block, self._staging, self._write, read=False)

    def _write(self, file: str, offset: int, buffers: list[memoryview]) -> None:
        if self._observer is not None:
            at = offset
            for buffer in buffers:
                self._observer.wrote(file, at, buffer)
                at += buffer.nbytes
        _all_of(os.pwritev, self._files[file], buffers, offset, self._files.path(file))
        start_writeback(self._files[file], offset, sum(buffer.nbytes for buffer in buffers))


Move = Callable[[str, int, list[memoryview]], None]


def by_row(pieces: Sequence[Piece]) -> list[Piece]:
    """In the order of rows, as `move_rows` wants them."""
    return sorted(pieces, key=lambda piece: (piece.row, piece.column))


def move_rows(
    tensor: StoredTensor,
    pieces: Sequence[Piece],
    start: int,
    block: Block,
    staging: Scratch,
    move: Move,
    *,
    read: bool,
) -> None:
    """Move rows `start` ... between `block` and the pieces that hold them.

    Whole rows go straight between file and block, neighbours in a file in one call; parts of rows go by way of a
    contiguous staging buffer.

    Args:
        pieces: sorted by row.
        move: preadv or pwritev of one file.
        read: from the files into the block, or the other way.
    """
    end = start + block.shape[0]
    last = bisect_right(pieces, end - 1, key=lambda piece: piece.row)
    runs: list[tuple[str, int, memoryview]] = []
    for piece in pieces[:last]:
        first, stop = max(piece.row, start), min(piece.row + piece.rows, end)
        if first >= stop:
            continue
        offset = piece.offset + (first - piece.row) * piece.columns * tensor.dtype.size
        if piece.columns == tensor.columns:
            runs.append((piece.file, offset, bytes_of(block[first - start : stop - start])))
            continue
        part = block[first - start : stop - start, piece.column : piece.column + piece.columns]
        staged = staging.block(stop - first, piece.columns, tensor.dtype)
        if read:
            move(piece.file, offset, [bytes_of(staged)])
            part[...] = staged
        else:
            staged[...] = part
            move(piece.file, offset, [bytes_of(staged)])
    _move_runs(runs, move)


def _move_runs(runs: list[tuple[str, int, memoryview]], move: Move) -> None:
    """One call for what lies side by side in a file."""
    runs.sort(key=lambda run: run[:2])
    together: list[memoryview] = []
    file, begin, position = "", 0, -1
    for name, offset, buffer in runs:
        if together and (name != file or offset != position or len(together) == VECTORS):
            move(file, begin, together)
            together = []
        if not together:
            file, begin, position = name, offset, offset
        together.append(buffer)
        position += buffer.nbytes
    if together:
        move(file, begin, together)


def start_writeback(descriptor: int, offset: int, size: int) -> None:
    """Let the kernel begin to write a range to the disk, without waiting (sync_file_range of Linux).

    A hint: where it is not there or refused, the flush that follows has more to do.
    """
    if _LIBC is not None:
        _LIBC.sync_file_range(descriptor, ctypes.c_int64(offset), ctypes.c_int64(size), SYNC_FILE_RANGE_WRITE)


def bytes_of(block: Block) -> memoryview:
    """The bytes of a contiguous block, as they lie."""
    return block.reshape(-1).view(np.uint8).data


def _all_of(
    call: Callable[[int, list[memoryview], int], int],
    descriptor: int,
    buffers: list[memoryview],
    offset: int,
    path: Path,
) -> None:
    """All bytes of `buffers`: a call may move fewer."""
    left = list(buffers)
    while left:
        moved = call(descriptor, left, offset)
        if moved <= 0:
            raise WorkError(f"{path} ends at byte {offset}, too early", cure="use another copy of the file")
        offset += moved
        while left and moved >= left[0].nbytes:
            moved -= left.pop(0).nbytes
        if moved:
            left[0] = left[0][moved:]
