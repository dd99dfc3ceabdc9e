"""SwiGLU against its definition: values and gradients, bit for bit, of any shape and precision."""

from __future__ import annotations

import pytest
import torch
from torch.nn.functional import silu

from model.kernels.activation import EngineSwiGLU, swiglu


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


class Operator(torch.nn.Module):
    """In the place of Transformer Engine's, a module that core's MLP could not describe in a checkpoint."""

    def __init__(self, config: object) -> None:
        super().__init__()

    def forward(self, whole: torch.Tensor) -> torch.Tensor:
        gate, up = whole.chunk(2, dim=-1)
        return silu(gate) * up


def test_transformer_engines_is_no_module_below_a_layer(monkeypatch: pytest.MonkeyPatch) -> None:
    """MLP.sharded_state_dict asks all of its modules for `sharded_state_dict`, which the operator lacks."""
    monkeypatch.setattr("megatron.core.extensions.transformer_engine.TEActivationOp", Operator)
    layer, whole = torch.nn.Module(), torch.randn(3, 10)
    layer.activation_func = EngineSwiGLU(None)  # type: ignore[assignment]
    assert not layer._modules
    assert torch.equal(layer.activation_func(whole), swiglu(whole))
