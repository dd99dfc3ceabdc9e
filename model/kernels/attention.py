"""Causal attention for the torch provider: grouped queries, sliding windows, packed documents.

Stands where core's specs build `core_attention`. Core's own DotProductAttention materialises the scores; this one goes
through torch's fused scaled_dot_product_attention (flash kernels on CPU and GPU).
"""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

import torch
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.tensor_parallel.random import get_cuda_rng_tracker
from megatron.core.transformer.module import MegatronModule
from torch.nn.functional import scaled_dot_product_attention

from foundation.errors import RequestError
from model.kernels.on_gpu import fused_attention
from model.kernels.ring_attention import ring_attention

WINDOW_BLOCK = 1024
"""Queries handled at a time under a sliding window: bounds the mask at WINDOW_BLOCK x (WINDOW_BLOCK + window)."""


class TorchAttention(MegatronModule):  # type: ignore[misc]
    """softmax(q k^T * scale) v, causal.

    Args follow core's `CoreAttentionBuilder`; `config.window_size` is core's (left, right) pair.

    Raises:
        RequestError: a mask that is not causal, or context parallelism with what the ring does not do.
    """

    def __init__(
        self,
        config: Any,
        layer_number: int,
        attn_mask_type: Any,
        attention_type: str,
        attention_dropout: float | None = None,
        softmax_scale: float | None = None,
        cp_comm_type: str | None = None,
        pg_collection: Any = None,
    ) -> None:
        super().__init__(config=config)
        if attn_mask_type.name != "causal" or attention_type != "self":
            raise RequestError(f"attention of the torch provider is causal self-attention, not {attn_mask_type.name}")
        self.dropout = config.attention_dropout if attention_dropout is None else attention_dropout
        self.scale = softmax_scale
        self.window: int | None = None if config.window_size is None else config.window_size[0] + 1
        self.ring = pg_collection.cp if pg_collection is not None and pg_collection.cp.size() > 1 else None
        if self.ring is not None:
            self._refuse_what_a_ring_lacks()

    def _refuse_what_a_ring_lacks(self) -> None:
        for lacking, asked in (
            ("a sliding window", self.window is not None),
            ("attention dropout", self.dropout > 0),
            ("a GPU (Transformer Engine has it there)", torch.cuda.is_available()),
        ):
            if asked:
                raise RequestError(f"context parallelism of the torch provider does not go with {lacking}")

    def forward(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        attention_mask: torch.Tensor | None,
        attn_mask_type: Any = None,
        attention_bias: torch.Tensor | None = None,
        packed_seq_params: PackedSeqParams | None = None,
    ) -> torch.Tensor:
        """Attend.

        Args:
            query: [s, b, heads, d], or [t, heads, d] with `packed_seq_params` (documents one after another).
            key, value: [s, b, groups, d] or [t, groups, d]; groups divide heads.
            attention_mask, attention_bias: have to be None; the mask is causal.

        Returns:
            [s, b, heads * d], or [t, heads, d] packed.
        """
        if attention_mask is not None or attention_bias is not None:
            raise RequestError("attention of the torch provider takes no explicit mask or bias")
        if self.ring is not None and packed_seq_params is not None:
            raise RequestError("documents kept apart do not go with context parallelism in the torch provider")
        if packed_seq_params is None:
            s, b, heads, d = query.shape
            out = self._attend(*(tensor.permute(1, 2, 0, 3) for tensor in (query, key, value)))  # [b, heads, s, d]
            return out.permute(2, 0, 1, 3).reshape(s, b, heads * d)
        documents = packed_seq_params.cu_seqlens_q.diff().tolist()
        parts = zip(*(tensor.split(documents) for tensor in (query, key, value)), strict=True)
        return torch.cat([self._attend_document(*part) for part in parts])

    def _attend_document(self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
        out = self._attend(*(tensor.transpose(0, 1)[None] for tensor in (query, key, value)))  # [1, heads, t, d]
        return out[0].transpose(0, 1)

    def _attend(self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
        """[b, heads, s, d] x [b, groups, s, d] -> [b, heads, s, d]"""
        if self.ring is not None:
            return ring_attention(query, key, value, self.scale, self.ring)
        if self.window is None or self.window >= key.shape[2]:
            return self._fused(query, key, value, mask=None)
        blocks = []
        for first in range(0, query.shape[2], WINDOW_BLOCK):
            last = min(first + WINDOW_BLOCK, query.shape[2])
            seen_from = max(0, first - self.window + 1)
            mask = _band(first, last, seen_from, self.window, query.device)
            blocks.append(
                self._fused(query[:, :, first:last], key[:, :, seen_from:last], value[:, :, seen_from:last], mask)
            )
        return torch.cat(blocks, dim=2)

    def _fused(
        self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: torch.Tensor | None
    ) -> torch.Tensor:
        options: dict[str, Any] = {
            "attn_mask": mask,
            "is_causal": mask is None,
            "scale": self.scale,
            "enable_gqa": key.shape[1] != query.shape[1],
        }
        if not (self.training and self.dropout):
            with fused_attention(query):
                return scaled_dot_product_attention(query, key, value, **options)
        # Under sequence parallelism core has forked the stream around the whole block, as its own attention expects.
        with nullcontext() if self.config.sequence_parallel else get_cuda_rng_tracker().fork(), fused_attention(query):
            return scaled_dot_product_attention(query, key, value, dropout_p=self.dropout, **options)


def _band(first: int, last: int, seen_from: int, window: int, device: torch.device) -> torch.Tensor:
    """True where query i in [first, last) sees key j in [seen_from, last): i - window < j <= i."""
    query = torch.arange(first, last, device=device)[:, None]
    key = torch.arange(seen_from, last, device=device)[None, :]
    return (key <= query) & (key > query - window)
