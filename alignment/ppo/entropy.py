"""Entropy of the next token where tensor-parallel ranks share the vocabulary."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist


class _VocabParallelEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, logits: torch.Tensor, vocab_size: int, group: dist.ProcessGroup | None) -> torch.Tensor:
        rank, ranks = (0, 1) if group is None else (group.rank(), group.size())
        width = logits.shape[-1]
        own = max(0, min(width, vocab_size - rank * width))
        entries = logits[:, :own].float()
        largest = entries.amax(dim=-1) if own else entries.new_full((len(entries),), -torch.inf)
        if ranks > 1:
            dist.all_reduce(largest, op=dist.ReduceOp.MAX, group=group)
        shares = torch.exp(entries - largest[:, None])
        sums = torch.stack((shares.sum(dim=-1), (shares * entries).sum(dim=-1)))
        if ranks > 1:
            dist.all_reduce(sums, group=group)
        log_sum_exp, mean = largest + sums[0].log(), sums[1] / sums[0]
        ctx.save_for_backward(logits, log_sum_exp, mean)
        ctx.own = own
        return log_sum_exp - mean

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        logits, log_sum_exp, mean = ctx.saved_tensors
        entries = logits[:, : ctx.own].float()
        found = torch.zeros_like(logits)
        share = torch.exp(entries - log_sum_exp[:, None])
        found[:, : ctx.own] = -gradient[:, None] * share * (entries - mean[:, None])
        return found, None, None


def vocab_parallel_entropy(logits: torch.Tensor, vocab_size: int, group: dist.ProcessGroup | None) -> torch.Tensor:
    """[n] fp32 nats, equal on every rank of the group.

    Args:
        logits: [n, width], this rank's columns, as `model.kernels.cross_entropy` takes them.
        vocab_size: entries from here on take no probability.
    """
    apply: Callable[..., torch.Tensor] = _VocabParallelEntropy.apply
    return apply(logits, vocab_size, group)
