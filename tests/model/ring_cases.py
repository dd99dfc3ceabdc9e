"""What the ring attention tests run on ranks."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch.nn.functional import scaled_dot_product_attention

from model.kernels.ring_attention import ring_attention
from parallel.zigzag import zigzag_chunks


def ring_beside_whole(heads: int, groups: int, length: int, dtype: torch.dtype, scale: float | None) -> list[float]:
    """Relative differences of output and of the gradients of query, key and value on this rank's share."""
    rank, ranks = dist.get_rank(), dist.get_world_size()
    draws = torch.Generator().manual_seed(3)
    query, key, value, weight = (
        torch.randn(2, count, length, 16, generator=draws).to(dtype) for count in (heads, groups, groups, heads)
    )
    whole = [tensor.clone().requires_grad_() for tensor in (query, key, value)]
    output = scaled_dot_product_attention(*whole, is_causal=True, enable_gqa=heads != groups, scale=scale)
    output.backward(weight)

    def share(tensor: torch.Tensor) -> torch.Tensor:
        chunks = zigzag_chunks(length, rank, ranks)
        return torch.cat([tensor[:, :, chunk] for chunk in chunks], dim=2).detach()

    own = [share(tensor).requires_grad_() for tensor in (query, key, value)]
    result = ring_attention(own[0], own[1], own[2], scale, dist.group.WORLD)
    result.backward(share(weight))
    pairs = [(result, output), *((mine.grad, theirs.grad) for mine, theirs in zip(own, whole, strict=True))]
    return [float((mine - share(theirs)).norm() / share(theirs).norm()) for mine, theirs in pairs]


def saved_bytes(length: int) -> int:
    """Bytes that the ring keeps for the backward pass on this rank, for a sequence of `length`."""
    own = length // dist.get_world_size()
    query, key, value = (torch.randn(1, heads, own, 16, requires_grad=True) for heads in (4, 2, 2))
    kept = 0

    def count(tensor: torch.Tensor) -> torch.Tensor:
        nonlocal kept
        kept += tensor.numel() * tensor.element_size()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(count, lambda tensor: tensor):
        ring_attention(query, key, value, None, dist.group.WORLD)
    return kept
