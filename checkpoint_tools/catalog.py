"""Where the tensors of a whole model lie in files: the one description that all formats give and take.

A tensor of the whole model goes by its canonical name, core's own with the global index of layer and expert (that of
`model.global_tensors`), and is seen as a matrix of its first axis by all others. Every format holds it as rectangles of
that matrix, each of them contiguous bytes of one file. A conversion copies rectangles to rectangles.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from checkpoint_tools.dtypes import DType

Format = Literal["hf", "distributed", "megatron"]
FORMATS: tuple[Format, ...] = ("hf", "distributed", "megatron")

MOMENTS = ("exp_avg", "exp_avg_sq")
OPTIMIZER_PREFIX = "optimizer.state."
"""Before the canonical name of a weight: `optimizer.state.exp_avg.decoder...`."""


@dataclass(frozen=True, slots=True)
class Piece:
    """A rectangle of a tensor, row-major and contiguous in a file.

    Attributes:
        file: below the checkpoint's folder.
        offset: of its first byte in the file.
        row, rows: first row in the whole tensor, and how many.
        column, columns: likewise.
    """

    file: str
    offset: int
    row: int
    rows: int
    column: int
    columns: int


@dataclass(frozen=True)
class StoredTensor:
    """A tensor of the whole model, as a format holds it.

    Attributes:
        name: canonical.
        shape: without rows that pad the vocabulary.
        dtype: of its elements.
        pieces: rectangles that cover it exactly once.
        replicas: further rectangles with the same values: norms on every tensor-parallel rank, a tied embedding.
    """

    name: str
    shape: tuple[int, ...]
    dtype: DType
    pieces: tuple[Piece, ...]
    replicas: tuple[Piece, ...] = ()

    @property
    def rows(self) -> int:
        return self.shape[0]

    @property
    def columns(self) -> int:
        return math.prod(self.shape[1:])

    @property
    def bytes(self) -> int:
        return math.prod(self.shape) * self.dtype.size


@dataclass(frozen=True)
class Catalog:
    """What a checkpoint holds.

    Attributes:
        format: of its files.
        folder: where they lie.
        identity: whose weights they are.
        tensors: by canonical name, in the model's order.
        step, tokens: of the training so far, 0 where nothing says.
        layout: what the files are cut for, for people; None where nothing is cut.
        notes: what was found and left aside, for people.
        recorded: hashes of tensors (xxh3_128 of their bytes, row-major) that an earlier conversion wrote down.
    """

    format: Format
    folder: Path
    identity: Any  # architectures.identity.Identity, which knows nothing of files
    tensors: Mapping[str, StoredTensor]
    step: int = 0
    tokens: int = 0
    layout: str | None = None
    notes: tuple[str, ...] = ()
    recorded: Mapping[str, str] = field(default_factory=dict)

    @property
    def weights(self) -> dict[str, StoredTensor]:
        """Without optimizer state."""
        return {name: tensor for name, tensor in self.tensors.items() if not name.startswith(OPTIMIZER_PREFIX)}

    @property
    def optimizer_state(self) -> dict[str, StoredTensor]:
        return {name: tensor for name, tensor in self.tensors.items() if name.startswith(OPTIMIZER_PREFIX)}


def cover_fault(tensor: StoredTensor) -> str | None:
    """Why the pieces of `tensor` do not cover it exactly once, None where they do."""
    area = 0
    for piece in tensor.pieces:
        if min(piece.row, piece.rows, piece.column, piece.columns) < 0:
            return f"{piece.file} has a part before the beginning of {list(tensor.shape)}"
        if piece.row + piece.rows > tensor.rows or piece.column + piece.columns > tensor.columns:
            return f"{piece.file} has a part that lies outside of {list(tensor.shape)}"
        area += piece.rows * piece.columns
    whole = tensor.rows * tensor.columns
    if area < whole:
        return f"{whole - area} of its {whole} elements are nowhere"
    if area > whole or _overlap(tensor.pieces):
        return "parts of it are there more than once"
    return None


def state_fault(catalog: Catalog) -> str | None:
    """Why the optimizer's state is not that of every weight, None where it is, or where there is none."""
    state = catalog.optimizer_state
    kinds = {name.removeprefix(OPTIMIZER_PREFIX).partition(".")[0] for name in state}
    if kinds & set(MOMENTS):
        kinds |= set(MOMENTS)
    wanted = (f"{OPTIMIZER_PREFIX}{kind}.{weight}" for weight in catalog.weights for kind in sorted(kinds))
    missing = [name for name in wanted if name not in state]
    if not missing:
        return None
    more = f" and {len(missing) - 5} more" if len(missing) > 5 else ""
    return f"the optimizer's state is not whole: it lacks {', '.join(missing[:5])}{more}"


def _overlap(pieces: tuple[Piece, ...]) -> bool:
    """Whether two rectangles share an element; pieces of one column band are compared along rows."""
    bands: dict[tuple[int, int], list[tuple[int, int]]] = {}
    for piece in pieces:
        bands.setdefault((piece.column, piece.column + piece.columns), []).append((piece.row, piece.row + piece.rows))
    for rows in bands.values():
        rows.sort()
        if any(before[1] > after[0] for before, after in itertools.pairwise(rows)):
            return True
    edges = sorted(bands)
    for index, (start, end) in enumerate(edges):
        for other_start, other_end in edges[index + 1 :]:
            if other_start < end and start < other_end and _rows_meet(bands[start, end], bands[other_start, other_end]):
                return True
    return False


def _rows_meet(some: list[tuple[int, int]], others: list[tuple[int, int]]) -> bool:
    return any(a < d and c < b for a, b in some for c, d in others)
