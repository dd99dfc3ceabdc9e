"""Micro-batches as tensors on this rank's device."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace

import numpy as np
import torch
from megatron.core.packed_seq_params import PackedSeqParams
from numpy.typing import NDArray

from data.batches import MicroBatch
from parallel.zigzag import zigzag_share


@dataclass(frozen=True)
class DeviceBatch:
    """What one forward pass reads.

    Attributes:
        tokens, labels: [b, s] int64, s being this context-parallel rank's share; with documents apart [1, b * s].
        loss_mask: of the same shape, fp32: the weight of each token's loss, 0 or 1.
        position_ids: of the same shape, or [1, s] where rows count alike, or None where every row counts 0..s-1.
        packed_seq_params: lengths of the documents, None where a row attends within itself.
        number: of the micro-batch in the whole run; dropout's streams depend on it.
    """

    tokens: torch.Tensor
    labels: torch.Tensor
    loss_mask: torch.Tensor
    position_ids: torch.Tensor | None
    packed_seq_params: PackedSeqParams | None
    number: int = 0


def numbered(batches: Iterable[DeviceBatch], step: int, per_step: int, rank: int, ranks: int) -> Iterator[DeviceBatch]:
    """Number one replica's micro-batches of a step in the run, as data.batches deals them out: m goes to m % ranks.

    Args:
        step: from 0.
        per_step: micro-batches of all replicas in a step.
        rank, ranks: data-parallel.
    """
    for position, batch in enumerate(batches):
        yield replace(batch, number=step * per_step + position * ranks + rank)


def to_device(batch: MicroBatch, device: torch.device, context_rank: int = 0, context_ranks: int = 1) -> DeviceBatch:
    """Copy this context-parallel rank's share of `batch` to `device`.

    Rows are joined into one sequence where documents must not see each other.
    """
    if batch.document_lengths is not None:
        return _join_documents(batch, batch.document_lengths, device)

    def move(rows: NDArray[np.generic]) -> torch.Tensor:
        share = zigzag_share(rows, context_rank, context_ranks)
        return torch.from_numpy(np.ascontiguousarray(share)).to(device)

    positions = batch.position_ids
    alike = bool((positions == positions[:1]).all())
    consecutive = alike and context_ranks == 1 and bool((positions[0] == np.arange(positions.shape[1])).all())
    return DeviceBatch(
        tokens=move(batch.tokens),
        labels=move(batch.labels),
        loss_mask=move(batch.loss_mask),
        position_ids=None if consecutive else move(positions[:1] if alike else positions),
        packed_seq_params=None,
    )


def _join_documents(batch: MicroBatch, lengths: tuple[int, ...], device: torch.device) -> DeviceBatch:
    def move(rows: NDArray[np.generic]) -> torch.Tensor:
        return torch.from_numpy(np.ascontiguousarray(rows)).reshape(1, -1).to(device)

    return DeviceBatch(
        tokens=move(batch.tokens),
        labels=move(batch.labels),
        loss_mask=move(batch.loss_mask),
        position_ids=move(batch.position_ids),
        packed_seq_params=_packed(lengths, device),
    )


def _packed(lengths: tuple[int, ...], device: torch.device) -> PackedSeqParams:
    """Core's and Transformer Engine's "thd" layout: cumulative lengths, the longest document."""
    borders = torch.tensor((0, *lengths), dtype=torch.int32).cumsum(0, dtype=torch.int32).to(device)
    longest = max(lengths)
    return PackedSeqParams(
        qkv_format="thd", cu_seqlens_q=borders, cu_seqlens_kv=borders, max_seqlen_q=longest, max_seqlen_kv=longest
    )
