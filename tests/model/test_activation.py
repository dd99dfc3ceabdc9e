"""SwiGLU against its definition: values and gradients, bit for bit, of any shape and precision."""

from __future__ import annotations

import pytest
import torch
from torch.nn.functional import silu

from model.kernels.activation import swiglu


@pytest.mark.parametrize("shape", [(5, 2, 14), (1, 8), (0, 4), (3, 1, 2, 66)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_it_is_silu_of_one_half_times_the_other(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    whole = torch.randn(shape).to(dtype).requires_grad_()
    gate, up = whole.chunk(2, dim=-1)
    expected, found = silu(gate) * up, swiglu(whole)
    assert torch.equal(found, expected)
    grad = torch.randn(found.shape).to(dtype)
    assert torch.equal(torch.autograd.grad(found, whole, grad)[0], torch.autograd.grad(expected, whole, grad)[0])


def test_gradients_are_those_of_finite_differences() -> None:
    whole = torch.randn(3, 10, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(swiglu, whole)
