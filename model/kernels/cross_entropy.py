"""Cross-entropy over logits whose vocabulary is split among tensor-parallel ranks.

Differs from core's `vocab_parallel_cross_entropy` in two ways: entries that only pad the vocabulary take no
probability (core's do, so that its loss depends on the padding and with it on the layout), and no fp32 copy of the
logits is made: only the log-sum-exp of each token is kept. A CPU handles rows a block at a time; for a GPU the same
sums are written down plainly and compiled, so that logits are read once forward, and read and written once backward.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist

from model.kernels.on_gpu import compiled

BLOCK_BYTES = 4 << 20
"""fp32 bytes of logits handled at a time: small enough to stay in a core's cache."""


class _VocabParallelCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, logits: torch.Tensor, labels: torch.Tensor, vocab_size: int, group: dist.ProcessGroup | None
    ) -> torch.Tensor:
        rank, ranks = (0, 1) if group is None else (group.rank(), group.size())
        width = logits.shape[-1]
        own = max(0, min(width, vocab_size - rank * width))  # columns of this rank that are no padding
        rows, targets = logits.reshape(-1, width), labels.reshape(-1) - rank * width
        log_sum_exp, predicted = _local_statistics(rows, targets, own)
        if ranks > 1:
            log_sum_exp, predicted = _combine(log_sum_exp, predicted, group, ranks)
        ctx.save_for_backward(rows, targets, log_sum_exp)
        ctx.own, ctx.shape = own, logits.shape
        return (log_sum_exp - predicted).view(labels.shape)

    @staticmethod
    def backward(ctx: Any, loss_grad: torch.Tensor) -> tuple[torch.Tensor, None, None, None]:
        rows, targets, log_sum_exp = ctx.saved_tensors
        weights = loss_grad.reshape(-1)
        if rows.is_cuda:
            fused = compiled(plain_gradient)(rows, targets, log_sum_exp, weights, ctx.own)
            return fused.view(ctx.shape), None, None, None
        grad = torch.empty_like(rows)
        grad[:, ctx.own :] = 0
        in_place = rows.dtype == torch.float32
        for block in _row_blocks(rows):
            own = rows[block, : ctx.own]
            probability = grad[block, : ctx.own] if in_place else torch.empty_like(own, dtype=torch.float32)
            torch.sub(own, log_sum_exp[block, None], out=probability)
            probability.exp_()
            if ctx.own:
                here, columns = _targets_of_this_rank(targets[block], ctx.own)
                probability.scatter_add_(1, columns, -here.float())
            probability.mul_(weights[block, None])
            if not in_place:
                grad[block, : ctx.own] = probability
        return grad.view(ctx.shape), None, None, None


def vocab_parallel_cross_entropy(
    logits: torch.Tensor, labels: torch.Tensor, vocab_size: int, group: dist.ProcessGroup | None
) -> torch.Tensor:
    """-log softmax(logits)[label] over the first `vocab_size` entries of the whole vocabulary.

    Args:
        logits: [..., width], this rank's columns; rank r of `group` holds entries r * width .. (r + 1) * width - 1.
        labels: [...], int64, entries of the whole vocabulary below `vocab_size`.
        vocab_size: true vocabulary; entries from here on are padding and take no probability.
        group: the tensor-parallel group, None for one rank.

    Returns:
        [...], fp32, equal on every rank of the group.
    """
    apply: Callable[..., torch.Tensor] = _VocabParallelCrossEntropy.apply
    return apply(logits, labels, vocab_size, group)


def _row_blocks(rows: torch.Tensor) -> list[slice]:
    size = max(1, BLOCK_BYTES // (4 * rows.shape[1]))
    return [slice(first, first + size) for first in range(0, rows.shape[0], size)]


def _targets_of_this_rank(targets: torch.Tensor, own: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Whether a target falls into columns 0..own-1, and its column (any, where it does not): [n, 1] each.

    No list of those that do: a GPU would have to tell the host how many there are.
    """
    here = (targets >= 0) & (targets < own)
    return here[:, None], targets.clamp(0, own - 1)[:, None]


def _local_statistics(rows: torch.Tensor, targets: torch.Tensor, own: int) -> tuple[torch.Tensor, torch.Tensor]:
    """fp32 [n]: log-sum-exp over this rank's entries (-inf without any), and the target's logit or 0."""
    if own and rows.is_cuda:
        return compiled(plain_statistics)(rows, targets, own)
    log_sum_exp = rows.new_full((rows.shape[0],), -torch.inf, dtype=torch.float32)
    predicted = rows.new_zeros(rows.shape[0], dtype=torch.float32)
    if own:
        for block in _row_blocks(rows):
            log_sum_exp[block] = torch.logsumexp(rows[block, :own].float(), dim=-1)
        here, columns = _targets_of_this_rank(targets, own)
        predicted = torch.where(here, rows.gather(1, columns).float(), 0.0).squeeze(1)
    return log_sum_exp, predicted


def plain_statistics(rows: torch.Tensor, targets: torch.Tensor, own: int) -> tuple[torch.Tensor, torch.Tensor]:
    """As `_local_statistics`, by its definition, for a compiler to fuse; `own` is not 0."""
    here, columns = _targets_of_this_rank(targets, own)
    predicted = torch.where(here, rows.gather(1, columns).float(), 0.0).squeeze(1)
    logits = rows[:, :own].float()
    largest = logits.amax(dim=-1, keepdim=True)  # written so, both sums become one reading (Milakov & Gimelshein 2018)
    log_sum_exp = (largest + torch.exp(logits - largest).sum(dim=-1, keepdim=True).log()).squeeze(-1)
    return log_sum_exp, predicted


def plain_gradient(
    rows: torch.Tensor, targets: torch.Tensor, log_sum_exp: torch.Tensor, weights: torch.Tensor, own: int
) -> torch.Tensor:
    """weight * (softmax - one at the target), 0 in columns from `own` on, by its definition, for a compiler to fuse."""
    columns = torch.arange(rows.shape[1], device=rows.device)
    probability = torch.exp(rows.float() - log_sum_exp[:, None])
    grad = (probability - (columns == targets[:, None]).float()) * weights[:, None]
    return torch.where(columns < own, grad, 0.0).to(rows.dtype)


def _combine(
    log_sum_exp: torch.Tensor, predicted: torch.Tensor, group: dist.ProcessGroup | None, ranks: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """One gather for both statistics; the same additions in the same order on every rank."""
    local = torch.stack((log_sum_exp, predicted))
    gathered = local.new_empty(ranks * local.numel())
    dist.all_gather_into_tensor(gathered, local.view(-1), group=group)
    gathered = gathered.view(ranks, *local.shape)
    return torch.logsumexp(gathered[:, 0], dim=0), gathered[:, 1].sum(dim=0)
