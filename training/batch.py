"""Micro-batches as tensors on this rank's device."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from megatron.core.packed_seq_params import PackedSeqParams
from numpy.typing import NDArray

from data.batches import MicroBatch


@dataclass(frozen=True)
class DeviceBatch:
    """What one forward pass reads.

    Attributes:
        tokens, labels: [b, s] int64; with documents apart [1, b * s].
        loss_mask: of the same shape, fp32: the weight of each token's loss, 0 or 1.
        position_ids: of the same shape, None where every row counts 0..s-1.
        packed_seq_params: lengths of the documents, None where a row attends within itself.
    """

    tokens: torch.Tensor
    labels: torch.Tensor
    loss_mask: torch.Tensor
    position_ids: torch.Tensor | None
    packed_seq_params: PackedSeqParams | None


def to_device(batch: MicroBatch, device: torch.device) -> DeviceBatch:
    """Copy `batch` to `device`; rows are joined into one sequence where documents must not see each other."""
    shape = batch.tokens.shape if batch.document_lengths is None else (1, batch.tokens.size)

    def move(array: NDArray[np.generic]) -> torch.Tensor:
        return torch.from_numpy(np.ascontiguousarray(array)).reshape(shape).to(device)

    packed = None if batch.document_lengths is None else _packed(batch.document_lengths, device)
    consecutive = bool((batch.position_ids == np.arange(batch.tokens.shape[1])).all()) and packed is None
    return DeviceBatch(
        tokens=move(batch.tokens),
        labels=move(batch.labels),
        loss_mask=move(batch.loss_mask),
        position_ids=None if consecutive else move(batch.position_ids),
        packed_seq_params=packed,
    )


def _packed(lengths: tuple[int, ...], device: torch.device) -> PackedSeqParams:
    """Core's and Transformer Engine's "thd" layout: cumulative lengths, the longest document."""
    borders = torch.tensor((0, *lengths), dtype=torch.int32).cumsum(0, dtype=torch.int32).to(device)
    longest = max(lengths)
    return PackedSeqParams(
        qkv_format="thd", cu_seqlens_q=borders, cu_seqlens_kv=borders, max_seqlen_q=longest, max_seqlen_kv=longest
    )
