"""Epochs of the data order, computed once and mapped by every rank.

An epoch of a source is three arrays (data.order): for a billion documents they take 12 GB, which every rank of a node
would compute and hold. Here they are written once for a file system, whole or not at all, and mapped. They are named by
all that decides them, the content of the token file among it, so that none is ever read for another state of the data.
Without them the order is the same, only computed by each rank.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from data.fingerprints import combined
from foundation.errors import WorkError
from foundation.files import whole_file

_MAGIC = b"ORTHORD1"
_HEADER = struct.Struct("<8sQQBB")  # magic, sequences, samples, bytes of a sequence number, of a sample number


@dataclass(frozen=True)
class Epoch:
    """One epoch of a source."""

    sequences: NDArray[np.integer]
    """Shuffled, [sequences]."""
    offsets: NDArray[np.int64]
    """Where each begins in the epoch's stream of tokens, int64 [sequences + 1]."""
    samples: NDArray[np.integer]
    """Shuffled, [samples_per_epoch]."""


@dataclass(frozen=True)
class OrderIndex:
    """The epochs of one source on disk.

    Attributes:
        folder: that holds them; shared by all sources.
        content: hash of the token file.
        number: of the source in its blend.
    """

    folder: Path
    content: str
    seq_length: int
    seed: int
    number: int

    def path(self, epoch: int) -> Path:
        """Where an epoch is or would be."""
        parts = (_MAGIC.decode(), self.content, str(self.seq_length), str(self.seed), str(self.number))
        return self.folder / f"{combined(parts)[:24]}-{epoch}.order"

    def read(self, epoch: int, sequences: int, samples: int) -> Epoch | None:
        """Map an epoch; None where it was not written.

        Raises:
            WorkError: its file is damaged.
        """
        path = self.path(epoch)
        if not path.is_file():
            return None
        content = np.asarray(np.memmap(path, dtype=np.uint8, mode="r"))  # its own class is slow to index
        header = content[: _HEADER.size].tobytes()
        widths = _width(sequences), _width(samples)
        expected = _HEADER.pack(_MAGIC, sequences, samples, *widths)
        edges = np.cumsum([_begin(), 8 * (sequences + 1), widths[0] * sequences, widths[1] * samples]).tolist()
        if header != expected or len(content) != edges[-1]:
            raise WorkError(f"{path} is damaged", where=str(path), cure="remove it: it is then computed again")
        return Epoch(
            sequences=content[edges[1] : edges[2]].view(_dtype(widths[0])),
            offsets=content[edges[0] : edges[1]].view(np.int64),
            samples=content[edges[2] : edges[3]].view(_dtype(widths[1])),
        )

    def write(self, epoch: int, values: Epoch) -> None:
        """Keep an epoch."""
        sequences, samples = len(values.sequences), len(values.samples)
        widths = _width(sequences), _width(samples)
        with whole_file(self.path(epoch)) as handle:
            handle.write(_HEADER.pack(_MAGIC, sequences, samples, *widths).ljust(_begin(), b"\0"))
            for array, dtype in (
                (values.offsets, np.int64),
                (values.sequences, _dtype(widths[0])),
                (values.samples, _dtype(widths[1])),
            ):
                handle.write(np.ascontiguousarray(array, dtype=dtype).data.cast("B"))


def _begin() -> int:
    """Bytes before the arrays: a multiple of eight."""
    return -(-_HEADER.size // 8) * 8


def _width(count: int) -> int:
    return 4 if count <= 1 << 32 else 8


def _dtype(width: int) -> type[np.uint32 | np.uint64]:
    return np.uint32 if width == 4 else np.uint64
