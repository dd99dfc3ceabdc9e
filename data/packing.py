"""Packing: examples laid into rows of seq_length tokens, kept apart by document masks, none cut.

An example of n tokens takes n - 1 inputs and as many labels, so no label reaches into the next example. What is left of
a row is filled with padding, a document of its own without loss. Rows are packed once, from the seed alone, best fit
first (the longest begin rows, each next goes where it leaves least); an epoch then shuffles rows, so that row k
is a function of the seed and k as in pre-training (data.order), and a run resumes from its count of rows.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from data.batches import Dealt, MicroBatch
from data.instruction import Example
from data.order import permutation

_TIES, _ROWS = 0, 1


class PackedRow(NamedTuple):
    """One row: inputs, labels, where the loss counts, positions, and the lengths of its documents."""

    tokens: NDArray[np.int64]
    labels: NDArray[np.int64]
    loss_mask: NDArray[np.float32]
    position_ids: NDArray[np.int64]
    lengths: tuple[int, ...]


@dataclass(frozen=True)
class Packing:
    """Which examples share a row."""

    rows: tuple[tuple[int, ...], ...]
    seq_length: int
    inputs: int
    """Of all examples; rows x seq_length less these are padding."""

    @property
    def filled(self) -> float:
        """Share of the places that examples take."""
        return self.inputs / max(1, len(self.rows) * self.seq_length)


def pack(lengths: Sequence[int], seq_length: int, seed: int) -> Packing:
    """Best-fit decreasing.

    Args:
        lengths: inputs of each example, at most seq_length.
        seq_length: of a row.
        seed: decides between examples of one length.
    """
    sizes = np.asarray(lengths, dtype=np.int64)
    if len(sizes) and not 1 <= int(sizes.min()) <= int(sizes.max()) <= seq_length:
        raise ValueError(f"examples of {sizes.min()} to {sizes.max()} inputs do not go into rows of {seq_length}")
    shuffled = permutation(len(sizes), seed, _TIES)
    order = shuffled[np.argsort(-sizes[shuffled], kind="stable")]
    rows: list[list[int]] = []
    open_rows: list[tuple[int, int]] = []  # (room, row), ascending
    for number in order.tolist():
        size = int(sizes[number])
        place = bisect_left(open_rows, (size, -1))
        if place == len(open_rows):
            room, row = seq_length, len(rows)
            rows.append([])
        else:
            room, row = open_rows.pop(place)
        rows[row].append(number)
        if room > size:
            insort(open_rows, (room - size, row))
    return Packing(tuple(map(tuple, rows)), seq_length, int(sizes.sum()))


class PackedExamples(Dealt[MicroBatch]):
    """Rows of packed examples: row k for k = 0, 1, ... without end.

    Args:
        examples: at least one; each of 2 to seq_length + 1 tokens.
        seq_length: inputs of a row.
        seed: of packing and order.
        padding_id: fills rows; e.g. the end-of-document token.
        packed: False: one example a row.
    """

    def __init__(
        self, examples: Sequence[Example], seq_length: int, seed: int, padding_id: int, *, packed: bool = True
    ) -> None:
        if not examples:
            raise ValueError("no examples")
        self._examples, self._seed, self._padding = examples, seed, padding_id
        lengths = [len(example.tokens) - 1 for example in examples]
        if packed:
            self.packing = pack(lengths, seq_length, seed)
        else:
            self.packing = Packing(tuple((number,) for number in range(len(lengths))), seq_length, sum(lengths))
        self._epoch: tuple[int, NDArray[np.int64]] | None = None

    @property
    def rows_per_epoch(self) -> int:
        """Every example is in one of them."""
        return len(self.packing.rows)

    def examples_of(self, k: int) -> tuple[int, ...]:
        """Numbers of the examples in row k."""
        if k < 0:
            raise IndexError(f"row {k}: rows count from 0")
        epoch, place = divmod(k, self.rows_per_epoch)
        if self._epoch is None or self._epoch[0] != epoch:
            self._epoch = epoch, permutation(self.rows_per_epoch, self._seed, epoch, _ROWS)
        return self.packing.rows[int(self._epoch[1][place])]

    def __getitem__(self, k: int) -> PackedRow:
        """Row k, whatever was read before it."""
        return lay_out(
            [self._examples[number] for number in self.examples_of(k)], self.packing.seq_length, self._padding
        )

    def batch(self, numbers: Sequence[int]) -> MicroBatch:
        """Rows as a micro-batch; dealt out as in pre-training."""
        return stack([self[k] for k in numbers])


def lay_out(examples: Sequence[Example], seq_length: int, padding_id: int) -> PackedRow:
    """One row of examples, each a document, and padding behind them."""
    inputs = [example.tokens[:-1] for example in examples]
    rest = seq_length - sum(map(len, inputs))
    if rest < 0:
        raise ValueError(f"{seq_length - rest} inputs do not go into a row of {seq_length}")
    padding = np.full(rest, padding_id, dtype=np.int64)
    lengths = [len(part) for part in inputs] + ([rest] if rest else [])
    return PackedRow(
        tokens=np.concatenate([*inputs, padding], dtype=np.int64),
        labels=np.concatenate([*(example.tokens[1:] for example in examples), padding], dtype=np.int64),
        loss_mask=np.concatenate(
            [*(example.answer[1:] for example in examples), np.zeros(rest, dtype=np.bool_)]
        ).astype(np.float32),
        position_ids=np.concatenate([np.arange(length, dtype=np.int64) for length in lengths]),
        lengths=tuple(lengths),
    )


def stack(rows: Sequence[PackedRow]) -> MicroBatch:
    """Rows as a micro-batch with documents apart."""
    return MicroBatch(
        tokens=np.stack([row.tokens for row in rows]),
        labels=np.stack([row.labels for row in rows]),
        loss_mask=np.stack([row.loss_mask for row in rows]),
        position_ids=np.stack([row.position_ids for row in rows]),
        document_lengths=tuple(length for row in rows for length in row.lengths),
    )
