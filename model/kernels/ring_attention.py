"""Causal attention over a sequence that context-parallel ranks share: blocks of keys and values travel round a ring.

Ring attention (Liu et al. 2023) with the zig-zag split that balances causal work (as in core and Transformer Engine):
the sequence is cut into 2 * cp chunks and rank r holds chunks r and 2 * cp - 1 - r. Against the block of rank j, rank r
computes all of its own causally (j = r), every query against the first chunk (j < r), or its second chunk's queries
against every key (j > r): the same work whatever j. No rank ever holds more than two blocks of keys and values.

On CPU only: the flash kernel there returns the log-sum-exp that partial results are merged by. On GPUs Transformer
Engine does the same.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist

_attend = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
_attend_backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward


def ring_attention(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scale: float | None, group: dist.ProcessGroup
) -> torch.Tensor:
    """softmax(q k^T * scale) v over the whole sequence, causal.

    Args:
        query: [b, heads, s / cp, d], this rank's two chunks one after the other.
        key, value: [b, groups, s / cp, d], likewise.
        scale: None for 1 / sqrt(d).
        group: the context-parallel group.

    Returns:
        [b, heads, s / cp, d]
    """
    output: torch.Tensor = _RingAttention.apply(query, key, value, scale, group)  # type: ignore[no-untyped-call]
    return output


class _RingAttention(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        scale: float | None,
        group: dist.ProcessGroup,
    ) -> torch.Tensor:
        merged = _Merged(query)
        block = torch.stack((key, value))
        for _, owner, held in _Ring(group).blocks(block):
            queries, keys = _meeting(group.rank(), owner, query.shape[2])
            part, log_sum_exp = _attend(
                query[:, :, queries], held[0][:, :, keys], held[1][:, :, keys], 0.0, owner == group.rank(), scale=scale
            )
            merged.add(queries, part, log_sum_exp)
        output = merged.output.to(query.dtype)
        ctx.save_for_backward(query, key, value, output, merged.log_sum_exp)
        ctx.scale, ctx.group = scale, group
        return output

    @staticmethod
    def backward(ctx: Any, output_grad: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, None, None]:
        """Gradients of keys and values travel behind their block and come home with the last hop, summed in fp32."""
        query, key, value, output, log_sum_exp = ctx.saved_tensors
        ring, rank = _Ring(ctx.group), ctx.group.rank()
        query_grad = torch.zeros_like(query, dtype=torch.float32)
        travelling = torch.zeros((2, *key.shape), dtype=torch.float32)
        for step, owner, held in ring.blocks(torch.stack((key, value))):
            if step:
                travelling = ring.pass_on(travelling)
            queries, keys = _meeting(rank, owner, query.shape[2])
            grads = _attend_backward(
                output_grad[:, :, queries].contiguous(),
                query[:, :, queries],
                held[0][:, :, keys],
                held[1][:, :, keys],
                output[:, :, queries],
                log_sum_exp[:, :, queries],
                0.0,
                owner == rank,
                scale=ctx.scale,
            )
            query_grad[:, :, queries] += grads[0]
            travelling[0][:, :, keys] += grads[1]
            travelling[1][:, :, keys] += grads[2]
        home = ring.pass_on(travelling)
        return query_grad.to(query.dtype), home[0].to(key.dtype), home[1].to(value.dtype), None, None


def _meeting(rank: int, owner: int, length: int) -> tuple[slice, slice]:
    """The queries of `rank` and the keys of `owner` that meet, in each one's own two chunks of `length` tokens."""
    first, second, both = slice(0, length // 2), slice(length // 2, length), slice(0, length)
    if owner == rank:
        return both, both
    return (both, first) if owner < rank else (second, both)


class _Merged:
    """Partial attentions over disjoint keys, merged by their log-sum-exps in fp32."""

    def __init__(self, query: torch.Tensor) -> None:
        self.output = torch.zeros_like(query, dtype=torch.float32)
        self.log_sum_exp = query.new_full(query.shape[:3], -torch.inf, dtype=torch.float32)

    def add(self, queries: slice, part: torch.Tensor, log_sum_exp: torch.Tensor) -> None:
        old = self.log_sum_exp[:, :, queries]
        new = torch.logaddexp(old, log_sum_exp)
        kept, added = torch.exp(old - new)[..., None], torch.exp(log_sum_exp - new)[..., None]
        self.output[:, :, queries] = self.output[:, :, queries] * kept + part.float() * added
        self.log_sum_exp[:, :, queries] = new


class _Ring:
    """Hops from each rank of a group to the next."""

    def __init__(self, group: dist.ProcessGroup) -> None:
        self._group, self._size = group, group.size()
        self._next = dist.get_global_rank(group, (group.rank() + 1) % self._size)
        self._previous = dist.get_global_rank(group, (group.rank() - 1) % self._size)

    def blocks(self, own: torch.Tensor) -> Any:
        """(step, owner's rank in the group, block) for every block of the ring; the next one travels meanwhile."""
        held = own.contiguous()
        for step in range(self._size):
            owner = (self._group.rank() - step) % self._size
            coming, hops = self._start(held) if step < self._size - 1 else (held, [])
            yield step, owner, held
            for hop in hops:
                hop.wait()
            held = coming

    def pass_on(self, tensor: torch.Tensor) -> torch.Tensor:
        """Give `tensor` to the next rank and take the previous one's."""
        coming, hops = self._start(tensor)
        for hop in hops:
            hop.wait()
        return coming

    def _start(self, tensor: torch.Tensor) -> tuple[torch.Tensor, list[Any]]:
        coming = torch.empty_like(tensor)
        hops = dist.batch_isend_irecv(
            [
                dist.P2POp(dist.isend, tensor, self._next, self._group),
                dist.P2POp(dist.irecv, coming, self._previous, self._group),
            ]
        )
        return coming, hops
