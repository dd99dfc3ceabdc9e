"""What the torch provider does on a GPU and not on a CPU."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from functools import cache
from typing import Any, TypeVar, cast

import torch

Function = TypeVar("Function", bound=Callable[..., Any])


def compiled(function: Function, *, any_shape: bool = False) -> Function:
    """`function` in as few kernels as its sums allow (torch.compile, Triton); compiled at its first call.

    Args:
        function: of tensors.
        any_shape: whether it meets many shapes: after eight versions of one function torch.compile goes on without
            compiling. Otherwise the first shape gets kernels of its own.
    """
    return cast(Function, _compiled_once(function, True if any_shape else None))


@cache
def _compiled_once(function: Callable[..., Any], dynamic: bool | None) -> Any:
    return torch.compile(function, dynamic=dynamic)


def fused_attention(query: torch.Tensor) -> AbstractContextManager[Any]:
    """Inside, scaled_dot_product_attention takes cuDNN's kernel first, then flash, then what takes a mask."""
    if not query.is_cuda:
        return nullcontext()
    from torch.nn.attention import SDPBackend, sdpa_kernel

    order = [SDPBackend.CUDNN_ATTENTION, SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]
    inside: AbstractContextManager[Any] = sdpa_kernel(order, set_priority=True)
    return inside
