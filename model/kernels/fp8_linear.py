"""Core's linear layers with FP8 matrix products by torch: one scale a tensor, from its own largest value.

The three products of a layer go through torch._scaled_mm: cuBLAS on GPUs with FP8 units, a slow stand-in on a CPU, so
that a run can be tried there. Weights, gradients and all that lies between stay BF16. Recipe "current" of
`model.fp8`; where Transformer Engine is, its own layers compute in FP8.
"""

from __future__ import annotations

from typing import Any

import torch
from megatron.core.tensor_parallel import ColumnParallelLinear, RowParallelLinear
from megatron.core.tensor_parallel.layers import LinearWithGradAccumulationAndAsyncCommunication
from torch.overrides import TorchFunctionMode

from model.kernels.on_gpu import compiled

FORWARD = torch.float8_e4m3fn
LARGEST_SCALE = 2.0**126
"""Its inverse is the least normal number of fp32. Vanishing gradients would ask for an infinite one, and 0 x inf is
not a number."""
BACKWARD = {"hybrid": torch.float8_e5m2, "e4m3": torch.float8_e4m3fn}


def quantised(
    tensor: torch.Tensor, dtype: torch.dtype, *, by_columns: bool = False
) -> tuple[torch.Tensor, torch.Tensor]:
    """(the matrix `tensor` scaled to fill the range of `dtype`, the fp32 scale that undoes it).

    The result lies row after row, or column after column: a compiler writes it so at once. A value that is not finite
    makes the scale, and with it the whole product, not finite: nothing bad is hidden.
    """
    most = torch.finfo(dtype).max
    largest = tensor.abs().amax().float()
    scale = torch.where(largest == 0, 1.0, most / largest.clamp(min=most / LARGEST_SCALE))
    scaled = (tensor.float() * scale).clamp(-most, most).to(dtype)
    return scaled.t().contiguous().t() if by_columns else scaled.contiguous(), scale.reciprocal()


def scaled_product(left: torch.Tensor, right: torch.Tensor, left_dtype: torch.dtype) -> torch.Tensor:
    """[..., k] @ [k, n] in FP8, summed in fp32, of the dtype of `left`; k and n are multiples of 16."""
    quantise = compiled(quantised, any_shape=True) if left.is_cuda else quantised
    # Detached: whether a gradient is wanted would make versions of its own.
    rows, undo_left = quantise(left.detach().reshape(-1, left.shape[-1]), left_dtype)
    columns, undo_right = quantise(right.detach(), FORWARD, by_columns=True)  # as the units read the right factor
    product: torch.Tensor = torch._scaled_mm(rows, columns, scale_a=undo_left, scale_b=undo_right, out_dtype=left.dtype)
    return product.view(*left.shape[:-1], right.shape[-1])


class _Scaled(TorchFunctionMode):
    """Inside, torch.matmul is `scaled_product`."""

    def __init__(self, left_dtype: torch.dtype) -> None:
        super().__init__()
        self._left_dtype = left_dtype

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in (torch.matmul, torch.Tensor.matmul) and not kwargs:
            return scaled_product(args[0], args[1], self._left_dtype)
        return func(*args, **(kwargs or {}))


class _Linear(LinearWithGradAccumulationAndAsyncCommunication):  # type: ignore[misc]
    """Core's forward and backward with scaled products."""

    @staticmethod
    def forward(ctx: Any, gradients: torch.dtype, *args: Any) -> Any:
        ctx.gradients = gradients
        with _Scaled(FORWARD):
            return LinearWithGradAccumulationAndAsyncCommunication.forward(ctx, *args)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        with _Scaled(ctx.gradients):
            return None, *LinearWithGradAccumulationAndAsyncCommunication.backward(ctx, *grads)


def _forward(
    layer: Any,
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
    gradients = BACKWARD[layer.config.torch_fp8.format]
    found: torch.Tensor = _Linear.apply(
        gradients,
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


class Fp8ColumnParallelLinear(ColumnParallelLinear):  # type: ignore[misc]
    """Core's, in FP8."""

    def _forward_impl(self, input: torch.Tensor, weight: torch.Tensor, bias: Any = None, **options: Any) -> Any:
        return _forward(self, input, weight, bias, **options)


class Fp8RowParallelLinear(RowParallelLinear):  # type: ignore[misc]
    """Core's, in FP8."""

    def _forward_impl(self, input: torch.Tensor, weight: torch.Tensor, bias: Any = None, **options: Any) -> Any:
        return _forward(self, input, weight, bias, **options)
