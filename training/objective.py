"""What a run minimises: the batches' form on a device, and the loss of one micro-batch."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol

import torch

from training.batch import DeviceBatch, to_device

Sums = tuple[torch.Tensor, torch.Tensor, torch.Tensor]
"""(loss sum with its gradient, int count that the gradient is divided by, fp64 [2 + further]: loss sum, count, and the
sums named by `Objective.further`). Sums over all micro-batches and replicas, divided by the count, are the means."""

LossFunction = Callable[[torch.Tensor], Sums]


@dataclass(frozen=True)
class BatchShape:
    """What core's schedules have to know before the first tensor moves.

    Attributes:
        micro_batches: of this replica in one step.
        micro_batch_size, seq_length: as the pipeline sees them; documents kept apart travel as one long row.
    """

    micro_batches: int
    micro_batch_size: int
    seq_length: int

    @classmethod
    def of(cls, micro_batches: int, micro_batch_size: int, seq_length: int, *, packed: bool) -> BatchShape:
        """The shape of a step's micro-batches; packed ones are [1, micro_batch_size * seq_length]."""
        if packed:
            return cls(micro_batches, 1, micro_batch_size * seq_length)
        return cls(micro_batches, micro_batch_size, seq_length)

    @property
    def tokens(self) -> int:
        """Of one replica in one step."""
        return self.micro_batches * self.micro_batch_size * self.seq_length


class BatchSource(Protocol):
    """Micro-batches of a step, a function of the step alone; together the same at every number of replicas."""

    def micro_batches(
        self,
        step: int,
        global_batch_size: int,
        micro_batch_size: int,
        data_parallel_rank: int = 0,
        data_parallel_size: int = 1,
    ) -> Iterator[Any]:
        """Those of one replica, in the form that the objective takes."""


class Objective(Protocol):
    """What is minimised."""

    @property
    def further(self) -> tuple[str, ...]:
        """Names of sums beside the loss; their means go into the records of a run."""

    def shape(self, micro_batches: int, micro_batch_size: int, seq_length: int) -> BatchShape:
        """Of a replica's micro-batches."""

    def to_device(self, batch: Any, device: torch.device, context_rank: int, context_ranks: int) -> DeviceBatch:
        """A micro-batch of the source, on this rank's device."""

    def forward(self, chunk: Any, batch: DeviceBatch) -> tuple[torch.Tensor, LossFunction]:
        """Run a stage; what comes out of the last one goes into the loss function."""


@dataclass(frozen=True)
class NextToken:
    """Cross-entropy of the next token, over tokens that count. Takes `data.batches.MicroBatch`.

    Attributes:
        packed: whether documents share a row and do not see each other.
    """

    packed: bool = False

    @property
    def further(self) -> tuple[str, ...]:
        return ()

    def shape(self, micro_batches: int, micro_batch_size: int, seq_length: int) -> BatchShape:
        return BatchShape.of(micro_batches, micro_batch_size, seq_length, packed=self.packed)

    def to_device(self, batch: Any, device: torch.device, context_rank: int, context_ranks: int) -> DeviceBatch:
        return to_device(batch, device, context_rank, context_ranks)

    def forward(self, chunk: Any, batch: DeviceBatch) -> tuple[torch.Tensor, LossFunction]:
        return run_stage(chunk, batch), partial(_masked_sum, batch.loss_mask)


def run_stage(chunk: Any, batch: DeviceBatch) -> torch.Tensor:
    """What a stage makes of a micro-batch."""
    output: torch.Tensor = chunk(
        tokens=batch.tokens,
        position_ids=batch.position_ids,
        labels=batch.labels,
        packed_seq_params=batch.packed_seq_params,
        loss_mask=batch.loss_mask,
    )
    return output


def _masked_sum(loss_mask: torch.Tensor, token_losses: torch.Tensor) -> Sums:
    total = (token_losses * loss_mask).sum()
    tokens = loss_mask.sum()
    return total, tokens.to(torch.int), torch.stack((total.detach().double(), tokens.double()))
