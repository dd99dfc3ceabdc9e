"""What a conversion will write, known to the byte before anything is written."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from checkpoint_tools.catalog import Format, StoredTensor

PART_BYTES = 128 << 20
"""Work is shared out, flushed and written down in parts of about this size."""


@dataclass(frozen=True)
class OutputFile:
    """A file of the target.

    Attributes:
        name: below the target's folder.
        size: in bytes; what neither a literal nor a tensor fills is zero.
        literals: (offset, bytes) of headers and the like.
    """

    name: str
    size: int
    literals: tuple[tuple[int, bytes], ...]


@dataclass(frozen=True)
class Target:
    """What is to be written.

    Attributes:
        format: of the files.
        files: that hold tensors.
        tensors: by canonical name, where each goes.
        parts: the tensors in the order of writing, in units of work.
        texts: small files by name, written when all tensors are.
        hash_files: a part is one file, whose bytes come in order, and its hash is kept.
        layout: what the files are cut for, for people.
        notes: what was left aside, for people.
        beside: folder, below the target's, in which the record and the tokenizer go.
    """

    format: Format
    files: tuple[OutputFile, ...]
    tensors: Mapping[str, StoredTensor]
    parts: tuple[tuple[str, ...], ...]
    texts: Mapping[str, bytes]
    hash_files: bool = False
    layout: str | None = None
    notes: tuple[str, ...] = ()
    beside: str = ""

    @property
    def bytes(self) -> int:
        """On disk."""
        return sum(file.size for file in self.files) + sum(map(len, self.texts.values()))


def in_parts(tensors: Iterable[StoredTensor]) -> tuple[tuple[str, ...], ...]:
    """Consecutive tensors in groups of about PART_BYTES."""
    parts: list[list[str]] = [[]]
    size = 0
    for tensor in tensors:
        if parts[-1] and size + tensor.bytes > PART_BYTES:
            parts.append([])
            size = 0
        parts[-1].append(tensor.name)
        size += tensor.bytes
    return tuple(tuple(part) for part in parts)
