"""What is minimised over preference pairs: Bradley-Terry for a reward model, DPO for a policy."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch.nn.functional import logsigmoid

from data.batches import Dealt
from data.preferences import PairBatch, PairBatches, PreferencePair
from training.batch import DeviceBatch
from training.objective import BatchShape, LossFunction, Sums, run_stage


@dataclass(frozen=True)
class PairRows(DeviceBatch):
    """Rows of b pairs: chosen ones first, then rejected ones; `loss_mask` is 1 where a label is of the answer.

    Attributes:
        last: [2b] int64, place of each row's last token.
        reference: [2b] fp32, log-probability of each answer under the reference; empty where none is needed.
    """

    last: torch.Tensor = field(default_factory=lambda: torch.empty(0))
    reference: torch.Tensor = field(default_factory=lambda: torch.empty(0))


@dataclass(frozen=True)
class ReferencedPairs:
    """A batch of pairs with what the reference makes of them."""

    pairs: PairBatch
    reference: NDArray[np.float64]
    """[2b]"""


class PairsWithReference(Dealt[ReferencedPairs]):
    """`PairBatches` with the reference's log-probabilities of each pair.

    Args:
        pairs: as of `batches`.
        reference: [pairs, 2], of the chosen and the rejected answer.
    """

    def __init__(self, batches: PairBatches, pairs: list[PreferencePair], reference: NDArray[np.float64]) -> None:
        self._batches, self._pairs, self._reference = batches, pairs, reference

    def batch(self, numbers: Sequence[int]) -> ReferencedPairs:
        """Pairs by their places in the order."""
        drawn = [self._batches.number_of(k) for k in numbers]
        batch = self._batches.collate([self._pairs[number] for number in drawn])
        return ReferencedPairs(batch, self._reference[drawn].T.reshape(-1))


class OverPairs:
    """What both objectives share: rows padded on their right, where causal attention sees nothing of it."""

    @property
    def further(self) -> tuple[str, ...]:
        return ("accuracy", "margin")

    def shape(self, micro_batches: int, micro_batch_size: int, seq_length: int) -> BatchShape:
        return BatchShape(micro_batches, 2 * micro_batch_size, seq_length)

    def to_device(
        self, batch: PairBatch | ReferencedPairs, device: torch.device, context_rank: int, context_ranks: int
    ) -> PairRows:
        if context_ranks > 1:
            raise ValueError("rows of pairs are not cut over context-parallel ranks")
        pairs, reference = (batch, np.empty(0)) if isinstance(batch, PairBatch) else (batch.pairs, batch.reference)
        return PairRows(
            tokens=torch.from_numpy(pairs.tokens).to(device),
            labels=torch.from_numpy(pairs.labels).to(device),
            loss_mask=torch.from_numpy(pairs.answer_mask).to(device),
            position_ids=None,
            packed_seq_params=None,
            last=torch.from_numpy(pairs.lengths - 1).to(device),
            reference=torch.from_numpy(reference).float().to(device),
        )


@dataclass(frozen=True)
class BradleyTerry(OverPairs):
    """-log sigmoid(score of chosen - score of rejected), each read at its row's last token (Christiano et al. 2017).

    The chunk has a score head. Counts pairs; further means: how often the chosen one scores higher, and by how much.
    """

    def forward(self, chunk: Any, batch: DeviceBatch) -> tuple[torch.Tensor, LossFunction]:
        assert isinstance(batch, PairRows)
        output = chunk(tokens=batch.tokens, position_ids=batch.position_ids, loss_mask=batch.loss_mask)
        return output, partial(_bradley_terry, batch)


def _bradley_terry(batch: PairRows, scores: torch.Tensor) -> Sums:
    chosen, rejected = last_scores(scores, batch.last).chunk(2)
    return _sums(-logsigmoid(chosen - rejected), chosen - rejected)


def last_scores(scores: torch.Tensor, last: torch.Tensor) -> torch.Tensor:
    """[rows, s] and the place of each row's last token [rows] -> [rows]."""
    return scores.gather(1, last[:, None])[:, 0]


@dataclass(frozen=True)
class DirectPreference(OverPairs):
    """DPO's loss (Rafailov et al. 2023), with label smoothing.

    Counts pairs; further means: how often the implicit reward prefers the chosen one, and by how much.
    """

    beta: float
    label_smoothing: float = 0.0

    def forward(self, chunk: Any, batch: DeviceBatch) -> tuple[torch.Tensor, LossFunction]:
        assert isinstance(batch, PairRows)
        return run_stage(chunk, batch), partial(self._loss, batch)

    def _loss(self, batch: PairRows, token_losses: torch.Tensor) -> Sums:
        gained = answer_log_probabilities(token_losses, batch.loss_mask) - batch.reference
        chosen, rejected = gained.chunk(2)
        margin = self.beta * (chosen - rejected)
        smooth = self.label_smoothing
        return _sums(-(1 - smooth) * logsigmoid(margin) - smooth * logsigmoid(-margin), margin)


def answer_log_probabilities(token_losses: torch.Tensor, answer_mask: torch.Tensor) -> torch.Tensor:
    """[rows]: log-probability of each row's answer, from -log p of each label [rows, s]."""
    return -(token_losses * answer_mask).sum(dim=1)


def _sums(losses: torch.Tensor, margins: torch.Tensor) -> Sums:
    total, margins = losses.sum(), margins.detach()
    right = (margins > 0).double() + 0.5 * (margins == 0).double()
    count = torch.tensor(len(losses), device=losses.device)
    shown = torch.stack((total.detach().double(), count.double(), right.sum(), margins.double().sum()))
    return total, count.to(torch.int), shown
