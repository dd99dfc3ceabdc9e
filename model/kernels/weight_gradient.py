"""Weight gradients added into the main gradient inside the matrix product.

NVIDIA apex has two CUDA functions for this, in the module fused_weight_gradient_mlp_cuda, which core's linear layers
call (tensor_parallel/layers.py:561-577) and its output layer asks for. These two are the same functions of torch's own
products: cuBLAS writes alpha A B + beta C in fp32 from bf16 factors.
"""

from __future__ import annotations

import torch


def wgrad_gemm_accum_fp32(inputs: torch.Tensor, grad_output: torch.Tensor, main_grad: torch.Tensor) -> None:
    """main_grad += grad_output^T inputs, in place.

    Args:
        inputs: [tokens, in], bf16, fp16 or fp32.
        grad_output: [tokens, out], of the same dtype.
        main_grad: [out, in], fp32.
    """
    left = grad_output.t()
    if inputs.dtype == torch.float32:
        main_grad.addmm_(left, inputs)
    elif main_grad.is_cuda:
        torch.addmm(main_grad, left, inputs, out_dtype=torch.float32, out=main_grad)
    else:  # a CPU has no product of bf16 factors into fp32: what the GPU's computes, by its definition
        main_grad.addmm_(left.float(), inputs.float())


def wgrad_gemm_accum_fp16(inputs: torch.Tensor, grad_output: torch.Tensor, main_grad: torch.Tensor) -> None:
    """As `wgrad_gemm_accum_fp32`, where main_grad has the dtype of the factors."""
    main_grad.addmm_(grad_output.t(), inputs)
