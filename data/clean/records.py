"""Arrays on disk between stages: where documents lie, and sorted runs of hashes."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import IO

import numpy as np
from numpy.typing import NDArray

Hashes = NDArray[np.uint64]
Rows = NDArray[np.uint32]

WHERE = np.dtype([("piece", "<u4"), ("line", "<u8"), ("offset", "<u8")])
"""Of a document that the rules kept: piece of its shard, line within the piece, byte within the shard's kept text."""

_HASH, _ROW = 8, 4


@dataclass(frozen=True)
class Run:
    """A sorted run of hashes in a file: for each band its hashes, then the rows of the documents that they are of."""

    begin: int
    rows: int
    bands: int
    """1 of exact hashes, which take two numbers each."""
    width: int
    """64-bit numbers in a hash."""

    @property
    def byte_count(self) -> int:
        """Length in the file."""
        return self.bands * self.rows * (self.width * _HASH + _ROW)


def write_run(handle: IO[bytes], begin: int, hashes: Hashes, rows: Rows) -> Run:
    """Sort and append hashes.

    Args:
        handle: at byte `begin`.
        begin: length of the file so far.
        hashes: [documents, bands, width].
        rows: number of each document within its shard, rising. [documents]
    """
    for band in range(hashes.shape[1]):
        order = np.argsort(hashes[:, band, 0], kind="stable")
        handle.write(np.ascontiguousarray(hashes[order, band].T).tobytes())
        handle.write(rows[order].tobytes())
    return Run(begin, len(rows), hashes.shape[1], hashes.shape[2])


def read_run(path: Path, run: Run, band: int, low: int, high: int) -> tuple[Hashes, Rows]:
    """The hashes of a band whose first number n has low <= n < high, and their rows; only these are read into memory.

    Returns:
        [hashes, width], sorted by the first number, then by row; [hashes].
    """
    at = run.begin + band * run.rows * (run.width * _HASH + _ROW)
    if not run.rows:
        return np.empty((0, run.width), np.uint64), np.empty(0, np.uint32)
    hashes = np.memmap(path, "<u8", "r", at, (run.width, run.rows))
    rows = np.memmap(path, "<u4", "r", at + run.width * run.rows * _HASH, (run.rows,))
    first = int(np.searchsorted(hashes[0], np.uint64(low)))
    last = run.rows if high > 0xFFFFFFFFFFFFFFFF else int(np.searchsorted(hashes[0], np.uint64(high)))
    return np.array(hashes[:, first:last].T), np.array(rows[first:last])
