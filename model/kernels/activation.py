"""SwiGLU of the torch provider, in few passes over memory (Shazeer 2020, arXiv 2002.05202)."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any

import torch
from torch.nn.functional import silu

from model.kernels.on_gpu import compiled


class _SwiGlu(torch.autograd.Function):
    """Keeps its input and silu's value; autograd would keep the other half a second time and join two gradients."""

    @staticmethod
    def forward(ctx: Any, gate_and_up: torch.Tensor) -> torch.Tensor:
        gate, up = gate_and_up.chunk(2, dim=-1)
        opened = silu(gate)
        ctx.save_for_backward(gate_and_up, opened)
        return opened * up

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> torch.Tensor:
        gate_and_up, opened = ctx.saved_tensors
        gate, up = gate_and_up.chunk(2, dim=-1)
        whole = torch.empty_like(gate_and_up)
        of_gate, of_up = whole.chunk(2, dim=-1)
        torch.mul(grad, opened, out=of_up)
        torch.ops.aten.silu_backward.grad_input(grad * up, gate, grad_input=of_gate)
        return whole


def swiglu(gate_and_up: torch.Tensor) -> torch.Tensor:
    """silu(gate) * up: [..., 2 f], the gate first, -> [..., f]."""
    if gate_and_up.is_cuda:
        return compiled(plain_swiglu)(gate_and_up)
    apply: Callable[..., torch.Tensor] = _SwiGlu.apply
    return apply(gate_and_up)


def plain_swiglu(gate_and_up: torch.Tensor) -> torch.Tensor:
    """As `swiglu`, by its definition, for a compiler to fuse."""
    gate, up = gate_and_up.chunk(2, dim=-1)
    return silu(gate) * up


class SwiGLU:
    """Stands where core's MLP builds an `activation_func`: a layer's or an expert's.

    No module on purpose: core asks every module below a layer for its checkpoint, and this one has no weights.
    """

    def __init__(self, config: Any) -> None:
        assert config.gated_linear_unit and config.activation_func_clamp_value is None

    def __call__(self, gate_and_up: torch.Tensor) -> torch.Tensor:
        """[..., 2 f] -> [..., f]."""
        return swiglu(gate_and_up)


class EngineSwiGLU:
    """Transformer Engine's operator in the same place, which is a module and has no `sharded_state_dict`."""

    def __init__(self, config: Any) -> None:
        found = importlib.import_module("megatron.core.extensions.transformer_engine")
        self._operator = found.TEActivationOp(config)

    def __call__(self, gate_and_up: torch.Tensor) -> torch.Tensor:
        """[..., 2 f] -> [..., f]."""
        opened: torch.Tensor = self._operator(gate_and_up)
        return opened
