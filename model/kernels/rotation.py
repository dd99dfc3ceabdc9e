"""Rotary position embeddings applied in few passes over memory, forward and backward (Su et al. 2021).

Core's own unfused function negates, joins, multiplies and joins again, and autograd repeats all of it backward. Here a
tensor is read three times; products and sums are core's, in its order, so the bits are too.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from megatron.core.models.common.embeddings import rope_utils

from model.kernels.on_gpu import compiled


class _Rotated(torch.autograd.Function):
    """A rotation; its gradient is turned back by the same angles."""

    @staticmethod
    def forward(ctx: Any, heads: torch.Tensor, angles: torch.Tensor) -> torch.Tensor:
        cosine, sine = torch.cos(angles).to(heads.dtype), torch.sin(angles).to(heads.dtype)
        ctx.save_for_backward(cosine, sine)
        return _turned(heads, cosine, sine, torch.Tensor.sub_, torch.Tensor.add_)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, None]:
        cosine, sine = ctx.saved_tensors
        return _turned(grad, cosine, sine, torch.Tensor.add_, torch.Tensor.sub_), None


Change = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]


def _turned(
    heads: torch.Tensor, cosine: torch.Tensor, sine: torch.Tensor, change_first: Change, change_second: Change
) -> torch.Tensor:
    half = heads.shape[-1] // 2
    out = heads * cosine
    change_first(out[..., :half], heads[..., half:] * sine[..., :half])
    change_second(out[..., half:], heads[..., :half] * sine[..., half:])
    return out


def rotated(heads: torch.Tensor, angles: torch.Tensor, interleaved: bool = False) -> torch.Tensor:
    """Each pair (i, i + d/2) of channels turned by its angle; in the place of core's `fused_apply_rotary_pos_emb`.

    Args:
        heads: [s, b, n, d].
        angles: [s, 1 or b, 1, d] fp32, the second half as the first.
    """
    if interleaved or angles.shape[-1] != heads.shape[-1]:
        raise ValueError("turns halves of whole heads, not neighbours or parts of them")
    if heads.is_cuda:
        return compiled(plain_rotated)(heads, angles)
    apply: Callable[..., torch.Tensor] = _Rotated.apply
    return apply(heads, angles)


def plain_rotated(heads: torch.Tensor, angles: torch.Tensor) -> torch.Tensor:
    """As `rotated`, by its definition, for a compiler to fuse."""
    cosine, sine = torch.cos(angles).to(heads.dtype), torch.sin(angles).to(heads.dtype)
    first, second = heads.chunk(2, dim=-1)
    return heads * cosine + torch.cat((-second, first), dim=-1) * sine


def rotated_packed(heads: torch.Tensor, cu_seqlens: torch.Tensor, angles: torch.Tensor, **ranks: int) -> torch.Tensor:
    """As `rotated`, of packed documents; in the place of core's `fused_apply_rotary_pos_emb_thd`.

    Args:
        heads: [t, n, d].
        cu_seqlens: where documents begin and end, [documents + 1].
        angles: [t, 1, 1, d], of every token at its own position.
        ranks: core's `cp_size` and `cp_rank`; documents are not cut over context-parallel ranks.
    """
    if ranks.get("cp_size", 1) > 1 or not heads.shape[0] == angles.shape[0] == int(cu_seqlens[-1]):
        raise ValueError("takes an angle for every token, on one context-parallel rank")
    return rotated(heads[:, None], angles)[:, 0]


def use_in_core() -> None:
    """Fill the places that core keeps for Transformer Engine's kernels (models/common/embeddings/rope_utils.py:20-29).

    Layers use them whose `config.apply_rope_fusion` is set.
    """
    rope_utils.fused_apply_rotary_pos_emb = rotated
    rope_utils.fused_apply_rotary_pos_emb_thd = rotated_packed


def transformer_engine_where_shared(engine: Any) -> None:
    """Fill them with Transformer Engine's kernels, which take the same angles for all rows of a batch alone.

    Rows with positions of their own, and packed documents (whose angles lie at every token's own place), are turned by
    ours.
    """

    def turned(heads: torch.Tensor, angles: torch.Tensor, interleaved: bool = False) -> torch.Tensor:
        if angles.shape[1] > 1:
            return rotated(heads, angles, interleaved)
        found: torch.Tensor = engine.fused_apply_rotary_pos_emb(heads, angles, interleaved=interleaved)
        return found

    rope_utils.fused_apply_rotary_pos_emb = turned
    rope_utils.fused_apply_rotary_pos_emb_thd = rotated_packed
