"""RMSNorm of the torch provider against its formula."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from model.kernels.norm import RMSNorm


def build(
    width: int, dtype: torch.dtype = torch.float32, *, sequence_parallel: bool = False, eps: float = 1e-5
) -> RMSNorm:
    config = SimpleNamespace(params_dtype=dtype, sequence_parallel=sequence_parallel)
    norm = RMSNorm(config, width, eps=eps, normalization="RMSNorm")
    with torch.no_grad():
        norm.weight.copy_(torch.linspace(0.5, 2.0, width))
    return norm


def formula(hidden: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    hidden = hidden.double()
    return hidden / (hidden.square().mean(-1, keepdim=True) + eps).sqrt() * weight.double()


def test_weights_lie_on_the_device_that_computes(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nobody moves a model after it is built: on a GPU a weight left behind stops the first product."""
    monkeypatch.setattr(torch.cuda, "current_device", lambda: torch.device("meta"))
    config = SimpleNamespace(params_dtype=torch.float32, sequence_parallel=False)
    assert RMSNorm(config, 8).weight.is_meta


@pytest.mark.parametrize("eps", [1e-5, 0.3])
def test_equals_the_formula_with_gradients(eps: float) -> None:
    norm = build(24, eps=eps)
    hidden = torch.randn(5, 2, 24, generator=torch.Generator().manual_seed(1)).requires_grad_()
    other, weight = hidden.detach().clone().requires_grad_(), norm.weight.detach().clone().requires_grad_()
    out, right = norm(hidden), formula(other, weight, eps)
    torch.testing.assert_close(out.double(), right, rtol=1e-5, atol=1e-6)
    out.pow(3).sum().backward()
    right.pow(3).sum().backward()
    torch.testing.assert_close(hidden.grad, other.grad, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(norm.weight.grad, weight.grad, rtol=1e-4, atol=1e-4)


def test_bf16_statistics_are_fp32() -> None:
    """4,096 squares of about 1 do not add up in bf16: it has 8 bits."""
    norm = build(4096, torch.bfloat16)
    hidden = torch.randn(3, 4096, generator=torch.Generator().manual_seed(1)).to(torch.bfloat16)
    out = norm(hidden)
    assert out.dtype == torch.bfloat16
    torch.testing.assert_close(out.double(), formula(hidden, norm.weight.detach(), 1e-5), rtol=2**-7, atol=1e-6)


@pytest.mark.parametrize("split", [False, True])
def test_marks_the_weight_whose_gradient_is_summed_over_a_split_sequence(split: bool) -> None:
    assert getattr(build(8, sequence_parallel=split).weight, "sequence_parallel", None) is split
