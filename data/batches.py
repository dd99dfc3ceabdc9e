"""Batches: the micro-batches of a step, as arrays.

Step t of a run with global batch size G takes samples t * G .. t * G + G - 1. They form G / micro_batch_size
micro-batches of consecutive samples, and micro-batch m goes to data-parallel rank m % data_parallel_size. So the set of
micro-batches of a step, and with it the step's loss and gradient, is the same at every data-parallel size.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Generic, TypeVar

import numpy as np
from numpy.typing import NDArray

from data.samples import DocumentRules, Sample, Samples
from foundation.errors import ConfigError

Integers = NDArray[np.int64]
Batch = TypeVar("Batch")


@dataclass(frozen=True)
class MicroBatch:
    """What one forward pass reads; b samples of s inputs each."""

    tokens: Integers
    """int64 [b, s]"""
    labels: Integers
    """int64 [b, s]: the token after each input."""
    loss_mask: NDArray[np.float32]
    """float32 [b, s]: 1.0 where the loss counts, 0.0 where not."""
    position_ids: Integers
    """int64 [b, s]"""
    document_lengths: tuple[int, ...] | None
    """Tokens of each document, in row-major order, adding up to b * s; documents never span rows.
    None where attention is causal over the whole row."""


def global_batch(step: int, global_batch_size: int) -> range:
    """Numbers of the samples of step `step` (from 0)."""
    if step < 0:
        raise IndexError(f"step {step}: steps count from 0")
    return range(step * global_batch_size, (step + 1) * global_batch_size)


class Dealt(ABC, Generic[Batch]):
    """What numbered samples, rows or pairs have in common: a step's micro-batches, dealt out by `places`."""

    @abstractmethod
    def batch(self, numbers: Sequence[int]) -> Batch:
        """A micro-batch of those samples, whatever was read before."""

    def micro_batches(
        self,
        step: int,
        global_batch_size: int,
        micro_batch_size: int,
        data_parallel_rank: int = 0,
        data_parallel_size: int = 1,
    ) -> Iterator[Batch]:
        """This data-parallel rank's micro-batches of step `step` (from 0); sizes count samples.

        Raises:
            ConfigError: the global batch does not divide among the ranks.
        """
        for numbers in places(step, global_batch_size, micro_batch_size, data_parallel_rank, data_parallel_size):
            yield self.batch(numbers)


class SampleBatches(Dealt[MicroBatch]):
    """Those of a run over `samples`."""

    def __init__(self, samples: Samples) -> None:
        self._samples = samples

    def batch(self, numbers: Sequence[int]) -> MicroBatch:
        """Samples side by side."""
        return collate([self._samples[k] for k in numbers], self._samples.rules)


def places(
    step: int, global_batch_size: int, micro_batch_size: int, data_parallel_rank: int, data_parallel_size: int
) -> Iterator[range]:
    """Numbers of the samples of each of this rank's micro-batches of step `step` (from 0).

    Raises:
        ConfigError: the global batch does not divide among the ranks.
    """
    if not 0 <= data_parallel_rank < data_parallel_size:
        raise ValueError(f"data-parallel rank {data_parallel_rank} of {data_parallel_size}")
    together = micro_batch_size * data_parallel_size
    if global_batch_size < 1 or global_batch_size % together:
        below = global_batch_size // together * together
        raise ConfigError(
            "training.global_batch_size",
            global_batch_size,
            f"divides by micro_batch_size x data_parallel_size = {micro_batch_size} x {data_parallel_size}",
            f"{below} or {below + together}" if below > 0 else f"{together}",
        )
    numbers = global_batch(step, global_batch_size)
    for first in range(data_parallel_rank * micro_batch_size, global_batch_size, together):
        yield numbers[first : first + micro_batch_size]


def collate(samples: Sequence[Sample], rules: DocumentRules) -> MicroBatch:
    """Stack samples into a micro-batch, by the rules of core's _get_ltor_masks_and_position_ids."""
    rows = np.stack([sample.tokens for sample in samples])
    tokens, labels = np.ascontiguousarray(rows[:, :-1]), np.ascontiguousarray(rows[:, 1:])
    lengths = [_document_lengths(sample) for sample in samples]
    loss_mask = np.ones(tokens.shape, dtype=np.float32)
    if rules.eod_mask_loss:
        loss_mask[tokens == rules.eod_id] = 0.0
    position_ids = np.broadcast_to(np.arange(tokens.shape[1], dtype=np.int64), tokens.shape)
    if rules.reset_position_ids or rules.document_mask:
        position_ids = np.stack([_positions(row) for row in lengths])
    return MicroBatch(
        tokens=tokens,
        labels=labels,
        loss_mask=loss_mask,
        position_ids=np.ascontiguousarray(position_ids),
        document_lengths=tuple(int(length) for row in lengths for length in row) if rules.document_mask else None,
    )


def _document_lengths(sample: Sample) -> Integers:
    """Tokens of each document among the inputs of a sample (its last token is a label only)."""
    inputs = len(sample.tokens) - 1
    starts = sample.document_starts[sample.document_starts < inputs]
    return np.diff(np.append(starts, inputs))


def _positions(lengths: Integers) -> Integers:
    """0, 1, ... in each document: int64 [sum of lengths]."""
    starts = np.cumsum(lengths) - lengths
    return np.arange(int(lengths.sum()), dtype=np.int64) - np.repeat(starts, lengths)
