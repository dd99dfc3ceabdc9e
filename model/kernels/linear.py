"""Core's tensor-parallel linear layers with faster matrix products on a CPU.

torch multiplies fp32 matrices on a CPU by MKL, which uses half of what processors of other makers than Intel can do
(96 against 225 GFLOP/s of one core of an AMD EPYC with AVX-512). oneDNN, which torch ships as well and uses for bf16,
takes what the processor has. All else of the layers, communication above all, is core's.
"""

from __future__ import annotations

from typing import Any

import torch
from megatron.core.tensor_parallel import ColumnParallelLinear, RowParallelLinear
from megatron.core.tensor_parallel.layers import LinearWithGradAccumulationAndAsyncCommunication
from torch.overrides import TorchFunctionMode

FEWEST_ROWS = 4
"""Below, a product reads its matrix once and either library waits for memory."""


def product(left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
    """torch.matmul, by oneDNN where it pays: [..., k] @ [k, n] in fp32 on a CPU, of any strides."""
    rows = left.numel() // max(1, left.shape[-1])
    if left.dtype != torch.float32 or left.device.type != "cpu" or right.dim() != 2 or rows < FEWEST_ROWS:
        return torch.matmul(left, right)
    found: torch.Tensor = torch.ops.mkldnn._linear_pointwise(left, _dense(right.t()), None, "none", [], "")
    return found


def _dense(matrix: torch.Tensor) -> torch.Tensor:
    """With gaps between its rows oneDNN has no fast product: it would take a thousand times as long as the copy."""
    return matrix if matrix.is_contiguous() or matrix.t().is_contiguous() else matrix.contiguous()


def has_onednn() -> bool:
    """Whether this build of torch can."""
    return bool(torch.backends.mkldnn.is_available()) and hasattr(torch.ops.mkldnn, "_linear_pointwise")


class _Products(TorchFunctionMode):
    """Inside, torch.matmul is `product`."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in (torch.matmul, torch.Tensor.matmul) and not kwargs:
            return product(*args)
        return func(*args, **(kwargs or {}))


class _Linear(LinearWithGradAccumulationAndAsyncCommunication):  # type: ignore[misc]
    """Core's forward and backward, whose three products are `product`."""

    @staticmethod
    def forward(ctx: Any, *args: Any) -> Any:
        with _Products():
            return LinearWithGradAccumulationAndAsyncCommunication.forward(ctx, *args)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        with _Products():
            return LinearWithGradAccumulationAndAsyncCommunication.backward(ctx, *grads)


def _linear(
    input: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    *,
    gradient_accumulation_fusion: bool,
    allreduce_dgrad: bool,
    sequence_parallel: bool,
    grad_output_buffer: Any = None,
    wgrad_deferral_limit: int | None = None,
    tp_group: Any = None,
) -> torch.Tensor:
    """As core's `linear_with_grad_accumulation_and_async_allreduce`."""
    found: torch.Tensor = _Linear.apply(
        input,
        weight,
        bias,
        gradient_accumulation_fusion,
        allreduce_dgrad,
        sequence_parallel,
        grad_output_buffer,
        wgrad_deferral_limit,
        tp_group,
    )
    return found


class CpuColumnParallelLinear(ColumnParallelLinear):  # type: ignore[misc]
    """Core's, of a CPU's products."""

    def _forward_impl(self, input: torch.Tensor, weight: torch.Tensor, **options: Any) -> Any:
        if not weight.requires_grad:
            with _Products():
                return super()._forward_impl(input=input, weight=weight, **options)
        return _linear(input, weight, **options)


class CpuRowParallelLinear(RowParallelLinear):  # type: ignore[misc]
    """Core's, of a CPU's products."""

    def _forward_impl(self, input: torch.Tensor, weight: torch.Tensor, **options: Any) -> Any:
        if not weight.requires_grad:
            with _Products():
                return super()._forward_impl(input=input, weight=weight, **options)
        return _linear(input, weight, **options)
